"""ConvNeXt, first and second version (transformers and timm).

Operations of one block: the depthwise convolution, MLP0 with the norm before it absorbed, the activation, and the
residual stream after MLP3 (ConvNeXt V2's response normalisation and the layer scale included). Between stages, a
downsampling convolution with the norm before it. N:M does not fit the depthwise weights, which have one input channel.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from timm.layers import GlobalResponseNormMlp, Mlp
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from transformers import ConvNextForImageClassification, ConvNextV2ForImageClassification

from .base import Group, Operation, check_kind, module_names, register


Function = Callable[[Tensor], Tensor]


def _block(
    names: dict[nn.Module, str],
    depthwise: nn.Module,
    norm: Function,
    mlp0: nn.Module,
    activation: Function,
    mlp3: nn.Module,
    before_mlp3: Function,
    finish: Function,
    shortcut: Function,
) -> Iterator[Operation]:
    """x → finish(mlp3(before_mlp3(activation(mlp0(norm(depthwise(x))))))) + shortcut(x), x (n, c, h, w)."""
    names_of = [names[module] for module in (depthwise, mlp0, mlp3)]
    yield Operation(names_of[0], lambda s: (depthwise(s[0]), s[0]), Group.of(names_of[0], "depthwise"))
    yield Operation(names_of[1], lambda s: (mlp0(norm(s[0])), s[1]), Group.of(names_of[1], "mlp0"))
    yield Operation(f"{names_of[1]} > activation", lambda s: (activation(s[0]), s[1]))
    yield Operation(
        f"{names_of[2]} > residual",
        lambda s: (finish(mlp3(before_mlp3(s[0]))) + shortcut(s[1]),),
        Group.of(names_of[2], "mlp3"),
    )


def _downsampling(parts: Iterable[nn.Module], names: dict[nn.Module, str]) -> Operation:
    norm, conv = parts
    return Operation(names[conv], lambda s: (conv(norm(s[0])),), Group.of(names[conv], "downsample"))


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _transformers_block(layer: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    def finish(x: Tensor) -> Tensor:
        scale = getattr(layer, "layer_scale_parameter", None)
        return _channels_first(x if scale is None else scale * x)

    return _block(
        names,
        layer.dwconv,
        lambda x: layer.layernorm(_channels_last(x)),
        layer.pwconv1,
        layer.act,
        layer.pwconv2,
        getattr(layer, "grn", nn.Identity()),
        finish,
        nn.Identity(),
    )


@register(ConvNextForImageClassification, ConvNextV2ForImageClassification, family="vit")
def transformers_convnext(model: Any) -> list[Operation]:
    """Operations of a transformers ConvNeXt classifier."""
    base, names = model.base_model, module_names(model)
    operations = [Operation(names[base.embeddings], lambda s: (base.embeddings(s[0]),))]
    for stage in base.encoder.stages:
        if len(stage.downsampling_layer):
            operations.append(_downsampling(stage.downsampling_layer, names))
        for layer in stage.layers:
            operations += _transformers_block(layer, names)
    return [
        *operations,
        Operation("classifier", lambda s: (model.classifier(base.layernorm(s[0].mean((-2, -1)))),)),
    ]


def _timm_block(block: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    mlp = block.mlp
    check_kind(mlp, names[mlp], Mlp, GlobalResponseNormMlp, model="ConvNeXt")

    def norm(x: Tensor) -> Tensor:
        return block.norm(x if block.use_conv_mlp else _channels_last(x))

    def finish(x: Tensor) -> Tensor:
        x = x if block.use_conv_mlp else _channels_first(x)
        return x if block.gamma is None else x * block.gamma[:, None, None]

    before_mlp3 = mlp.grn if isinstance(mlp, GlobalResponseNormMlp) else mlp.norm
    return _block(names, block.conv_dw, norm, mlp.fc1, mlp.act, mlp.fc2, before_mlp3, finish, block.shortcut)


@register(ConvNeXt, family="vit")
def timm_convnext(model: Any) -> list[Operation]:
    """Operations of a timm ConvNeXt."""
    names = module_names(model)
    operations = [Operation("stem", lambda s: (model.stem(s[0]),))]
    for stage in model.stages:
        if not isinstance(stage.downsample, nn.Identity):
            operations.append(_downsampling(stage.downsample, names))
        for block in stage.blocks:
            operations += _timm_block(block, names)
    return [*operations, Operation("head", lambda s: (model.forward_head(model.norm_pre(s[0])),))]
