"""Residual convolutional networks: transformers ResNet, timm ResNet (basic and bottleneck), CIFAR ResNet.

Operations of one unit (A.3.2): each convolution's output, each ReLU's output with the batch norm before it absorbed,
and the ReLU after the residual addition. A downsampling convolution on the shortcut is one more operation, right
before that addition. The stem stays dense, deep ones as a whole: three input channels divide by no M of interest, and
it holds few weights. So do the gates of squeeze-excitation, which act with the norm before the addition.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from transformers import ResNetForImageClassification

from .base import Group, Operation, check_kind, module_names, register
from .cifar_resnet import CifarResNet


Modules = Iterable[nn.Module | None]
"""One after the other; None is left out."""


def cut(modules: Modules) -> tuple[nn.Sequential, list[tuple[nn.Conv2d, nn.Sequential]]]:
    """What comes before the first convolution, and each convolution with what comes after it."""
    before, parts = nn.Sequential(), list[tuple[nn.Conv2d, nn.Sequential]]()
    for module in modules:
        if isinstance(module, nn.Conv2d):
            parts.append((module, nn.Sequential()))
        elif module is not None:
            (parts[-1][1] if parts else before).append(module)
    return before, parts


def residual_unit(
    names: dict[nn.Module, str], unit: nn.Module, branch: Modules, shortcut: Modules, activation: nn.Module
) -> Iterator[Operation]:
    """Operations of x → activation(branch(x) + shortcut(x)), x (n, channels, height, width).

    ``branch`` begins with a convolution, ``shortcut`` has one or none.
    """
    (first, after), *others = cut(branch)[1]
    yield Operation(names[first], lambda s: (first(s[0]), s[0]), Group.of(names[first], "conv"))
    name = names[first]
    for convolution, following in others:
        yield Operation.of(f"{name} > activation", after)
        name, after = names[convolution], following
        yield Operation.of(name, convolution, "conv")

    before, projections = cut(shortcut)
    if not projections:
        yield Operation(f"{names[unit]} > residual", lambda s: (activation(after(s[0]) + before(s[1])),))
        return
    ((projection, norm),) = projections
    name = names[projection]
    yield Operation(name, lambda s: (projection(before(s[1])), s[0]), Group.of(name, "downsample"))
    yield Operation(f"{names[unit]} > residual", lambda s: (activation(after(s[1]) + norm(s[0])),))


@register(ResNetForImageClassification, family="resnet")
def transformers_resnet(model: Any) -> Iterator[Operation]:
    base, names = model.resnet, module_names(model)
    stem, name = base.embedder.embedder, names[base.embedder.embedder.convolution]
    yield Operation.of(name, stem.convolution)
    yield Operation.of(f"{name} > activation", lambda x: base.embedder.pooler(stem.activation(stem.normalization(x))))
    for stage in base.encoder.stages:
        for unit in stage.layers:
            branch = [module for part in unit.layer for module in part.children()]
            shortcut = list(unit.shortcut.children())  # none of an identity
            yield from residual_unit(names, unit, branch, shortcut, unit.activation)
    yield Operation.of("classifier", lambda x: model.classifier(base.pooler(x)))


def _timm_unit(unit: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    check_kind(unit, names[unit], BasicBlock, Bottleneck, model="ResNet")
    shortcut: Modules = unit.downsample or ()
    if isinstance(unit, BasicBlock):
        branch = [unit.conv1, unit.bn1, unit.drop_block, unit.act1, unit.aa, unit.conv2, unit.bn2, unit.se]
        return residual_unit(names, unit, branch, shortcut, unit.act2)
    branch = [unit.conv1, unit.bn1, unit.act1, unit.conv2, unit.bn2, unit.drop_block, unit.act2, unit.aa]
    return residual_unit(names, unit, [*branch, unit.conv3, unit.bn3, unit.se], shortcut, unit.act3)


@register(ResNet, family="resnet")
def timm_resnet(model: Any) -> Iterator[Operation]:
    """Operations of a timm ResNet of basic or bottleneck blocks (squeeze-excitation and anti-aliasing included)."""
    names = module_names(model)
    yield Operation.of("conv1", model.conv1)
    yield Operation.of("conv1 > activation", lambda x: model.maxpool(model.act1(model.bn1(x))))
    for unit in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
        yield from _timm_unit(unit, names)
    yield Operation.of("fc", model.forward_head)


@register(CifarResNet, family="cifar_resnet")
def cifar_resnet(model: Any) -> Iterator[Operation]:
    """Operations of a CIFAR ResNet (He et al., section 4.2), whose shortcuts have no parameters."""
    names = module_names(model)
    yield Operation.of("conv1", model.conv1)
    yield Operation.of("conv1 > activation", lambda x: model.act1(model.bn1(x)))
    for unit in (*model.layer1, *model.layer2, *model.layer3):
        yield from _timm_unit(unit, names)
    yield Operation.of("linear", model.forward_head)
