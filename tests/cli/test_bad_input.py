"""Whatever is wrong: one message that says what and where, exit code 1, no traceback, and nothing left behind."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from datasets import Dataset
from embedded import DIGITS, RESNET, VIT, copy_of, edit_config, tensors_of, write_tensors
from PIL import Image
from safetensors.torch import save_file
from transformers import BitConfig, BitForImageClassification


STRUCTURES = ("mlp:0", "mlp:1", "mlp:half", "heads:-0.5", "layers:0.5", "mlp:", "mlp:0.5+heads:2")

JOB = import_module("snows_hf.jobs.prune")  # the module: the package has a function of that name


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@dataclass(frozen=True)
class Fault:
    """Options of ``prune`` (made in the test's own folder) and the parts that the message must have.

    Options override a good command's, None leaves one out. ``expected`` may name ``{tmp}``.
    """

    name: str
    options: Callable[[Path], dict[str, object]]
    expected: tuple[str, ...]


def fails(run, tmp_path: Path, fault: Fault) -> None:
    """Runs ``prune`` with a fault in it and checks everything that every failure must have."""
    options = {"pattern": "2:4", "data": DIGITS, "samples": 16, "k": 0, "output": "out"} | fault.options(tmp_path)
    model = options.pop("model", VIT)
    before = sorted(tmp_path.rglob("*"))
    result = run(
        "prune", model, *(w for name, value in options.items() if value is not None for w in (f"--{name}", value))
    )
    assert result.code == 1
    assert result.out == ""
    assert "Traceback" not in result.err
    message = result.err[result.err.index("Error: ") :]
    for part in fault.expected:
        assert part.format(tmp=tmp_path) in message
    made = [path for path in tmp_path.rglob("*") if path not in before and tmp_path / "cache" not in path.parents]
    assert made in ([], [tmp_path / "cache"])


def setting(expected: str, **options: object) -> Fault:
    """A fault in the options alone, ``_`` for ``-``."""
    given = {name.replace("_", "-"): value for name, value in options.items()}
    return Fault(" ".join(f"{n}={v}" for n, v in given.items()), lambda tmp: dict(given), (expected,))


def yaml(name: str, content: str | bytes, *expected: str) -> Fault:
    return Fault(name, lambda tmp: {"config": write(tmp / "s.yaml", content)}, ("{tmp}/s.yaml", *expected))


SETTINGS = [
    *(setting("0 < N < M", pattern=text) for text in ("5:4", "0:4", "4:4", "2:0")),
    *(setting("expected a share between 0 and 1 of mlp, heads, ranks, channels", pattern=text) for text in STRUCTURES),
    setting("mlp is said twice", pattern="mlp:0.5+mlp:0.25"),
    setting("heads lose either some of their number or some of their ranks", pattern="heads:0.5+ranks:0.5"),
    setting("expected at most one pattern of zeros, got 2:4 and 0.5", pattern="mlp:0.5+2:4+0.5"),
    setting("Criterion 'best' of units", pattern="mlp:0.5", set="units=best"),
    setting("Criterion 'alps' of units", pattern="mlp:0.5", set="units=alps"),
    setting("Neither a pattern nor a speed is given", pattern=None),
    setting("--faster 1.5 chooses the pattern itself, and --pattern 2:4 is given besides", faster=1.5),
    *(setting("expected a number above 1", pattern=None, faster=text) for text in (1, 0.5, -2, "nan", "inf")),
    setting("--faster-batch = 0: expected at least 1", pattern=None, faster=1.5, faster_batch=0),
    setting("--faster-batch 8 goes with --faster, which is not given", faster_batch=8),
    setting("makes no zeros, which sparsity is about", pattern=None, faster=1.5, sparsity=0.5),
    setting("makes no zeros, which permute is about", pattern=None, faster=1.5, set="permute=true"),
    setting("Targets 'cascaded'", pattern=None, faster=1.5, set="targets=cascaded"),
    *(setting("between 0 and 1", pattern=text) for text in ("1.2", "0", "1", "-0.5", "nan", "inf")),
    *(setting("expected N:M (2:4, 1:4), a fraction", pattern=text) for text in ("half", "", "2:4:8", "2/4", "-2:4")),
    setting("Setting k = -1: expected a whole number ≥ 0", k=-1),
    setting("Setting samples = 0: expected a whole number ≥ 1", samples=0),
    setting("Setting samples = -5", samples=-5),
    setting("Mask criterion 'sparkle': expected one of ", mask="sparkle"),
    setting("Mask file no.safetensors does not exist", mask="no.safetensors"),
    setting("Setting curvature = 'newton': expected 'gauss-newton' or 'hessian'", set="curvature=newton"),
    setting("expected one of float32", dtype="int8"),
    setting("expected one of float32", dtype="float16"),
    setting("Device 'tpu': expected auto, cpu or cuda", device="tpu"),
    setting("Effort 'fast': expected one of quick, standard, best, paper", effort="fast"),
    setting("Setting memory = nan: expected a number of GB above 0", memory="nan"),
    setting("Setting memory = inf: expected", memory="inf"),
    setting("Setting seed = 99999999999999999999: expected a whole number ≥ 0", seed="99999999999999999999"),
    setting("Setting seed = -1: expected", seed=-1),
    setting("same split 'train'", eval_data=DIGITS, eval_split="train"),
    setting("same split 'test'", data_split="test", eval_data=f"{DIGITS}/../digits"),
    yaml("unknown YAML setting", "colour: red", "unknown setting 'colour'", "cg_max_iter"),
    yaml("pattern in YAML", "pattern: 2:4", "unknown setting 'pattern'"),
    yaml("YAML list", "- k", "expected a mapping of settings, got list"),
    yaml("YAML false", "false", "got bool"),
    yaml("broken YAML", "k: [1", "cannot be read"),
    yaml("YAML not UTF-8", b"\xff\xfe\xfa", "cannot be read"),
    yaml("YAML number as text", "k: five", "k = 'five': expected a whole number"),
    yaml("YAML fraction for a whole number", "samples: 1.5", "samples = 1.5: expected a whole number"),
    yaml("YAML truth for a number", "damping: true", "damping = True: expected a number"),
    yaml("YAML text for a number", "damping: much", "damping = 'much': expected a number"),
    yaml("YAML layers", "layers: 3", "layers = 3: expected a list of names"),
    yaml("YAML out of range", "held_out: 2", "setting held_out = 2: expected a number > 0 and < 1"),
    yaml("YAML seed", f"seed: {10**20}", "setting seed = 100000000000000000000: expected", "≤ 4294967295"),
    setting("no.yaml cannot be read", config="no.yaml"),
    yaml("YAML of a date that is none", "k: 2000-13-45", "cannot be read"),
    yaml("YAML number too long for one", f"k: {'9' * 5000}", "cannot be read"),
    yaml("deep YAML", "[" * 10**4, "cannot be read"),
    setting("Unknown setting 'colour'.\nKnown: allocation, ", set="colour=red"),
    setting("Unknown setting 'pattern'", set="pattern=1:4"),
    setting("--set 'k': expected NAME=VALUE", set="k"),
    setting("--set 'k=[' cannot be read", set="k=["),
    setting("Setting average = -1: expected a whole number ≥ 0", set="average=-1"),
    setting("Setting augment = 1: expected true or false", set="augment=1"),
    setting("Sparsity 0.9: all layers at the sparsest of '1:4,2:4' have 0.75", pattern="1:4,2:4", sparsity=0.9),
    Fault(
        "output is a file",
        lambda tmp: {"output": write(tmp / "result", "")},
        ("Output {tmp}/result exists and is a file",),
    ),
    Fault(
        "output is not empty",
        lambda tmp: {"output": write(tmp / "result/x", "").parent},
        ("Output {tmp}/result exists and is not empty",),
    ),
    Fault(
        "output below a file",
        lambda tmp: {"output": write(tmp / "result", "") / "here"},
        ("Output {tmp}/result/here cannot be written",),
    ),
    setting("Output /proc/snows/out cannot be written", output="/proc/snows/out"),
]


@pytest.mark.parametrize("fault", SETTINGS, ids=lambda fault: fault.name)
def test_settings_are_refused_before_anything_is_loaded(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("it went on")

    monkeypatch.setattr(JOB, "load_subject", never)
    monkeypatch.setattr(JOB, "open_images", never)
    fails(run, tmp_path, fault)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(run, tmp_path: Path) -> None:
    fails(run, tmp_path, setting("Use --device cpu", device="cuda"))


@pytest.mark.parametrize("option", ["--samples=many", "--k=1.5", "--no-such-option", "--config"])
def test_usage_errors(run, option: str) -> None:
    result = run("prune", VIT, "--pattern", "2:4", option)
    assert result.code == 2
    assert option.split("=")[0] in result.err
    assert "Traceback" not in result.err


def edited(**changes: object) -> Callable[[Path], Path]:
    return lambda tmp: edit_config(copy_of(VIT, tmp / "m"), **changes)


def prepared(**changes: object) -> Callable[[Path], Path]:
    return lambda tmp: edit_config(copy_of(VIT, tmp / "m"), "preprocessor_config.json", **changes)


def broken_weights(content: bytes) -> Callable[[Path], Path]:
    return lambda tmp: write(copy_of(VIT, tmp / "m") / "model.safetensors", content).parent


def with_config(text: str) -> Callable[[Path], Path]:
    return lambda tmp: write(copy_of(VIT, tmp / "m") / "config.json", text).parent


def pickled(tmp: Path) -> Path:
    folder = copy_of(VIT, tmp / "m", without=("model.safetensors",))
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def damaged(tmp: Path) -> Path:
    folder = copy_of(VIT, tmp / "m")
    tensors = tensors_of(folder)
    tensors["classifier.weight"][0, 0] = float("nan")
    return write_tensors(folder, tensors)


def headless(tmp: Path) -> Path:
    folder = copy_of(VIT, tmp / "m")
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if not name.startswith("classifier")}
    return write_tensors(folder, tensors)


def standardised(tmp: Path) -> Path:
    folder = copy_of(VIT, tmp / "m", ("model.safetensors", "config.json"))
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_groups": 2, "num_labels": 10}
    BitForImageClassification(BitConfig(**sizes)).save_pretrained(folder)
    return folder


def other_classes(tmp: Path) -> Path:
    folder = copy_of(VIT, tmp / "m")
    tensors = tensors_of(folder)
    tensors["classifier.weight"] = tensors["classifier.weight"][:5].clone()
    return write_tensors(folder, tensors)


def timm_edited(**changes: object) -> Callable[[Path], Path]:
    return lambda tmp: edit_config(timm_folder(tmp), **changes)


def timm_folder(tmp: Path, architecture: str = "vit_tiny_patch16_224", **arguments: object) -> Path:
    arguments = {"num_classes": 10} | arguments
    if architecture.startswith("vit"):
        arguments |= {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model(architecture, **arguments)
    timm.models.save_for_hf(model, str(tmp / "m"), safe_serialization=True)
    return tmp / "m"


LYING = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,160]}}'
ENORMOUS = b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}'
CANNOT_LOAD = "transformers cannot load {tmp}/m as ViTForImageClassification"
CANNOT_PREPARE = "{tmp}/m has no usable preprocessor_config.json"
CANNOT_CLASSIFY = "{tmp}/m cannot take an image that is prepared as its configuration says"
TIMM_CANNOT_READ = "timm cannot read {tmp}/m's preprocessing or names of classes"
MODELS = [
    ("no folder", lambda tmp: tmp / "nothing", "Model folder {tmp}/nothing does not exist"),
    ("local-dir:", lambda tmp: "local-dir:nothing", "Model folder nothing does not exist"),
    ("a file", lambda tmp: write(tmp / "m.safetensors", b""), "Model folder {tmp}/m.safetensors is a file"),
    ("no config.json", lambda tmp: copy_of(VIT, tmp / "m", ("config.json",)), "{tmp}/m has no config.json"),
    ("config.json no JSON", with_config("{'a'"), "{tmp}/m/config.json is not valid JSON"),
    ("config.json a list", with_config("[]"), "{tmp}/m/config.json: expected a JSON object, got list"),
    ("neither library", edited(model_type=None), "neither 'architecture' (timm) nor 'model_type'"),
    ("unknown model_type", edited(model_type="vitt"), "{tmp}/m names no model that transformers has"),
    ("no image model", edited(model_type="bert"), "BertModel takes input_ids, attention_mask, token_type_ids, …: not"),
    ("wrong type in config", edited(hidden_size="wide"), CANNOT_LOAD),
    ("wrong size in config", edited(intermediate_size=64), "vit.layers.0.mlp.fc1.bias, "),
    ("garbage", broken_weights(b"garbage" * 100), "{tmp}/m/model.safetensors is corrupt or truncated"),
    ("empty file", broken_weights(b""), "{tmp}/m/model.safetensors is corrupt or truncated"),
    ("lying header", broken_weights(struct.pack("<Q", len(LYING)) + LYING + b"\0" * 16), "corrupt or truncated"),
    ("header of 4 EB", broken_weights(struct.pack("<Q", 2**62) + b"{}" * 100), "corrupt or truncated"),
    ("tensor of 4 EB", broken_weights(struct.pack("<Q", len(ENORMOUS)) + ENORMOUS), "corrupt or truncated"),
    ("nested header", broken_weights(struct.pack("<Q", 10**5) + b"[" * 10**5), "corrupt or truncated"),
    ("config.json nested", with_config("[" * 10**5), "{tmp}/m/config.json is not valid JSON"),
    ("truncated", broken_weights((VIT / "model.safetensors").read_bytes()[:-100]), "corrupt or truncated"),
    ("pickle", pickled, "as a pickle (pytorch_model.bin)"),
    ("no weights", lambda tmp: copy_of(VIT, tmp / "m", ("model.safetensors",)), "{tmp}/m has no *.safetensors file"),
    ("no processor", lambda tmp: copy_of(VIT, tmp / "m", ("preprocessor_config.json",)), "preprocessor_config.json"),
    ("NaN", damaged, "Weight classifier.weight of {tmp}/m holds NaN"),
    ("no head", headless, "lacks weights of ViTForImageClassification, or has them in another shape: classifier.bias"),
    ("head of other classes", other_classes, "in another shape: classifier.weight"),
    ("nothing to prune", standardised, "BitForImageClassification has no layer that can be pruned"),
    ("timm unknown", lambda tmp: edit_config(timm_folder(tmp), architecture="vitt"), "timm cannot load {tmp}/m"),
    ("timm head of other classes", lambda tmp: edit_config(timm_folder(tmp), num_classes=7), "head.weight"),
    ("timm other file", lambda tmp: (timm_folder(tmp) / "model.safetensors").rename(tmp / "m/a.safetensors").parent,
     "{tmp}/m has no model.safetensors"),
    ("bitsandbytes", edited(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), CANNOT_LOAD),
    ("AWQ", edited(quantization_config={"quant_method": "awq"}), CANNOT_LOAD),
    ("flash attention", edited(attn_implementation="flash_attention_2"), CANNOT_LOAD),
    ("patches of 0", edited(patch_size=0), CANNOT_LOAD),
    ("0 heads", edited(num_attention_heads=0), CANNOT_LOAD),
    ("no activation", edited(hidden_act="banana"), f"{CANNOT_LOAD}: KeyError: 'banana'"),
    ("larger images", prepared(size={"height": 32, "width": 32}), f"{CANNOT_CLASSIFY}: ValueError: Input image size"),
    ("processor a list", lambda tmp: write(copy_of(VIT, tmp / "m") / "preprocessor_config.json", "[]").parent,
     CANNOT_PREPARE),
    ("processor a number", prepared(image_processor_type=5), CANNOT_PREPARE),
    ("processor of no class", prepared(auto_map=5), CANNOT_PREPARE),
    ("no such filter", prepared(resample=99), CANNOT_CLASSIFY),
    ("mean a text", prepared(image_mean="x"), CANNOT_CLASSIFY),
    ("deviation of 0", prepared(image_std=[0, 0, 0]), "{tmp}/m prepares images to values that are NaN or infinite"),
    ("timm names by letter", timm_edited(label_names={"a": "1"}), TIMM_CANNOT_READ),
    ("timm names a number", timm_edited(label_names=5), "{tmp}/m/config.json: label_names = 5: expected names"),
    ("timm names a text", timm_edited(label_names="abc"), "{tmp}/m/config.json: label_names = 'abc': expected names"),
    ("timm descriptions a list", timm_edited(label_descriptions=["a"]), "label_descriptions = ['a']: expected names"),
    ("timm settings a number", timm_edited(pretrained_cfg=5), "timm cannot load {tmp}/m"),
    ("timm architecture a number", timm_edited(architecture=5), "timm cannot load {tmp}/m"),
    ("timm head a number", timm_edited(pretrained_cfg={"classifier": 5}), "timm cannot load {tmp}/m"),
    ("timm no such filter", timm_edited(pretrained_cfg={"interpolation": "x"}), f"{TIMM_CANNOT_READ}: KeyError: 'x'"),
]  # fmt: skip


@pytest.mark.parametrize("model, expected", [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
@pytest.mark.filterwarnings("ignore")
def test_model(run, tmp_path: Path, model: Callable[[Path], object], expected: str) -> None:
    fails(run, tmp_path, Fault("", lambda tmp: {"model": model(tmp)}, (expected,)))


@pytest.mark.parametrize("model", ["nobody/nothing", "hf-hub:nobody/nothing", "nothing"])
def test_model_that_is_not_here_and_no_hub(run, tmp_path: Path, model: str) -> None:
    name = model.removeprefix("hf-hub:")
    fails(run, tmp_path, Fault("", lambda tmp: {"model": model}, (f"Model {name} is no folder here", "connection")))


@pytest.mark.timeout(60)
def test_data_that_is_not_here_and_no_hub(run, tmp_path: Path) -> None:
    fails(run, tmp_path, Fault("", lambda tmp: {"data": "nobody/nothing"}, ("nobody/nothing is no folder here",)))


def test_offline_mode_is_named(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for option in ("model", "data"):
        fails(run, tmp_path, Fault("", lambda tmp, o=option: {o: "nobody/nothing"}, ("nothing", "HF_HUB_OFFLINE")))


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def folder_of(tmp: Path, *paths: str) -> Path:
    for path in paths:
        picture(tmp / "d" / path)
    return tmp / "d"


def with_broken_image(tmp: Path) -> Path:
    write(tmp / "d/train/a/broken.png", b"no image")
    return tmp / "d"


def decompression_bomb(tmp: Path) -> Path:
    """A PNG of a few bytes that says it has 10 gigapixels."""
    header = struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return write(tmp / "d/train/a/bomb.png", b"\x89PNG\r\n\x1a\n" + chunk).parent.parent.parent


def columns(tmp: Path) -> Path:
    (tmp / "d").mkdir()
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(tmp / "d/train.parquet")
    return tmp / "d"


def empty(tmp: Path) -> Path:
    (tmp / "d").mkdir()
    return tmp / "d"


DATA = [
    ("no folder", lambda tmp: {"data": tmp / "nothing"}, "Data folder {tmp}/nothing does not exist"),
    ("no name", lambda tmp: {"data": "nothing"}, "Data folder nothing does not exist"),
    ("a file", lambda tmp: {"data": write(tmp / "d.parquet", b"")}, "Data {tmp}/d.parquet is a file"),
    ("empty folder", lambda tmp: {"data": empty(tmp)}, "Data folder {tmp}/d holds no images"),
    ("broken image", lambda tmp: {"data": with_broken_image(tmp)}, "broken.png of {tmp}/d (train) cannot be read"),
    ("decompression bomb", lambda tmp: {"data": decompression_bomb(tmp)}, "bomb.png of {tmp}/d (train) cannot be read"),  # noqa: E501
    ("no image column", lambda tmp: {"data": columns(tmp)}, "has no image column; its columns are text, label"),
    ("broken parquet", lambda tmp: {"data": write(tmp / "d/train.parquet", b"x").parent}, "cannot be read as a dataset"),  # noqa: E501
    ("no split", lambda tmp: {"data-split": "valid"}, "has no split 'valid'.\nIt has train, test"),
    ("no evaluation split", lambda tmp: {"eval-data": DIGITS, "eval-split": "dev"}, "has no split 'dev'"),
    ("other classes", lambda tmp: {"eval-data": folder_of(tmp, "test/cat/1.png", "test/dog/1.png")},
     "The 2 classes of {tmp}/d (cat, dog) cannot be matched to the model's 10 classes (0, 1, 2, 3, 4, …)"),
]  # fmt: skip


@pytest.mark.parametrize("options, expected", [d[1:] for d in DATA], ids=[d[0] for d in DATA])
def test_data(run, tmp_path: Path, options: Callable[[Path], dict[str, object]], expected: str) -> None:
    fails(run, tmp_path, Fault("", options, (expected,)))


def mask_file(**tensors: torch.Tensor) -> Callable[[Path], dict[str, object]]:
    def options(tmp: Path) -> dict[str, object]:
        save_file(dict(tensors), tmp / "m.safetensors")
        return {"mask": tmp / "m.safetensors"}

    return options


FC1 = "vit.layers.0.mlp.fc1.weight"
LAYERS = [
    ("mask: labels", lambda tmp: {"mask": "snip", "data": folder_of(tmp, "train/1.png")}, "has no labels, which the mask criterion 'snip' needs"),  # noqa: E501
    ("M divides no width", lambda tmp: {"pattern": "2:7"}, "Pattern 2:7 fits no layer: the input widths are 48, 96"),
    ("no such structure", lambda tmp: {"pattern": "channels:0.5"}, "has no such structure that can be cut"),
    ("no unit left", lambda tmp: {"pattern": "mlp:0.999"}, "has 96 units, and 0 would be left."),
    ("no head goes", lambda tmp: {"pattern": "heads:0.1"}, "has 4 heads, and 4 would be left."),
    ("no config", lambda tmp: {"model": RESNET, "pattern": "channels:0.5"}, "no configuration says channels of"),
    ("no smaller one", lambda tmp: {"model": RESNET, "pattern": None, "faster": 1.5}, "cannot be made smaller, which --faster is about: its channels could be cut, but no configuration says so"),  # noqa: E501
    ("nothing to cut", lambda tmp: {"pattern": None, "faster": 1.5, "layers": "*.fc2"}, "it has no units that could be cut"),  # noqa: E501
    ("unknown layer", lambda tmp: {"layers": "blocks.*"}, "--layers 'blocks.*' matches no prunable layer"),
    ("mask: garbage", lambda tmp: {"mask": write(tmp / "m.safetensors", b"x")}, "Mask file {tmp}/m.safetensors cannot"),  # noqa: E501
    ("mask: none", mask_file(), "Mask file {tmp}/m.safetensors holds no mask"),
    ("mask: name", mask_file(nothing=torch.ones(4, 4, dtype=torch.bool)), "'nothing' is no prunable weight"),
    ("mask: type", mask_file(**{FC1: torch.ones(96, 48)}), f"{FC1} is torch.float32"),
    ("mask: shape", mask_file(**{FC1: torch.ones(48, 96, dtype=torch.bool)}), "expected torch.bool of shape (96, 48)"),
    ("mask: pattern", mask_file(**{FC1: torch.ones(96, 48, dtype=torch.bool)}), "does not follow the pattern 2:4"),
]  # fmt: skip


TOO_FAST = pytest.param(
    lambda tmp: {"pattern": None, "faster": 1000},
    "--faster 1000: no smaller model that its configuration can say is so fast here; the fastest that was ",
    id="too fast",
    marks=pytest.mark.slow,  # it times many; that the search refuses is in jobs/test_faster.py
)


@pytest.mark.parametrize("options, expected", [*(pytest.param(*f[1:], id=f[0]) for f in LAYERS), TOO_FAST])
def test_layers_and_masks(run, tmp_path: Path, options: Callable[[Path], dict[str, object]], expected: str) -> None:
    fails(run, tmp_path, Fault("", options, (expected,)))


def test_pattern_that_fits_no_resnet_layer(run, tmp_path: Path) -> None:
    fails(run, tmp_path, Fault("", lambda tmp: {"model": RESNET, "pattern": "2:7"}, ("input widths are 16, 32, 64",)))


def test_code_of_a_model_is_not_run(run, tmp_path: Path) -> None:
    """config.json names classes of its own beside a known architecture: the library's class is used."""
    folder = edit_config(copy_of(VIT, tmp_path / "m"), auto_map={"AutoModelForImageClassification": "evil.Model"})
    write(folder / "evil.py", f"open({str(tmp_path / 'run')!r}, 'w')\nclass Model: ...\n")
    assert run("inspect", folder).code == 0
    unknown = run("inspect", edit_config(folder, model_type="evil", architectures=["Model"]))
    assert unknown.code == 1 and "Error: " in unknown.err and "Traceback" not in unknown.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", [["inspect"], ["train", "--data", DIGITS, "--pattern", "0.5", "--epochs", 0, "--output", "out"]]
)
def test_code_of_an_image_processor_is_not_run(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[object]
) -> None:
    """Asked whether it may run, transformers would take what is on stdin for an answer."""
    folder = copy_of(VIT, tmp_path / "m")
    processor = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    write(folder / "preprocessor_config.json", json.dumps(processor))
    write(folder / "evil.py", f"open({str(tmp_path / 'run')!r}, 'w')\nclass Evil: ...\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    result = run(command[0], folder, *command[1:])
    assert result.code == 1 and "Error: " in result.err and "Traceback" not in result.err
    assert f"The repository {folder} contains custom code" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_other_commands_refuse_the_same_model(run, tmp_path: Path, command: str) -> None:
    options = ["--data", DIGITS] if command == "eval" else []
    result = run(command, pickled(tmp_path), *options, "--json", "--quiet")
    assert (result.code, result.out) == (1, "")
    assert "pytorch_model.bin" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("options, expected", [
    (["--data", "nothing"], "Data folder nothing does not exist"),
    (["--data", DIGITS, "--split", "dev"], "no split 'dev'"),
    (["--data", DIGITS, "--device", "tpu"], "Device 'tpu'"),
])  # fmt: skip
def test_evaluation(run, options: list[object], expected: str) -> None:
    result = run("eval", VIT, *options)
    assert (result.code, result.out) == (1, "")
    assert expected in result.err


@pytest.mark.parametrize("command", [["probe"], ["attention", "--output", "a.png"], ["finetune", "--output", "out"]])
def test_seed_that_no_generator_takes(run, command: list[str]) -> None:
    result = run(command[0], VIT, *command[1:], "--data", DIGITS, "--seed", 10**20)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("Error: Setting seed = 100000000000000000000: expected a whole number ≥ 0 and ≤")


def test_ctrl_c_leaves_only_what_is_finished(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JOB, "write_card", interrupted)
    result = run("prune", VIT, "--pattern", "2:4", "--data", DIGITS, "--samples", 8, "--k", 0, "--output", "out")
    assert result.code == 130
    assert "is kept in" in result.err and "Traceback" not in result.err
    assert [path.name for path in elsewhere.iterdir()] == [".out.snows-work"]


def test_memory_that_does_not_suffice_is_one_message(run, monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    monkeypatch.setattr(JOB, "write_card", lambda *arguments: torch.empty(10**15))
    result = run("prune", VIT, "--pattern", "2:4", "--data", DIGITS, "--samples", 8, "--k", 0, "--output", "out")
    assert result.code == 1
    assert "Error: Out of memory: " in result.err and "Traceback" not in result.err
    assert [path.name for path in elsewhere.iterdir()] == [".out.snows-work"]


def test_a_layer_that_overflows_is_reported_as_null(run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = JOB.prune_chain

    def overflowing(*arguments: object) -> list[object]:
        return [replace(report, loss_start=float("inf")) for report in real(*arguments)]

    monkeypatch.setattr(JOB, "prune_chain", overflowing)
    given = ("--pattern", "2:4", "--mask", "wanda", "--data", DIGITS, "--samples", 8, "--k", 0)
    result = run("prune", VIT, *given, "--output", "o", "--json")
    assert result.code == 0
    assert json.loads(result.out)["layers"][0]["loss_start"] is None


def test_structures_where_only_zeros_are_known(run) -> None:
    result = run("sensitivity", VIT, "--data", DIGITS, "--patterns", "mlp:0.5")
    assert result.code == 1 and "A sensitivity takes zeros alone, not structures" in result.err


@pytest.mark.parametrize("mask", ["alps", "sparsegpt", "obc", "masks.safetensors"])
def test_structures_at_initialisation_need_scores(run, mask: str) -> None:
    save_file({"x": torch.ones(1, dtype=torch.bool)}, "masks.safetensors")
    given = ("--data", DIGITS, "--pattern", "mlp:0.5", "--mask", mask, "--output", "out")
    result = run("train", VIT, *given)
    assert result.code == 1 and f"{mask!r} has no scores that could be summed over units" in result.err
