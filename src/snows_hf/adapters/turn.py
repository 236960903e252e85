"""Attention in other bases: queries and keys, and values, may be told in any, head by head, and nothing changes.

    q' = A q,  k' = A⁻ᵀ k       since q'ᵀ k' = qᵀ k
    v' = B v,  out' = out B⁻¹   since attention mixes positions, not dimensions

In a basis whose last dimensions hardly count these can go: ranks, of which a width of that kind is made (widths.py).
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .widths import Slot, Width


def turned(state: Mapping[str, Tensor], width: Width, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The tensors of an attention, by name, with its heads in other bases; in their own types.

    Args:
        state: a model's tensors, by name.
        width: of its ranks.
        A, B: (heads, d, d), invertible, in float64.
    """
    found: dict[str, Tensor] = {}
    for slot, basis in zip(width.makers, (A, torch.linalg.inv(A).mT, B), strict=True):
        for own in (slot, *bias_of(width, slot)):
            tensor = found.setdefault(own.name, state[own.name].detach().double().clone())
            part = own.part(tensor, width.units)
            part.copy_((basis @ part.reshape(own.times, width.units, -1)).view_as(part))
    (reader,) = width.readers
    out = state[reader.name].detach().double().unflatten(1, (reader.times, width.units))
    found[reader.name] = torch.einsum("rhd,hde->rhe", out, torch.linalg.inv(B)).flatten(1)
    return {name: tensor.to(state[name]) for name, tensor in found.items()}


def bias_of(width: Width, maker: Slot) -> list[Slot]:
    """Where the bias of what makes queries, keys or values is, if there is one."""
    name = f"{maker.name.removesuffix('weight')}bias"
    return [slot for slot in width.along if slot.name == name and slot.offset == maker.offset]


def random_bases(state: Mapping[str, Tensor], widths: Iterable[Width]) -> dict[str, Tensor]:
    """:func:`turned` at random, of the attentions whose ranks these widths are, in float32; orthonormal, so that no
    digits go."""
    generator, found = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for width in widths:
        shape = (2, width.readers[0].times, width.units, width.units)
        A, B = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
        found |= turned({slot.name: state[slot.name].float() for slot in width.slots}, width, A, B)
    return found


def without_ranks(state: Mapping[str, Tensor], kept: Mapping[Width, Tensor]) -> dict[str, Tensor]:
    """Queries and keys, by name, that have zeros in place of the ranks that are not ``kept``."""
    found: dict[str, Tensor] = {}
    for width, units in kept.items():
        for maker in width.makers[:2] if width.kind == "ranks" else ():
            for slot in (maker, *bias_of(width, maker)):
                tensor = found.setdefault(slot.name, state[slot.name].detach().clone())
                gone = ~slot.entries(width.marked(units))
                slot.part(tensor, width.units)[gone.to(tensor.device)] = 0
    return found


def rescaled(state: Mapping[str, Tensor], keep: Mapping[Width, int]) -> dict[str, Tensor]:
    """A model's tensors with queries that make up for the factor of products, 1/√d, once there are fewer ranks d."""
    scaled = dict(state)
    for width, count in keep.items():
        for slot in (width.makers[0], *bias_of(width, width.makers[0])) if width.kind == "ranks" else ():
            tensor = scaled[slot.name] = scaled[slot.name].detach().clone()
            slot.part(tensor, width.units).mul_(math.sqrt(count / width.units))
    return scaled
