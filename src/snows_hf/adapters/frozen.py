"""What an operation is differentiated through: everything still but the weights that are solved for.

Autograd's second-order rules for convolutions and batch norms also compute what nobody asked for (of a convolution the
gradients of its input and weight, of a norm its batch statistics'), at more than the cost of the product itself. Here
a convolution is a bilinear map of input and weight, with its two transposes, and a batch norm in evaluation mode an
affine map.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


Blank = tuple[torch.Size, torch.memory_format]
"""What must be known of a tensor where its values are not."""


OTHERS = {0: (1, 2), 1: (0, 2), 2: (0, 1)}


def _blank(x: Tensor) -> Blank:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return x.shape, torch.channels_last if channels_last else torch.contiguous_format


class Convolution(Function):
    """The trilinear form ⟨z, conv(x, w)⟩ differentiated by one of z (0), x (1) and w (2), at the other two: the
    convolution without its bias, or one of its two transposes; each differentiates into the others, to any order."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, place: int, conv: nn.Conv2d, blanks: dict[int, Blank]) -> Tensor:
        """The derivative by ``place``, which looks like its blank, of the values of the other two, in their order."""
        ctx.place, ctx.conv, ctx.blanks = place, conv, blanks
        # What is not needed is not saved, and may be freed.
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        if place == 0:
            return F.conv2d(a, b, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        shape, layout = blanks[place]
        blank = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=layout)
        given = (a, blank, b) if place == 1 else (a, b, blank)
        places, mask = (conv.stride, conv.padding, conv.dilation), [place == 1, place == 2, False]
        gradients = torch.ops.aten.convolution_backward(*given, None, *places, False, (0, 0), conv.groups, mask)
        return gradients[place - 1]

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        p, (i, j), (a, b), (t,) = ctx.place, OTHERS[ctx.place], ctx.saved_tensors, tangents
        # Those whose gradients this very backward pass is for; ``needs_input_grad`` also has those that another may be
        # for. Leaves: always.
        of_a, of_b = (
            node is not None and (hasattr(node, "variable") or torch._C._will_engine_execute_node(node))
            for node, _ in ctx.next_functions[:2]
        )
        return (
            Convolution.apply(*((t, b) if p < j else (b, t)), i, ctx.conv, ctx.blanks) if of_a else None,
            Convolution.apply(*((t, a) if p < i else (a, t)), j, ctx.conv, ctx.blanks) if of_b else None,
            *(None, None, None),
        )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Any) -> Tensor:
    """A convolution of images x (n, c, h, w); ``conv`` has its stride, padding, dilation and groups."""
    # Autocast's own casts would end at this function's border.
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    z: Tensor = Convolution.apply(x, weight, 0, conv, {1: _blank(x), 2: _blank(weight)})
    return z if bias is None else z + bias[:, None, None]


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """A batch norm's evaluation mode on x (n, c, …), as x·scale + shift."""
    wide = torch.promote_types(var.dtype, torch.float32)
    scale = (var.to(wide) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (-1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(shape), x.to(wide), scale.view(shape)).to(x.dtype)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """For the time of the block: evaluation mode, and no parameter has gradients, so that weights and biases are
    constants but for those replaced by a functional call. Everything is put back afterwards."""
    switches: list[tuple[Any, str]] = [(module, "training") for module in model.modules() if module.training]
    switches += [(parameter, "requires_grad") for parameter in model.parameters() if parameter.requires_grad]
    for owner, switch in switches:
        setattr(owner, switch, False)
    try:
        yield
    finally:
        for owner, switch in switches:
            setattr(owner, switch, True)
