"""Attention written out, and recorded where it is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale·q kᵀ + bias) v for (n, …, heads, tokens, d), heads merged to (n, …, tokens, heads·d).

    Written out because fused attention has neither a double backward nor a forward-mode rule.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
    if (record := _RECORD.get()) is not None:
        record.append(weights)
    return (weights @ v).transpose(-3, -2).flatten(-2)


def split_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (n, …, heads, tokens, d) of a transformers attention, from tokens (n, …, tokens, width)."""
    q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    return tuple(each.unflatten(-1, (-1, attn.head_dim)).transpose(-3, -2) for each in (q, k, v))


def split_qkv(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (n, …, heads, tokens, d) of timm's joint ones, (n, …, tokens, 3·heads·d)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2)
    return q, k, v
