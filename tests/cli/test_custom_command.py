"""``prune --allow-custom``: smaller networks that no configuration describes, and only this package loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from embedded import DIGITS

import snows_hf
from snows_hf.adapters import build_chain
from snows_hf.adapters.outputs import outputs_of
from snows_hf.adapters.widths import widths_of


CALIBRATION = ("--data", DIGITS, "--samples", 24, "--k", 1)
ALONE = ("--set", "units=magnitude", "--set", "repair=false", "--no-update", "--allow-custom")
SIZES: dict[str, Any] = {"hidden_sizes": [16, 32], "num_labels": 10, "embedding_size": 8, "depths": [2, 1]}


def trained(model: Any) -> Any:
    """Random norms and biases, no two entries of which are the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith(("weight", "var")) else -0.5))
    return model


def timm_folder(folder: Path, architecture: str) -> Path:
    torch.manual_seed(0)
    model = trained(timm.create_model(architecture, num_classes=10))
    model.pretrained_cfg |= {"input_size": (3, 32, 32)}
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def transformers_folder(folder: Path, model: Any) -> Path:
    trained(model).save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def resnet(folder: Path) -> Path:
    config = tf.ResNetConfig(**SIZES, layer_type="bottleneck")
    return transformers_folder(folder, tf.ResNetForImageClassification(config))


def convnext(folder: Path) -> Path:
    config = tf.ConvNextConfig(
        hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=10, layer_scale_init_value=1.0
    )
    return transformers_folder(folder, tf.ConvNextForImageClassification(config))


def vit(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = tf.ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=10)
    return transformers_folder(folder, tf.ViTForImageClassification(config))


def timm_vit(folder: Path) -> Path:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 4}
    model = trained(timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes))
    timm.models.save_for_hf(model, str(folder), model_args=sizes, safe_serialization=True)
    return folder


MODELS: dict[str, tuple[Callable[[Path], Path], str, tuple[object, ...]]] = {
    "EfficientNet": (lambda folder: timm_folder(folder, "test_efficientnet"), "channels:0.25", ()),
    "MobileNetV3": (lambda folder: timm_folder(folder, "mobilenetv3_small_050"), "channels:0.5", ()),
    "ResNet": (resnet, "channels:0.5", ()),
    "ConvNeXt": (convnext, "mlp:0.5", ()),
    "one block of a ViT": (vit, "mlp:0.5+heads:0.5", ("--layers", "vit.layers.0.*")),
    "timm's heads": (timm_vit, "heads:0.25", ()),
}


@torch.no_grad()
def masked(folder: Path, units: dict[str, Any], smaller: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of the whole model, in float64, whose layers do not read the units that are gone: by the entries that a
    norm or a bias has for them."""
    model: Any = snows_hf.load(folder).model.double()
    own, left = model.state_dict(), smaller.state_dict()
    for width in widths_of(build_chain(model, pixels[:1])):
        if width.name in units:
            slot = next(slot for slot in width.along if own[slot.name].dim() == 1)
            there = torch.isin(own[slot.name], left[slot.name])[slot.offset :][: width.units * slot.each]
            for reader in width.readers:
                model.get_parameter(reader.name)[:, ~there.repeat_interleave(reader.each // slot.each)] = 0
    return outputs_of(model, pixels)["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_made_saved_and_loaded(run, tmp_path: Path, name: str) -> None:
    build, pattern, options = MODELS[name]
    folder = build(tmp_path / "model")
    refused = run("prune", folder, "--pattern", pattern, *CALIBRATION, *options, "--output", "refused")
    assert refused.code == 1 and "--allow-custom" in refused.err and not Path("refused").exists()

    given = ("prune", folder, "--pattern", pattern, *CALIBRATION, *options, *ALONE, "--output", "out", "--json")
    made = run(*given)
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert json.loads(Path("out/config.json").read_text())["snows"]["custom"] is True
    checkpoint = snows_hf.from_pretrained("out")
    assert checkpoint.custom and type(checkpoint.model) is type(snows_hf.load(folder).model)
    assert report["parameters"]["total"] == sum(p.numel() for p in checkpoint.model.parameters())
    assert report["parameters"]["total"] < report["parameters"]["dense"]
    found = json.loads(run("inspect", "out", "--json").out)
    assert found["parameters"] == report["parameters"]["total"]

    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = outputs_of(checkpoint.model.double(), pixels)["logits"]
    expected = masked(folder, report["units"], checkpoint.model, pixels)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
