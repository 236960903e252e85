"""MobileNetV1 (timm): depthwise and pointwise convolutions, each followed by batch norm and ReLU.

A depthwise weight has one input channel per filter: N:M does not fit it, and it is reported as left dense;
unstructured pruning reaches it.
"""

from collections.abc import Iterator
from typing import Any

from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from timm.models.efficientnet import EfficientNet
from torch import nn

from ..errors import AdapterError
from .base import Group, Operation, module_names, register


def _separable(block: Any, name: str) -> Iterator[Operation]:
    kind: type = type(block)
    if kind is not DepthwiseSeparableConv or block.conv_s2d is not None:
        raise AdapterError(
            f"{name} is a {type(block).__name__}; expected timm's DepthwiseSeparableConv (MobileNetV1).",
            "Other networks of timm's EfficientNet family have no adapter yet.",
        )
    depthwise, pointwise = f"{name}.conv_dw", f"{name}.conv_pw"
    shortcut = slice(1 if block.has_skip else 0)  # the block's input goes on only where it is read again
    yield Operation(depthwise, lambda s: (block.conv_dw(s[0]), *s[shortcut]), Group.of(depthwise, "depthwise"))
    yield Operation.of(f"{depthwise} > activation", lambda x: block.se(block.aa(block.bn1(x))))
    yield Operation.of(pointwise, block.conv_pw, "pointwise")
    yield Operation(f"{pointwise} > activation", lambda s: (sum(s[1:], block.bn2(s[0])),))


@register(EfficientNet, family="mobilenet")
def mobilenet(model: Any) -> Iterator[Operation]:
    names = module_names(model)
    yield Operation.of("conv_stem", model.conv_stem)
    yield Operation.of("conv_stem > activation", model.bn1)
    for stage in model.blocks:
        for block in stage:
            yield from _separable(block, names[block])
    if isinstance(model.conv_head, nn.Conv2d):  # mobilenetv1_100h: one more pointwise convolution before pooling
        yield Operation.of("conv_head", model.conv_head, "pointwise")
        yield Operation.of("conv_head > activation", model.bn2)
    yield Operation.of("classifier", model.forward_head)
