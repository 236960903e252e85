"""Residual convolutional networks: transformers ResNet, timm ResNet (basic and bottleneck), CIFAR ResNet.

Operations of one unit (A.3.2): each convolution's output, each ReLU's output with the batch norm before it absorbed,
and the ReLU after the residual addition. A downsampling convolution on the shortcut is one more operation, right
before that addition. The stem stays dense, deep ones as a whole: three input channels divide by no M of interest, and
it holds few weights. So do the gates of squeeze-excitation, which act with the norm before the addition.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from transformers import ResNetForImageClassification

from .base import Group, Operation, State, check_kind, module_names, register
from .cifar_resnet import CifarResNet


Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Convolution:
    """A prunable convolution: its live name, and what maps its input to its output (n, channels, height, width)."""

    name: str
    apply: Function
    kind: str = "conv"

    @property
    def group(self) -> Group:
        return Group.of(self.name, self.kind)


@dataclass(frozen=True)
class Shortcut:
    """The residual path: ``before`` (parameter-free), an optional convolution, and ``after`` it (batch norm)."""

    before: Function
    convolution: Convolution | None = None
    after: Function = field(default_factory=nn.Identity)


def residual_unit(
    name: str,
    convolutions: Sequence[Convolution],
    afters: Sequence[Function],
    shortcut: Shortcut,
    activation: Function,
) -> Iterator[Operation]:
    """Operations of x → activation(afters[-1](conv(…afters[0](conv(x))…)) + shortcut(x)), x (n, c, h, w).

    Args:
        name: live name of the unit.
        convolutions: in order of use.
        afters: what follows each convolution: norm and activation; for the last one, the norm alone.
        shortcut: the residual path.
        activation: applied after the addition.
    """
    last = len(convolutions) - 1
    for i, (convolution, after) in enumerate(zip(convolutions, afters, strict=True)):
        # Operations keep their own convolution by default argument: the loop variables move on.
        def convolve(s: State, apply: Function = convolution.apply, first: bool = i == 0) -> State:
            return apply(s[0]), s[0] if first else s[1]

        def activate(s: State, after: Function = after) -> State:
            return after(s[0]), s[1]

        yield Operation(convolution.name, convolve, convolution.group)
        if i < last:
            yield Operation(f"{convolution.name} > activation", activate)

    norm = afters[-1]
    if shortcut.convolution is None:
        yield Operation(f"{name} > residual", lambda s: (activation(norm(s[0]) + shortcut.before(s[1])),))
        return
    downsample = shortcut.convolution

    def project(s: State) -> State:
        return downsample.apply(shortcut.before(s[1])), s[0]

    yield Operation(downsample.name, project, downsample.group)
    yield Operation(f"{name} > residual", lambda s: (activation(norm(s[1]) + shortcut.after(s[0])),))


@register(ResNetForImageClassification, family="resnet")
def transformers_resnet(model: Any) -> list[Operation]:
    """Operations of a transformers ResNet classifier."""
    base, names = model.resnet, module_names(model)
    stem = base.embedder.embedder
    operations = [
        Operation(names[stem.convolution], lambda s: (stem.convolution(s[0]),)),
        Operation(
            f"{names[stem.convolution]} > activation",
            lambda s: (base.embedder.pooler(stem.activation(stem.normalization(s[0]))),),
        ),
    ]
    for stage in base.encoder.stages:
        for unit in stage.layers:
            shortcut = Shortcut(unit.shortcut)
            if not isinstance(unit.shortcut, nn.Identity):
                conv = unit.shortcut.convolution
                shortcut = Shortcut(
                    nn.Identity(), Convolution(names[conv], conv, "downsample"), unit.shortcut.normalization
                )
            operations += residual_unit(
                names[unit],
                [Convolution(names[part.convolution], part.convolution) for part in unit.layer],
                [nn.Sequential(part.normalization, part.activation) for part in unit.layer],
                shortcut,
                unit.activation,
            )
    return [*operations, Operation("classifier", lambda s: (model.classifier(base.pooler(s[0])),))]


def _timm_shortcut(downsample: nn.Sequential | None, names: dict[nn.Module, str]) -> Shortcut:
    if downsample is None:
        return Shortcut(nn.Identity())
    parts = list(downsample)
    at = next(i for i, part in enumerate(parts) if isinstance(part, nn.Conv2d))
    conv = Convolution(names[parts[at]], parts[at], "downsample")
    return Shortcut(nn.Sequential(*parts[:at]), conv, nn.Sequential(*parts[at + 1 :]))


def _present(*modules: nn.Module | None) -> nn.Module:
    return nn.Sequential(*(module for module in modules if module is not None))


@register(ResNet, family="resnet")
def timm_resnet(model: Any) -> list[Operation]:
    """Operations of a timm ResNet of basic or bottleneck blocks (squeeze-excitation and anti-aliasing included)."""
    names = module_names(model)
    operations = [
        Operation("conv1", lambda s: (model.conv1(s[0]),)),
        Operation("conv1 > activation", lambda s: (model.maxpool(model.act1(model.bn1(s[0]))),)),
    ]
    for unit in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
        check_kind(unit, names[unit], BasicBlock, Bottleneck, model="ResNet")
        if isinstance(unit, BasicBlock):
            convs, last_act = [unit.conv1, unit.conv2], unit.act2
            afters = [_present(unit.bn1, unit.drop_block, unit.act1, unit.aa), _present(unit.bn2, unit.se)]
        else:
            convs, last_act = [unit.conv1, unit.conv2, unit.conv3], unit.act3
            afters = [
                _present(unit.bn1, unit.act1),
                _present(unit.bn2, unit.drop_block, unit.act2, unit.aa),
                _present(unit.bn3, unit.se),
            ]
        operations += residual_unit(
            names[unit],
            [Convolution(names[conv], conv) for conv in convs],
            afters,
            _timm_shortcut(unit.downsample, names),
            last_act,
        )
    return [*operations, Operation("fc", lambda s: (model.forward_head(s[0]),))]


@register(CifarResNet, family="cifar_resnet")
def cifar_resnet(model: Any) -> list[Operation]:
    """Operations of a CIFAR ResNet (He et al., section 4.2), whose shortcuts have no parameters."""
    names = module_names(model)
    operations = [
        Operation("conv1", lambda s: (model.conv1(s[0]),)),
        Operation("conv1 > activation", lambda s: (model.act1(model.bn1(s[0])),)),
    ]
    for unit in (*model.layer1, *model.layer2, *model.layer3):
        operations += residual_unit(
            names[unit],
            [Convolution(f"{names[unit]}.conv1", unit.conv1), Convolution(f"{names[unit]}.conv2", unit.conv2)],
            [nn.Sequential(unit.bn1, unit.act1), unit.bn2],
            Shortcut(unit.shortcut),
            unit.act2,
        )
    return [*operations, Operation("linear", lambda s: (model.forward_head(s[0]),))]
