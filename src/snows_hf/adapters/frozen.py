"""The state in which a model is differentiated: everything still but the weights that are solved for.

Autograd's second-order rules for convolutions and batch norms also compute what nobody asked for (of a convolution the
gradients of its input and weight, of a norm its batch statistics'), at more than the cost of the product itself. Here
a convolution is a bilinear map of input and weight, with its two transposes, and a batch norm in evaluation mode an
affine map.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import Function


def _asked(ctx: Any) -> list[bool]:
    """Of a function's inputs, those whose gradients this very backward pass is for; ``needs_input_grad`` also has
    those that another pass may be for."""
    return [
        node is not None and (hasattr(node, "variable") or torch._C._will_engine_execute_node(node))  # leaves: always
        for node, _ in ctx.next_functions
    ]


@dataclass(frozen=True)
class Blank:
    """What must be known of a tensor where its values are not."""

    shape: torch.Size
    layout: torch.memory_format

    @classmethod
    def of(cls, x: Tensor) -> "Blank":
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return cls(x.shape, torch.channels_last if channels_last else torch.contiguous_format)

    def filled(self, like: Tensor) -> Tensor:
        return torch.empty(self.shape, dtype=like.dtype, device=like.device, memory_format=self.layout)


def _transposed(g: Tensor, x: Tensor, weight: Tensor, conv: nn.Conv2d, which: int) -> Tensor:
    """⟨g, conv(x, weight)⟩ differentiated by x (0) or by weight (1); the values of that one are not read."""
    mask = [which == 0, which == 1, False]
    places = conv.stride, conv.padding, conv.dilation
    gradients = torch.ops.aten.convolution_backward(g, x, weight, None, *places, False, (0, 0), conv.groups, mask)
    gradient: Tensor = gradients[which]
    return gradient


class Convolution(Function):
    """x, w → conv(x, w) without its bias; like its two transposes differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: nn.Conv2d) -> Tensor:
        ctx.conv, ctx.blank = conv, Blank.of(x)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # what is not saved may be freed
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, weight), (of_x, of_weight) = gradients, ctx.saved_tensors, _asked(ctx)
        return (
            InputGradient.apply(g, weight, ctx.blank, ctx.conv) if of_x else None,
            WeightGradient.apply(g, x, Blank.of(weight), ctx.conv) if of_weight else None,
            None,
        )


class InputGradient(Function):
    """g, w → the gradient of ⟨g, conv(x, w)⟩ in x, which looks like ``blank``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, blank: Blank, conv: nn.Conv2d) -> Tensor:
        ctx.conv = conv
        ctx.save_for_backward(g if ctx.needs_input_grad[1] else None, weight)
        return _transposed(g, blank.filled(g), weight, conv, 0)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        (t,), (g, weight), (of_g, of_weight) = tangents, ctx.saved_tensors, _asked(ctx)
        return (
            Convolution.apply(t, weight, ctx.conv) if of_g else None,
            WeightGradient.apply(g, t, Blank.of(weight), ctx.conv) if of_weight else None,
            None,
            None,
        )


class WeightGradient(Function):
    """g, x → the gradient of ⟨g, conv(x, w)⟩ in w, which looks like ``blank``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, blank: Blank, conv: nn.Conv2d) -> Tensor:
        ctx.conv = conv
        ctx.save_for_backward(g, x)
        return _transposed(g, x, blank.filled(x), conv, 1)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        (t,), (g, x), (of_g, of_x) = tangents, ctx.saved_tensors, _asked(ctx)
        return (
            Convolution.apply(x, t, ctx.conv) if of_g else None,
            InputGradient.apply(g, t, Blank.of(x), ctx.conv) if of_x else None,
            None,
            None,
        )


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    weight: Tensor = conv.weight
    # Autocast's own casts would end at this function's border.
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    z: Tensor = Convolution.apply(x, weight, conv)
    return z if conv.bias is None else z + conv.bias[:, None, None]


def _normalise(norm: Any) -> Any:
    """A batch norm's evaluation-mode forward as x → x·scale + shift, its constants computed once."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    scale, shift = scale[:, None, None], shift[:, None, None]

    def affine(x: Tensor) -> Tensor:
        return torch.addcmul(shift.to(x.device), x, scale.to(x.device))  # elsewhere where the model is offloaded

    if isinstance(norm, BatchNormAct2d):
        return lambda x: norm.act(norm.drop(affine(x)))
    return affine


def _simpler_forward(module: nn.Module) -> Any:
    """What may stand for the module's ``forward`` while the model is frozen; None where nothing does."""
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return partial(_convolve, module)
    if type(module) in (nn.BatchNorm2d, BatchNormAct2d) and isinstance(module.running_mean, Tensor):
        # In half precision the constants would be rounded once more.
        return _normalise(module) if module.running_mean.dtype in (torch.float32, torch.float64) else None
    return None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """For the time of the block: evaluation mode, no parameter gradients, no in-place activations, no fused attention.

    In-place ReLUs would overwrite outputs that the objective still compares, and fused attention (timm's attention
    pooling has it in the head) has no second derivative. Buffers of batch norms, and weights and biases other than
    those replaced by a functional call, are constants. Everything is put back afterwards.
    """
    training = {module: module.training for module in model.modules()}
    switches = [
        (module, switch)
        for module in model.modules()
        for switch in ("inplace", "fused_attn")
        if getattr(module, switch, False) is True
    ]
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    simpler = {module: forward for module in model.modules() if (forward := _simpler_forward(module)) is not None}
    for module, switch in switches:
        setattr(module, switch, False)
    for module, forward in simpler.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in simpler:
            del module.forward
        for module, switch in switches:
            setattr(module, switch, True)
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)
