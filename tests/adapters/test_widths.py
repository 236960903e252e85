"""Coupled widths: what is cut is what a network with those units' outputs unread computes, in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from tiny import images, randomised, timm_resnet, timm_vit, transformers_vit
from torch import nn

from snows_hf.adapters import build_chain, cifar_resnet  # noqa: F401  registers CIFAR ResNets
from snows_hf.adapters.outputs import outputs_of
from snows_hf.adapters.widths import Width, cut, widths_of
from snows_hf.errors import ConfigError
from snows_hf.hub.load import Checkpoint
from snows_hf.hub.resize import Size, resized


SMALL: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_labels": 3, "attn_implementation": "sdpa"}
VIT: dict[str, Any] = SMALL | {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def transformers_model(name: str, **config: Any) -> nn.Module:
    kind: Any = getattr(transformers, name)
    return randomised(kind(kind.config_class(**config)), seed=0)


def checkpoint_of(model: nn.Module, architecture: str = "", **arguments: Any) -> Checkpoint:
    given: Any = model
    config = {"architecture": architecture, "model_args": arguments} if architecture else given.config.to_dict()
    library = "timm" if architecture else "transformers"
    return Checkpoint("tiny", Path(), library, config, model, lambda rows: torch.zeros(0), None, None)


def timm_checkpoint(architecture: str, **arguments: Any) -> Checkpoint:
    model = randomised(timm.create_model(architecture, num_classes=3, **arguments), seed=0)
    return checkpoint_of(model, architecture, **arguments)


CHECKPOINTS = {
    "ViT": lambda: checkpoint_of(transformers_vit()),
    "DINOv2, gated": lambda: checkpoint_of(
        transformers_model("Dinov2ForImageClassification", **VIT, mlp_ratio=2, use_swiglu_ffn=True)
    ),
    "DINOv2": lambda: checkpoint_of(transformers_model("Dinov2ForImageClassification", **VIT, mlp_ratio=2)),
    "Swin": lambda: checkpoint_of(
        transformers_model(
            "SwinForImageClassification", image_size=8, patch_size=2, window_size=2, embed_dim=4, depths=(1, 1),
            num_heads=(2, 2), mlp_ratio=2.0, num_labels=3,
        )
    ),
    "timm's ViT": lambda: timm_checkpoint(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0
    ),
    "EVA, gated": lambda: timm_checkpoint(
        "eva02_tiny_patch14_224", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0
    ),
    "CIFAR ResNet": lambda: timm_checkpoint("resnet20_cifar"),
    "ResNet-26": lambda: timm_checkpoint("resnet26", base_width=16),
}  # fmt: skip
"""Checkpoints whose configurations can say a smaller width."""


def kept_of(widths: list[Width], kind: str, share: float) -> dict[Width, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    own = [width for width in widths if width.kind == kind]
    return {w: torch.randperm(w.units, generator=generator)[: round(share * w.units)].sort().values for w in own}


@torch.no_grad()
def without_reading(model: nn.Module, kept: dict[Width, torch.Tensor]) -> nn.Module:
    """A copy of a model whose readers ignore the units that are not kept."""
    model = copy.deepcopy(model)
    for width, units in kept.items():
        gone = torch.ones(width.units, dtype=torch.bool).index_fill_(0, units, False)
        for slot in width.readers:
            model.get_parameter(slot.name)[:, gone.repeat_interleave(slot.each)] = 0
    return model


def size_of(model: nn.Module, kept: dict[Width, torch.Tensor]) -> Size:
    width, units = next(iter(kept.items()))
    return Size(width.units, len(units), width.makers[0].each, model.get_parameter(width.makers[0].name).shape[1])


@torch.no_grad()
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_cut_network_computes_what_the_masked_one_does(name: str) -> None:
    checkpoint = CHECKPOINTS[name]()
    model = checkpoint.model
    size = 64 if "ResNet-26" in name else 32 if "CIFAR" in name else 8
    pixels = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    widths = widths_of(build_chain(model, pixels[:1]))
    kinds = dict.fromkeys(width.kind for width in widths)
    assert kinds
    for kind in kinds:
        if kind == "heads" and checkpoint.library == "timm":
            continue
        kept = kept_of(widths, kind, 0.5)
        smaller = resized(checkpoint, cut(model.state_dict(), kept), {kind: size_of(model, kept)})
        masked = outputs_of(without_reading(model, kept), pixels)["logits"]
        got = outputs_of(smaller.model, pixels)["logits"]
        assert torch.allclose(got, masked, rtol=1e-9, atol=1e-9 * float(masked.abs().max()))
        assert not torch.allclose(masked, outputs_of(model, pixels)["logits"], rtol=1e-3)
        assert type(smaller.model) is type(model)


def test_what_no_configuration_says_is_refused() -> None:
    model = timm_resnet()
    checkpoint = checkpoint_of(model, "resnet18")
    widths = widths_of(build_chain(model, images(1)))
    kept = kept_of(widths, "channels", 0.5)
    with pytest.raises(ConfigError, match="no configuration says channels of 4 in place of 8"):
        resized(checkpoint, cut(model.state_dict(), kept), {"channels": size_of(model, kept)})


def test_residual_streams_embeddings_and_heads_of_classes_are_no_widths() -> None:
    for model in (transformers_vit(), timm_vit()):
        widths = widths_of(build_chain(model, images(1)))
        assert [width.kind for width in widths] == ["heads", "mlp"] * 2
        assert {width.units for width in widths} == {2, 12}
