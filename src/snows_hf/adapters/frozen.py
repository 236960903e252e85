"""The state in which a model is differentiated: everything still but the weights that are solved for.

Autograd's second-order rules for convolutions and batch norms also compute what a frozen network has no use for (a
weight gradient per convolution, batch statistics per norm), at more than the cost of the product itself. Here a frozen
convolution is a linear map that knows its transpose, and a batch norm in evaluation mode an affine one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd import Function


class Convolution(Function):
    """x → conv(x) for a convolution whose weight and bias are constants; differentiable in x to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: nn.Conv2d) -> Tensor:
        ctx.conv, ctx.shape = conv, x.shape
        ctx.layout = (
            torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return Transpose.apply(gradients[0], ctx.conv, ctx.shape, ctx.layout), None


class Transpose(Function):
    """The transpose of a convolution's linear part: gradients of its output → gradients of its input of ``shape``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, conv: nn.Conv2d, shape: torch.Size, layout: torch.memory_format) -> Tensor:
        ctx.conv = conv
        return torch.ops.aten.convolution_backward(
            g,
            torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout),  # its values are not read
            conv.weight,
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            (0, 0),
            conv.groups,
            (True, False, False),
        )[0]

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor, None, None, None]:
        conv = ctx.conv
        v = F.conv2d(tangents[0], conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return v, None, None, None


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    # The layer that is solved for has its own, differentiable weight put in place of the constant one.
    return nn.Conv2d.forward(conv, x) if conv.weight.requires_grad else Convolution.apply(x, conv)


def _normalise(norm: Any) -> Any:
    """A batch norm's evaluation-mode forward as x → x·scale + shift, its constants computed once."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    scale, shift = scale[:, None, None], shift[:, None, None]
    if isinstance(norm, BatchNormAct2d):
        return lambda x: norm.act(norm.drop(torch.addcmul(shift, x, scale)))
    return lambda x: torch.addcmul(shift, x, scale)


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
