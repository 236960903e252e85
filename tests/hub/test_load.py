"""Which library a folder belongs to, what its name may look like, and what is loaded of it."""

import json
from pathlib import Path

import pytest
import timm
import torch
from embedded import DIGITS, RESNET, VIT, copy_of, edit_config, tensors_of, write_tensors
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification

from snows_hf import build_chain, finetune, from_pretrained, load, pack, prune
from snows_hf.data.names import short_name
from snows_hf.errors import LoadError
from snows_hf.hub.create import create
from snows_hf.hub.folder import find_folder, library_of


@pytest.mark.parametrize(
    "config, library",
    [
        ({"architecture": "vit_tiny_patch16_224"}, "timm"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "transformers"),
        ({"architecture": "resnet18", "model_type": "timm_wrapper"}, "timm"),
    ],
)
def test_library(config: dict[str, object], library: str) -> None:
    assert library_of(config, Path("m")) == library


def test_neither_library() -> None:
    with pytest.raises(LoadError, match=r"m/config.json has neither"):
        library_of({"architectures": ["X"]}, Path("m"))


@pytest.mark.parametrize("source", [VIT, RESNET])
def test_transformers_folder(source: Path) -> None:
    checkpoint = load(str(source))
    assert (checkpoint.library, checkpoint.class_names) == ("transformers", tuple("0123456789"))
    assert not checkpoint.model.training
    size = checkpoint.processor.size["height"]
    pixels = checkpoint.preprocess([Image.new("RGB", (8, 8), (255, 255, 255))] * 2)
    assert pixels.shape == (2, 3, size, size)
    assert torch.all(pixels == 1)  # (1 - 0.5) / 0.5


def test_timm_folder(tiny_timm: Path) -> None:
    checkpoint = from_pretrained(str(tiny_timm))
    assert (checkpoint.library, checkpoint.class_names) == ("timm", tuple("0123456789"))
    assert checkpoint.processor is None
    pixels = checkpoint.preprocess([Image.new("RGB", (8, 8), (255, 255, 255))])
    assert pixels.shape == (1, 3, 16, 16)
    for name, tensor in tensors_of(tiny_timm).items():
        assert torch.equal(checkpoint.model.state_dict()[name], tensor)


def test_timm_wrapped_by_transformers_is_timm(tiny_timm: Path, tmp_path: Path) -> None:
    source = copy_of(tiny_timm, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["model_args"]["num_classes"]
    edit_config(source, model_args=config["model_args"])
    wrapped = AutoModelForImageClassification.from_pretrained(source)
    wrapped.save_pretrained(tmp_path / "wrapped")
    checkpoint = load(str(tmp_path / "wrapped"))
    assert checkpoint.library == "timm"
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(checkpoint.model(images), wrapped.eval()(images).logits)
    assert len(build_chain(checkpoint.model).groups()) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timm_weights_keep_the_type_of_the_file(tiny_timm: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = copy_of(tiny_timm, tmp_path / "m")
    write_tensors(folder, {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()})
    assert {p.dtype for p in load(str(folder)).model.parameters()} == {dtype}


SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2,), "num_heads": (2,)}
VIT_SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
BEIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def save_timm(folder: Path, name: str, dtype: torch.dtype, **arguments: object) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments).to(dtype)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


@pytest.mark.parametrize(
    "name, arguments",
    [("swin_tiny_patch4_window7_224", SWIN), ("beit_base_patch16_224", BEIT), ("resnetblur18", {})],
)
def test_timm_buffers_that_no_file_holds_follow_the_weights(
    name: str, arguments: dict[str, object], tmp_path: Path
) -> None:
    model = load(str(save_timm(tmp_path / "m", name, torch.float16, **arguments))).model
    missing = [buffer for key, buffer in model.named_buffers() if key not in model.state_dict()]
    assert {buffer.dtype for buffer in missing if buffer.is_floating_point()} == {torch.float16}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_they_follow_when_pruned_weights_get_their_type_back(dtype: torch.dtype, tmp_path: Path) -> None:
    source, data = save_timm(tmp_path / "m", "swin_tiny_patch4_window7_224", dtype, **SWIN), str(DIGITS)
    quick = {"samples": 8, "k": 0, "mask": "magnitude", "dtype": "float64"}
    pruned = prune(str(source), "2:4", data=data, eval_data=data, output=tmp_path / "pruned", **quick)
    retrained = finetune(str(pruned.output), data, output=tmp_path / "retrained", samples=8, epochs=1)
    for model in (pruned.model, retrained.model):
        assert model(torch.zeros(1, 3, 16, 16, dtype=dtype)).dtype == dtype


def without(folder: Path, part: str) -> Path:
    return write_tensors(folder, {name: tensor for name, tensor in tensors_of(folder).items() if part not in name})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name, arguments, part", [
    ("vit_tiny_patch16_224", VIT_SIZES, "blocks.1.mlp.fc1.weight"),
    ("vit_tiny_patch16_224", VIT_SIZES, "blocks.0.norm1.bias"),  # which timm would make zeros of
    ("vit_tiny_patch16_224", VIT_SIZES, "head.bias"),
    ("resnet10t", {}, "layer1.0.bn1.running_var"),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "stages.0.blocks.0.gamma"),
])  # fmt: skip
def test_weights_that_timm_would_leave_at_random_are_refused(
    name: str, arguments: dict[str, object], part: str, packed: bool, tmp_path: Path
) -> None:
    folder = save_timm(tmp_path / "m", name, torch.float32, **arguments)
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, model_args=config.get("model_args", {}) | {"pretrained_strict": False})
    load(folder)
    without(folder, part)
    if packed:
        pack(folder, tmp_path / "packed")
    with pytest.raises(LoadError, match=f"lacks weights of .*: {part} for 10 classes"):
        load(tmp_path / "packed" if packed else folder)


def test_an_architecture_that_timm_never_loads_strictly(tmp_path: Path) -> None:
    """Nothing in the configuration says so: it is timm's own choice for DLA."""
    folder = save_timm(tmp_path / "m", "dla34", torch.float32)
    assert "pretrained_strict" not in (folder / "config.json").read_text()
    from_pretrained(folder)
    with pytest.raises(LoadError, match=r"lacks weights of DLA, .*: level2.tree1.conv1.weight for 10 classes"):
        from_pretrained(without(folder, "level2.tree1.conv1.weight"))


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def of_another_size(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"pos_embed": torch.randn(1, 17, 16)}


@pytest.mark.parametrize("layout", [renamed, of_another_size])
def test_layouts_that_timm_converts_are_read(layout: object, tiny_timm: Path, tmp_path: Path) -> None:
    """And what is missing in them is found all the same."""
    folder = copy_of(tiny_timm, tmp_path / "m")
    tensors = tensors_of(folder)
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, model_args=config["model_args"] | {"pretrained_strict": False})
    write_tensors(folder, layout(tensors))
    state = load(folder).model.state_dict()
    assert state.keys() == tensors.keys()
    same = [name for name in tensors if torch.equal(state[name], tensors[name])]
    assert len(same) == len(tensors) - (layout is of_another_size)
    with pytest.raises(LoadError, match=r"blocks.1.norm2.weight for 10 classes"):
        load(without(folder, "blocks.1.norm2.weight"))


def test_classes_are_counted_by_the_model(tiny_timm: Path, tmp_path: Path) -> None:
    """Names that are too few or too many do not change how many classes there are."""
    for count in (3, 12):
        names = [f"class {i}" for i in range(count)]
        folder = edit_config(copy_of(tiny_timm, tmp_path / f"timm{count}"), label_names=names)
        assert load(folder).class_names == (*names, *"0123456789"[count:])[:10]


@pytest.mark.parametrize("where", ["config", "pretrained_cfg", "model_args", "another name"])
def test_a_timm_head_for_other_classes_is_refused(where: str, tiny_timm: Path, tmp_path: Path) -> None:
    """Wherever a configuration says a number of classes that is not the file's: timm would draw a new head."""
    folder = copy_of(tiny_timm, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    own, arguments = config["pretrained_cfg"], config["model_args"]
    if where == "config":
        edit_config(folder, num_classes=7)
    elif where == "pretrained_cfg":
        arguments.pop("num_classes")
        edit_config(folder, num_classes=None, model_args=arguments, pretrained_cfg=own | {"num_classes": 7})
    elif where == "model_args":
        edit_config(folder, model_args=arguments | {"num_classes": 7})
    else:
        edit_config(folder, pretrained_cfg=own | {"classifier": "nothing"})
    messages = {
        "pretrained_cfg": "size mismatch for head.weight",
        "another name": "lacks weights of VisionTransformer, .*: nothing.weight for 10 classes",
    }
    with pytest.raises(LoadError, match=messages.get(where, r"lacks weights of .*: head.weight.* for \d+ classes")):
        load(folder)


def test_an_untrained_network_has_the_classes_of_the_data(tiny_timm: Path, tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(3)]
    assert create("resnet20_cifar", names, 0).model.num_classes == 3
    assert create("resnet20_cifar", names, 0).class_names == tuple(names)
    assert create("resnet20_cifar", None, 0).model.num_classes == 10
    ten = [f"number {i}" for i in range(10)]
    for source in (tiny_timm, VIT):  # a configuration keeps its own number
        assert create(source, names, 0).class_names == tuple("0123456789")
        assert create(source, None, 0).class_names == tuple("0123456789")
        made = create(source, ten, 0)
        assert made.class_names == tuple(ten)
        key = "label_names" if source == tiny_timm else "id2label"
        assert [*made.config[key]] == (ten if source == tiny_timm else list("0123456789"))


def test_classes_without_a_name_are_called_by_their_number(tiny_timm: Path, tmp_path: Path) -> None:
    counted_from_one = {str(i + 1): f"class {i}" for i in range(10)}
    folder = edit_config(copy_of(VIT, tmp_path / "vit"), id2label=counted_from_one)
    assert load(str(folder)).class_names == ("0", *(f"class {i}" for i in range(9)))
    folder = edit_config(copy_of(tiny_timm, tmp_path / "timm"), label_names={"9": "last", "1": "second"})
    assert load(str(folder)).class_names == ("0", "second", *"2345678", "last")


def test_images_that_are_not_resized_have_the_users_size(tmp_path: Path) -> None:
    folder = edit_config(copy_of(VIT, tmp_path / "m"), "preprocessor_config.json", do_resize=False)
    checkpoint = load(str(folder))
    assert checkpoint.preprocess([Image.new("RGB", (16, 16))]).shape == (1, 3, 16, 16)


def test_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, **options: object) -> str:
        asked.append(name)
        return str(VIT)

    monkeypatch.setattr("snows_hf.hub.folder.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    Path("user/model").mkdir(parents=True)
    assert find_folder("user/model") == Path("user/model")
    assert find_folder("local-dir:user/model") == Path("user/model")
    assert find_folder(f"local-dir:{VIT}") == VIT
    assert asked == []
    assert find_folder("hf-hub:user/model") == find_folder("user/other") == VIT
    assert sorted(set(asked)) == ["user/model", "user/other"]
    with pytest.raises(LoadError, match="other does not exist"):
        find_folder("local-dir:user/other")
    names = {
        "user/model": "model",
        "local-dir:user/model": "model",
        "hf-hub:user/model": "user/model",
        "user/other": "user/other",
        "hf-hub:user/other": "user/other",
        ".": tmp_path.name,
        str(VIT): "vit_digits",
        f"{VIT}/": "vit_digits",
    }
    assert {name: short_name(name) for name in names} == names


def test_hub_ids_are_published_as_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snows_hf.hub.folder.snapshot_download", lambda name, **options: str(VIT))
    report = prune("hf-hub:user/model", "2:4", data=str(DIGITS), samples=8, k=0, output=tmp_path / "out").report
    assert report["source"] == "user/model"
    assert ModelCard.load(tmp_path / "out/README.md").data.base_model == "user/model"


def test_timm_models_of_this_package_are_registered() -> None:
    assert "resnet20_cifar" in timm.list_models()


def test_jobs_try_what_they_load_and_from_pretrained_does_not(tmp_path: Path) -> None:
    """A large model in half precision takes long to classify an image on a processor, where it may never have to."""
    larger = {"size": {"height": 32, "width": 32}}
    folder = edit_config(copy_of(VIT, tmp_path / "larger"), "preprocessor_config.json", **larger)
    with pytest.raises(LoadError, match="cannot take an image that is prepared as its configuration says"):
        load(folder)
    checkpoint = from_pretrained(folder)
    assert checkpoint.preprocess([Image.new("RGB", (8, 8))]).shape == (1, 3, 32, 32)
