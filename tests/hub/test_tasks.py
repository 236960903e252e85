"""Models that are no classifiers: which class they load as, what they are for, and that what is saved is theirs."""

from pathlib import Path

import pytest
import torch
import transformers
import warm
from embedded import VIT, copy_of, edit_config, tensors_of, write_tensors
from PIL import Image
from quick import slow
from vision import MODELS, save_headless_timm, save_model, word_tokenizer

from snows_hf import from_pretrained, load, pack
from snows_hf.adapters import outputs_of
from snows_hf.errors import AdapterError, LoadError
from snows_hf.hub.save import save_checkpoint
from snows_hf.runtime.run import Run


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: save_model(name, place / name.replace(" ", "-")) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_each_loads_as_what_its_configuration_names(name: str, folders: dict[str, Path]) -> None:
    checkpoint = load(folders[name])
    named = transformers.AutoConfig.from_pretrained(folders[name]).architectures
    assert [type(checkpoint.model).__name__] == named
    assert checkpoint.task == MODELS[name][2]
    assert checkpoint.class_names is None
    stock = getattr(transformers, named[0]).from_pretrained(folders[name]).eval()
    with torch.no_grad():
        images = torch.rand(2, *checkpoint.image().shape[1:])
        found, expected = outputs_of(checkpoint.model, images), outputs_of(stock, images)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("name", MODELS)
def test_images_of_any_shape_come_out_alike(name: str, folders: dict[str, Path]) -> None:
    checkpoint = load(folders[name])
    one = checkpoint.image()
    wide, high = Image.new("RGB", (90, 60), "red"), Image.new("RGB", (33, 70), "blue")
    assert checkpoint.preprocess([wide, high]).shape == (2, *one.shape[1:])
    assert torch.equal(checkpoint.preprocess([wide, high])[:1], checkpoint.preprocess([wide]))


@pytest.mark.parametrize("name", ["detr", "depth"])
def test_where_the_size_follows_the_shape_the_square_in_the_middle_is_taken(
    name: str, folders: dict[str, Path]
) -> None:
    checkpoint = load(folders[name])
    square = Image.effect_noise((64, 64), 50).convert("RGB")
    wide = Image.new("RGB", (128, 64))
    wide.paste(square, (32, 0))
    expected = checkpoint.processor(images=[square], return_tensors="pt")["pixel_values"]
    assert torch.equal(checkpoint.preprocess([wide]), expected)


def test_a_blank_image_has_the_size_of_the_configuration_where_nothing_is_resized(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = edit_config(copy_of(folders["vit"], tmp_path / "m"), "preprocessor_config.json", do_resize=False)
    assert load(folder).image().shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_saved_is_bit_for_bit_what_was_loaded(
    name: str, packed: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = folders[name]
    if packed:
        sparse = {key: tensor * (tensor.abs() > tensor.abs().median()) for key, tensor in tensors_of(source).items()}
        source = write_tensors(copy_of(source, tmp_path / "sparse"), sparse)
        pack(source, tmp_path / "packed")
    checkpoint = from_pretrained(tmp_path / "packed" if packed else source)
    (tmp_path / "saved").mkdir()
    save_checkpoint(checkpoint, tmp_path / "saved", {}, {})
    before, after = tensors_of(source), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


STOCK = """
import sys
import transformers

names, folder = sys.argv[1].split(), sys.argv[2]
for name in names:
    loaded = getattr(transformers, name).from_pretrained(folder)
model, info = getattr(transformers, names[0]).from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
assert "snows_hf" not in sys.modules
"""


@pytest.mark.parametrize(
    "name, names",
    [
        slow(("vit", "AutoModel AutoImageProcessor")),
        ("clip", "CLIPModel AutoModel AutoTokenizer AutoImageProcessor AutoModelForZeroShotImageClassification"),
        slow(("detr", "DetrForObjectDetection AutoModelForObjectDetection AutoImageProcessor")),
    ],
)
def test_stock_loaders_load_the_whole_folder(name: str, names: str, folders: dict[str, Path], tmp_path: Path) -> None:
    save_checkpoint(load(folders[name]), tmp_path, {}, {})
    done = warm.run("-c", STOCK, names, tmp_path)
    assert done.returncode == 0, done.stderr
    if name == "clip":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / file).read_bytes() == (folders[name] / file).read_bytes()


def test_a_tokenizer_that_is_a_link_to_elsewhere_is_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["clip"], tmp_path / "m")
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "saved").mkdir()
    report: dict[str, object] = {}
    save_checkpoint(load(folder), tmp_path / "saved", {}, report)
    assert report == {"left_out": ["tokenizer.json"]}
    assert not (tmp_path / "saved/tokenizer.json").exists()


def test_tokenizers(folders: dict[str, Path], tmp_path: Path) -> None:
    words = load(folders["clip"]).tokenizer("a photo of a cat.")["input_ids"]
    assert words == word_tokenizer()("a photo of a cat.")["input_ids"]
    assert load(folders["vit"]).tokenizer is None
    without = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    assert load(copy_of(folders["clip"], tmp_path / "none", without)).tokenizer is None
    broken = copy_of(folders["clip"], tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="transformers cannot load the tokenizer of"):
        _ = load(broken).tokenizer


def test_a_file_without_a_pooler_is_loaded_without_one_which_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["vit"], tmp_path / "m")
    write_tensors(folder, {name: t for name, t in tensors_of(folder).items() if not name.startswith("pooler")})
    said: list[str] = []
    checkpoint = load(folder, run=Run(on_stage=said.append))
    assert checkpoint.model.pooler is None
    assert said == [f"{folder} has no weights for a pooler: ViTModel is loaded without one"]
    assert list(outputs_of(checkpoint.model, checkpoint.image())) == ["last_hidden_state"]


@pytest.mark.parametrize("name, part", [("clip", "visual_projection"), ("vit", "layer.1.")])
def test_other_weights_must_be_there(name: str, part: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders[name], tmp_path / "m")
    write_tensors(folder, {key: tensor for key, tensor in tensors_of(folder).items() if part not in key})
    with pytest.raises(LoadError, match=f"lacks weights of {type(load(folders[name]).model).__name__}"):
        load(folder)


def test_without_a_class_the_model_type_decides(folders: dict[str, Path], tmp_path: Path) -> None:
    nameless = edit_config(copy_of(VIT, tmp_path / "vit"), architectures=None)
    assert type(load(nameless).model).__name__ == "ViTForImageClassification"
    unknown = edit_config(copy_of(folders["mae"], tmp_path / "mae"), architectures=["MyOwnModel"])
    assert type(load(unknown).model).__name__ == "ViTMAEModel"


@pytest.mark.parametrize("kind", ["Bert", "Vilt"])
def test_models_of_text_are_refused_by_what_they_take(kind: str, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, **small)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=f"{kind}Model takes input_ids, .*: not images alone"):
        load(tmp_path)


def test_timm_without_a_head(tmp_path: Path) -> None:
    checkpoint = load(save_headless_timm(tmp_path / "m"))
    assert (checkpoint.task, checkpoint.class_names) == ("image-feature-extraction", None)
    assert outputs_of(checkpoint.model, checkpoint.image()).keys() == {"features"}
    (tmp_path / "saved").mkdir()
    save_checkpoint(checkpoint, tmp_path / "saved", {}, {})
    before, after = tensors_of(tmp_path / "m"), tensors_of(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    without = {name: tensor for name, tensor in before.items() if name != "norm.weight"}
    with pytest.raises(LoadError, match=r"norm\.weight"):
        load(write_tensors(tmp_path / "m", without))
