"""ConvNeXt, first and second version (transformers and timm).

Operations of one block: the depthwise convolution, MLP0 with the norm before it absorbed, the activation, and the
residual stream after MLP3 (ConvNeXt V2's response normalisation and the layer scale included). Between stages, a
downsampling convolution with the norm before it. N:M does not fit the depthwise weights, which have one input channel.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from timm.layers import GlobalResponseNormMlp, Mlp
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from transformers import ConvNextForImageClassification, ConvNextV2ForImageClassification

from .base import Function, Group, Operation, check_kind, module_names, register


def _block(
    names: dict[nn.Module, str],
    layers: tuple[nn.Module, nn.Module, nn.Module],
    norm: Function,
    activation: Function,
    between: Function,
    finish: Function,
    shortcut: Function,
) -> Iterator[Operation]:
    """x → finish(mlp3(between(activation(mlp0(norm(depthwise(x))))))) + shortcut(x), x (n, c, h, w), with the
    ``layers`` depthwise, mlp0 and mlp3."""
    depthwise, mlp0, mlp3 = layers
    first, second, third = (names[layer] for layer in layers)
    yield Operation(first, lambda s: (depthwise(s[0]), s[0]), Group.of(first, "depthwise"))
    yield Operation.of(second, lambda x: mlp0(norm(x)), "mlp0")
    yield Operation.of(f"{second} > activation", activation)
    yield Operation(
        f"{third} > residual", lambda s: (finish(mlp3(between(s[0]))) + shortcut(s[1]),), Group.of(third, "mlp3")
    )


def _downsampling(parts: Iterable[nn.Module], names: dict[nn.Module, str]) -> Operation:
    norm, conv = parts
    return Operation.of(names[conv], lambda x: conv(norm(x)), "downsample")


def _transformers_block(layer: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    def finish(x: Tensor) -> Tensor:
        scale = getattr(layer, "layer_scale_parameter", None)
        return (x if scale is None else scale * x).movedim(-1, 1)

    def norm(x: Tensor) -> Tensor:
        return layer.layernorm(x.movedim(1, -1))

    layers, between = (layer.dwconv, layer.pwconv1, layer.pwconv2), getattr(layer, "grn", nn.Identity())
    return _block(names, layers, norm, layer.act, between, finish, nn.Identity())


@register(ConvNextForImageClassification, ConvNextV2ForImageClassification, family="vit")
def transformers_convnext(model: Any) -> Iterator[Operation]:
    base, names = model.base_model, module_names(model)
    yield Operation.of(names[base.embeddings], base.embeddings)
    for stage in base.encoder.stages:
        if len(stage.downsampling_layer):
            yield _downsampling(stage.downsampling_layer, names)
        for layer in stage.layers:
            yield from _transformers_block(layer, names)
    yield Operation.of("classifier", lambda x: model.classifier(base.layernorm(x.mean((-2, -1)))))


def _timm_block(block: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    mlp = block.mlp
    check_kind(mlp, names[mlp], Mlp, GlobalResponseNormMlp, model="ConvNeXt")

    def norm(x: Tensor) -> Tensor:
        return block.norm(x if block.use_conv_mlp else x.movedim(1, -1))

    def finish(x: Tensor) -> Tensor:
        x = x if block.use_conv_mlp else x.movedim(-1, 1)
        return x if block.gamma is None else x * block.gamma[:, None, None]

    between = mlp.grn if isinstance(mlp, GlobalResponseNormMlp) else mlp.norm
    return _block(names, (block.conv_dw, mlp.fc1, mlp.fc2), norm, mlp.act, between, finish, block.shortcut)


@register(ConvNeXt, family="vit")
def timm_convnext(model: Any) -> Iterator[Operation]:
    names = module_names(model)
    yield Operation.of("stem", model.stem)
    for stage in model.stages:
        if not isinstance(stage.downsample, nn.Identity):
            yield _downsampling(stage.downsample, names)
        for block in stage.blocks:
            yield from _timm_block(block, names)
    yield Operation.of("head", lambda x: model.forward_head(model.norm_pre(x)))
