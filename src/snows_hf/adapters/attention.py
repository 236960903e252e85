"""Attention written out, and recorded where it is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


_RECORD: ContextVar[list[Tensor] | None] = ContextVar("_RECORD", default=None)


@contextmanager
def recorded_attention() -> Iterator[list[Tensor]]:
    """For the time of the block, the attention probabilities (n, …, heads, tokens, tokens) of every transformer block
    that is run through its chain are appended to the list, whatever the architecture."""
    record: list[Tensor] = []
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def note_attention(weights: Tensor) -> Tensor:
    """The probabilities, noted where that is asked for, and every token attends to every token."""
    if (record := _RECORD.get()) is not None and weights.shape[-1] == weights.shape[-2]:
        record.append(weights)
    return weights


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale·q kᵀ + mask) v for (…, heads, tokens, d), as torch's ``scaled_dot_product_attention``.

    Written out because the fused form has neither a double backward nor a forward-mode rule.
    """
    if enable_gqa:
        k, v = (each.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for each in (k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.ones_like(scores, dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return note_attention(scores.softmax(-1)) @ v
