"""Coupled widths: what is cut is what a network with those units' outputs unread computes, in float64."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from quick import rest_slow
from tiny import images, randomised, timm_resnet, timm_vit, transformers_vit
from torch import nn

from snows_hf.adapters import build_chain, cifar_resnet  # noqa: F401  registers CIFAR ResNets
from snows_hf.adapters.outputs import outputs_of
from snows_hf.adapters.turn import bias_of, rescaled, turned
from snows_hf.adapters.widths import Width, cut, unread, widths_of
from snows_hf.errors import ConfigError
from snows_hf.hub.load import Checkpoint
from snows_hf.hub.resize import Size, resized


IMAGE = {"image_size": 8, "patch_size": 4}
SMALL: dict[str, Any] = IMAGE | {"num_labels": 3, "attn_implementation": "sdpa"}
VIT: dict[str, Any] = SMALL | {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP: dict[str, Any] = VIT | {"intermediate_size": 12}
SWIN: dict[str, Any] = {"image_size": 8, "patch_size": 2, "window_size": 2, "embed_dim": 4, "depths": (1, 1)}
SWIN |= {"num_heads": (2, 2), "mlp_ratio": 2.0, "num_labels": 3}
HIERA: dict[str, Any] = {"image_size": [32, 32], "patch_size": [7, 7], "embed_dim": 4, "depths": [1, 1]}
HIERA |= {"num_heads": [2, 2], "query_stride": [2, 2], "num_query_pool": 1, "num_labels": 3, "mlp_ratio": 2.0}
HIERA |= {"masked_unit_size": [4, 4], "masked_unit_attention": [True, False]}
TIMM: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def transformers_model(name: str, **config: Any) -> nn.Module:
    kind: Any = getattr(transformers, name)
    return randomised(kind(kind.config_class(**config)), seed=0)


def checkpoint_of(model: nn.Module, architecture: str = "", **arguments: Any) -> Checkpoint:
    given: Any = model
    config = {"architecture": architecture, "model_args": arguments} if architecture else given.config.to_dict()
    library = "timm" if architecture else "transformers"
    return Checkpoint("tiny", Path(), library, config, model, lambda rows: torch.zeros(0), None, None)


def of_transformers(name: str, **config: Any) -> Callable[[], Checkpoint]:
    return lambda: checkpoint_of(transformers_model(name, **config))


def of_tower(name: str) -> Callable[[], Checkpoint]:
    vision = {key: value for key, value in MLP.items() if key != "num_labels"}
    return lambda: checkpoint_of(transformers_model(name, vision_config=vision, num_labels=3))


def of_timm(architecture: str, **arguments: Any) -> Callable[[], Checkpoint]:
    def build() -> Checkpoint:
        model = randomised(timm.create_model(architecture, num_classes=3, **arguments), seed=0)
        return checkpoint_of(model, architecture, **arguments)

    return build


CHECKPOINTS: dict[str, Callable[[], Checkpoint]] = {
    "ViT": lambda: checkpoint_of(transformers_vit()),
    "DINOv2, gated": of_transformers(
        "Dinov2ForImageClassification", **VIT | {"hidden_size": 12}, mlp_ratio=4, use_swiglu_ffn=True
    ),
    "DINOv2": of_transformers("Dinov2ForImageClassification", **VIT, mlp_ratio=2),
    "BEiT, tables of positions": of_transformers("BeitForImageClassification", **MLP, use_relative_position_bias=True),
    "Swin": of_transformers("SwinForImageClassification", **SWIN),
    "timm's ViT": of_timm("vit_tiny_patch16_224", **TIMM | {"embed_dim": 8}),
    "timm's ViT, packed SwiGLU": of_timm("vit_giant_patch14_reg4_dinov2", **TIMM),
    "EVA, gated": of_timm("eva02_tiny_patch14_224", **TIMM),
    "EVA, grouped queries": of_timm("vit_base_patch16_sapiens2", **TIMM, num_kv_heads=1, dynamic_img_size=False),
    "timm's Swin": of_timm(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 4)
    ),
    "CIFAR ResNet": of_timm("resnet20_cifar"),
    "ResNet-26": of_timm("resnet26", base_width=16),
}
"""Checkpoints whose configurations can say a smaller width."""

QUICK = {"ViT", "DINOv2", "DINOv2, gated", "timm's Swin", "EVA, grouped queries", "CIFAR ResNet"}

MORE: dict[str, Callable[[], Checkpoint]] = {
    "CLIP": of_tower("CLIPForImageClassification"),
    "DeiT": of_transformers("DeiTForImageClassification", **MLP),
    "BEiT": of_transformers("BeitForImageClassification", **MLP),
    "ViT-MSN": of_transformers("ViTMSNForImageClassification", **MLP),
    "DINOv2 with registers": of_transformers("Dinov2WithRegistersForImageClassification", **VIT, mlp_ratio=2),
    "DINOv3": of_transformers("DINOv3ViTModel", **MLP),
    "DINOv3, gated": of_transformers("DINOv3ViTModel", **MLP, use_gated_mlp=True),
    "AIMv2, gated": of_transformers("Aimv2VisionModel", **MLP),
    "SigLIP": of_tower("SiglipForImageClassification"),
    "SigLIP, pooled": of_transformers("SiglipVisionModel", **MLP),
    "Swin v2": of_transformers("Swinv2ForImageClassification", **SWIN),
    "Hiera": of_transformers("HieraForImageClassification", **HIERA),
    "timm's DeiT": of_timm("deit_tiny_distilled_patch16_224", **TIMM),
    "timm's BEiT": of_timm("beit_base_patch16_224", **TIMM),
    "EVA, gated in eights": of_timm("vit_small_plus_patch16_dinov3", **TIMM),
    "timm's AIMv2, gated": of_timm("aimv2_large_patch14_224", **TIMM),
    "timm's Swin v2": of_timm(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 4)
    ),
}

SIZES = {"ResNet-26": 64, "CIFAR ResNet": 32, "Hiera": 32, "timm's Swin": 32, "timm's Swin v2": 32}
"""Of images that are not of eight pixels."""


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
            model.get_parameter(slot.name)[:, gone.repeat_interleave(slot.each).repeat(slot.times)] = 0
    return model


def size_of(model: nn.Module, kept: dict[Width, torch.Tensor]) -> Size:
    width, units = next(iter(kept.items()))
    reads = model.get_parameter(width.makers[0].name).shape[1]
    stages = tuple(dict.fromkeys((width.units, len(units), width.makers[0].each) for width, units in kept.items()))
    return Size(width.units, len(units), width.makers[0].each, reads, stages)


def answer(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return next(iter(outputs_of(model, pixels).values()))


@torch.no_grad()
@pytest.mark.parametrize("name", rest_slow([*CHECKPOINTS, *MORE], QUICK))
def test_a_cut_network_computes_what_the_masked_one_does(name: str) -> None:
    checkpoint = {**CHECKPOINTS, **MORE}[name]()
    model, size = checkpoint.model, SIZES.get(name, 8)
    pixels = torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    chain = build_chain(model, pixels[:1])
    widths = widths_of(chain)
    said = [kind for kind in ("mlp", "heads", "channels") if kind != "heads" or name in HEADS]
    said = [kind for kind in said if any(width.kind == kind for width in widths)]
    assert said
    for kind in said:
        kept = kept_of(widths, kind, 0.5)
        sizes = {kind: size_of(model, kept)}
        smaller = resized(checkpoint, cut(model.state_dict(), kept), sizes, unread=unread(chain))
        masked, got = answer(without_reading(model, kept), pixels), answer(smaller.model, pixels)
        assert torch.allclose(got, masked, rtol=1e-9, atol=1e-9 * float(masked.abs().max()))
        assert not torch.allclose(masked, answer(model, pixels), rtol=1e-3)
        assert type(smaller.model) is type(model)


HEADS = {"ViT", "DINOv2", "DINOv2, gated", "DINOv2 with registers", "DeiT", "ViT-MSN", "timm's Swin"}
HEADS |= {"BEiT", "BEiT, tables of positions"}
"""Of these a configuration can say how many heads are left."""


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "ViT",
        "BEiT, tables of positions",
        "timm's Swin",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("DINOv2 with registers", "BEiT", "DeiT", "ViT-MSN")),
    ],
)
def test_heads_compute_the_same_in_other_bases_and_lose_ranks(name: str) -> None:
    checkpoint = {**CHECKPOINTS, **MORE}[name]()
    model, size, generator = checkpoint.model, SIZES.get(name, 8), torch.Generator().manual_seed(2)
    pixels = torch.randn(3, 3, size, size, dtype=torch.float64, generator=generator)
    chain, state = build_chain(model, pixels[:1]), dict(model.state_dict())
    widths = [width for width in widths_of(chain) if width.kind == "ranks"]
    assert widths
    for width in widths:
        shape = (2, width.readers[0].times, width.units, width.units)
        A, B = torch.randn(shape, generator=generator, dtype=torch.float64) + 3 * torch.eye(width.units)
        state |= turned(state, width, A, B)
    other, expected = copy.deepcopy(model), answer(model, pixels)
    other.load_state_dict(state)
    assert torch.allclose(answer(other, pixels), expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))

    kept = kept_of(widths, "ranks", 0.5)
    counts = {width: len(units) for width, units in kept.items()}
    smaller = resized(checkpoint, cut(rescaled(state, counts), kept), {"ranks": size_of(model, kept)})
    for width, units in kept.items():  # queries without these ranks leave the keys' unread
        gone = torch.ones(width.units, dtype=torch.bool).index_fill_(0, units, False)
        slot = width.makers[0]
        for tensor in [other.get_parameter(part.name) for part in (slot, *bias_of(width, slot))]:
            tensor[slot.offset : slot.offset + slot.times * width.units][gone.repeat(slot.times)] = 0
    masked, got = answer(without_reading(other, kept), pixels), answer(smaller.model, pixels)
    assert torch.allclose(got, masked, rtol=1e-8, atol=1e-8 * float(masked.abs().max()))
    assert not torch.allclose(masked, expected, rtol=1e-3)
    assert type(smaller.model) is type(model)


@pytest.mark.parametrize(
    "name", ["timm's BEiT", *(pytest.param(n, marks=pytest.mark.slow) for n in ("EVA, grouped queries", "one table"))]
)
def test_heads_that_cannot_go_alone_are_no_widths(name: str) -> None:
    """Keys of several queries, a table that all blocks share, a bias that is put together of two."""
    shared = of_transformers("BeitForImageClassification", **MLP, use_shared_relative_position_bias=True)
    model = {**CHECKPOINTS, **MORE, "one table": shared}[name]().model
    assert {width.kind for width in widths_of(build_chain(model, images(1)))} == {"mlp"}


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
        assert [width.kind for width in widths] == ["heads", "ranks", "mlp"] * 2
        assert {width.units for width in widths} == {2, widths[1].units, 12}
