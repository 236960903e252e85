"""Families beyond the paper's, from folder to pruned folder: better than the mask alone, and loaded by stock code."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import warm
from cases import BY_NAME, randomised
from embedded import DIGITS, VIT
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from snows_hf import build_chain, load, pack, prune
from snows_hf.adapters import Chain, frozen
from snows_hf.data.images import calibration_images, open_images
from snows_hf.patterns import NM


TRANSFORMERS = [
    *("dinov2", "dinov2-registers", "clip", "siglip", "beit-position-biases", "swin", "convnext", "convnextv2"),
]
VIT_SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = {
    "vit_base_patch16_clip_quickgelu_224": VIT_SIZES,
    "vit_base_patch16_siglip_224": VIT_SIZES,
    "vit_small_patch14_reg4_dinov2": VIT_SIZES,
    "beit_base_patch16_224": VIT_SIZES,
    "swin_tiny_patch4_window7_224": {
        "img_size": 16,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 2),
        "window_size": 4,
    },
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 32), "img_size": None},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": None},
}


@dataclass(frozen=True)
class Family:
    """A tiny random model in a folder, and the folder made of it."""

    library: str
    source: Path
    pruned: Path
    report: dict


def save_transformers(name: str, folder: Path) -> None:
    case = BY_NAME[f"transformers-{name}"]
    case.model().save_pretrained(folder)
    processor = json.loads((VIT / "preprocessor_config.json").read_text())
    processor["size"] = {"height": case.size, "width": case.size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def save_timm(name: str, folder: Path) -> None:
    sizes = {key: value for key, value in TIMM[name].items() if value is not None}
    model = randomised(timm.create_model(name, num_classes=10, **sizes)).eval()
    size = sizes.get("img_size", 64)
    config = {"model_args": sizes, "pretrained_cfg": {"input_size": (3, size, size), "pool_size": None}}
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """``made(library, name)`` is that family, made once."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def make(library: str, name: str) -> Family:
        source, output = root / library / name, root / library / f"{name}-pruned"
        source.mkdir(parents=True)
        (save_transformers if library == "transformers" else save_timm)(name, source)
        given = {"data": str(DIGITS), "samples": 64, "sweeps": 1, "layer_steps": 3, "mask": "magnitude"}
        result = prune(str(source), "2:4", output=output, **given)
        return Family(library, source, output, result.report)

    return make


FAMILIES = [*(("transformers", name) for name in TRANSFORMERS), *(("timm", name) for name in TIMM)]
SOME = [("transformers", "convnext"), ("timm", "vit_small_patch14_reg4_dinov2")]


@pytest.fixture(params=[f if f in SOME else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES], ids="-".join)
def family(request: pytest.FixtureRequest, made) -> Family:
    return made(*request.param)


@torch.no_grad()
def features(chain: Chain, images: Tensor) -> list[Tensor]:
    with frozen(chain.model):
        return chain((images,))


def test_pruned_weights_follow_the_pattern(family: Family) -> None:
    model = load(str(family.pruned)).model
    names = [name for layer in family.report["layers"] for name in layer["parameters"]]
    assert names
    assert all(NM(2, 4).holds(model.get_parameter(name)) for name in names)
    depthwise = [layer["name"] for layer in family.report["dense_layers"]]
    assert all("dw" in name for name in depthwise), depthwise


def test_every_layer_beats_its_mask_on_held_out_images(family: Family) -> None:
    layers = family.report["layers"]
    assert all(layer["loss_pruned"] <= layer["loss_start"] for layer in layers)
    improved = [layer for layer in layers if layer["status"] == "improved"]
    assert len(improved) >= 0.8 * len(layers), [(layer["name"], layer["status"]) for layer in layers]
    assert sum(layer["loss_pruned"] for layer in layers) < 0.8 * sum(layer["loss_start"] for layer in layers)


def test_the_network_keeps_its_features_better_than_with_the_mask_alone(family: Family) -> None:
    """On images that took no part, every operation's error over its variance, dense activations as the truth."""
    checkpoint, pruned = load(str(family.source)), load(str(family.pruned)).model
    images = calibration_images(open_images(str(DIGITS), "test"), 64, 0, checkpoint.preprocess)
    chain = build_chain(checkpoint.model, images[:1])
    truth = features(chain, images)

    def error() -> float:
        """Of the weights that the chain's model has now."""
        outputs = features(chain, images)
        return sum(float((a - b).square().mean() / b.var()) for a, b in zip(outputs, truth, strict=True))

    with torch.no_grad():
        for layer in family.report["layers"]:
            for name in layer["parameters"]:
                weight = checkpoint.model.get_parameter(name)
                weight.mul_(NM(2, 4).mask(weight.abs()))
    masked = error()
    checkpoint.model.load_state_dict(pruned.state_dict())
    assert error() < 0.9 * masked


def test_packed_and_read_again(family: Family, tmp_path: Path) -> None:
    pack(family.pruned, tmp_path / "packed")
    models = [load(str(family.pruned)).model, load(str(tmp_path / "packed")).model]
    if family.library == "transformers":
        models.append(AutoModelForImageClassification.from_pretrained(tmp_path / "packed"))
    for other in models[1:]:
        for (name, a), b in zip(models[0].state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


STOCK = """
import json, sys
import timm, torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

for library, folder, images, logits in json.loads(sys.argv[1]):
    images = load_file(images)["images"]
    with torch.no_grad():
        if library == "timm":
            output = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        else:
            model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), info
            AutoImageProcessor.from_pretrained(folder)
            output = model.eval()(images).logits
    save_file({"logits": output.contiguous()}, logits)
assert "snows_hf" not in sys.modules
"""


@pytest.mark.slow
def test_stock_libraries_compute_the_same_logits(made, tmp_path: Path) -> None:
    """One process for all families, since it spends seconds on imports."""
    jobs, expected = [], []
    for library, name in FAMILIES:
        checkpoint = load(str(made(library, name).pruned))
        images = calibration_images(open_images(str(DIGITS), "test"), 4, 0, checkpoint.preprocess)
        job = tmp_path / f"{library}-{name}"
        save_file({"images": images.contiguous()}, f"{job}.images")
        jobs.append((library, str(made(library, name).pruned), f"{job}.images", f"{job}.logits"))
        with torch.no_grad():
            output = checkpoint.model(images)
        expected.append(getattr(output, "logits", output))
    done = warm.run("-c", STOCK, json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    for (library, folder, _, logits), right in zip(jobs, expected, strict=True):
        torch.testing.assert_close(load_file(logits)["logits"], right, msg=f"{library} {folder}")
