"""Coupled widths of networks that hypothesis makes up: of any width, with and without biases, gated, with grouped
queries, with grouped and depthwise convolutions. What is cut computes what the masked network does, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from test_widths import answer, kept_of, without_reading
from tiny import images, randomised
from torch import Tensor, nn

from snows_hf.adapters import build_chain
from snows_hf.adapters.widths import Width, cut, unread, widths_of
from snows_hf.hub.custom import narrow


class Attention(nn.Module):
    """Queries of ``num_heads`` heads, of which several share the keys and values of one."""

    def __init__(self, num_heads: int, sharing: int, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.sharing = num_heads, sharing
        self.q = nn.Linear(12, 2 * num_heads, bias=bias)
        self.k, self.v = (nn.Linear(12, 2 * num_heads // sharing, bias=bias) for _ in range(2))
        self.out = nn.Linear(2 * num_heads, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.sharing > 1:
            k, v = (part.repeat_interleave(self.sharing, 1) for part in (k, v))
        found: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class Mlp(nn.Module):
    def __init__(self, hidden: int, gate: str, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(12, 2 * hidden if gate == "packed" else hidden, bias=bias)
        self.gate = nn.Linear(12, hidden, bias=bias) if gate == "apart" else None
        self.down, self.packed = nn.Linear(hidden, 12, bias=bias), gate == "packed"

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.packed:
            gate, up = up.chunk(2, dim=-1)
            up = F.silu(gate) * up
        else:
            up = F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up
        found: Tensor = self.down(up)
        return found


class Transformer(nn.Module):
    def __init__(self, attention: Attention, mlp: Mlp) -> None:
        super().__init__()
        self.stem, self.attention, self.mlp, self.head = nn.Conv2d(3, 12, 4, 4), attention, mlp, nn.Linear(12, 3)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        found: Tensor = self.head(x.mean(1))
        return found


class Bottleneck(nn.Module):
    def __init__(self, inner: int, groups: int, bias: bool, norm: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        self.conv1 = nn.Conv2d(8, inner, 1, bias=bias)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=bias)
        self.conv3 = nn.Conv2d(inner, 8, 1, bias=bias)
        self.norm1, self.norm2 = (nn.BatchNorm2d(inner) if norm else nn.Identity() for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        found: Tensor = self.head(F.relu(x + self.conv3(y)).mean((2, 3)))
        return found


@torch.no_grad()
def check_cut(model: nn.Module, widths: list[Width], kind: str, share: float) -> None:
    kept, pixels = kept_of(widths, kind, share), images(3, seed=1)
    masked = answer(without_reading(model, kept), pixels)
    smaller: Any = cut(model.state_dict(), kept)
    narrow(model, {name: tensor.shape for name, tensor in smaller.items()})
    model.load_state_dict(smaller)
    assert torch.allclose(answer(model, pixels), masked, rtol=1e-9, atol=1e-9 * float(masked.abs().max()))


@pytest.mark.parametrize("gate, sharing", [("", 1), ("apart", 2), ("packed", 1)])
@settings(max_examples=2, deadline=None, derandomize=True)
@given(hidden=st.integers(2, 9), bias=st.booleans(), heads=st.sampled_from([2, 4, 6]), data=st.data())
def test_transformers(gate: str, sharing: int, hidden: int, bias: bool, heads: int, data: st.DataObject) -> None:
    model = randomised(Transformer(Attention(heads, sharing, bias), Mlp(hidden, gate, bias)), seed=0)
    widths = widths_of(build_chain(model, images(1)))
    found = {width.kind: width for width in widths}
    assert len(found) == len(widths) and found["mlp"].units == hidden
    assert len(found["mlp"].makers) == (1 if gate == "" else 2)
    assert ("heads" in found) == (sharing == 1), "a head of keys that several queries read cannot go with one of them"
    for kind, units in [("mlp", hidden), *([("heads", heads)] if sharing == 1 else [])]:
        check_cut(model, widths, kind, data.draw(st.integers(1, units - 1)) / units)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    inner=st.sampled_from([4, 6, 10]), grouping=st.sampled_from(["", "pairs", "depthwise"]), bias=st.booleans(),
    norm=st.booleans(), data=st.data(),
)  # fmt: skip
def test_convolutions(inner: int, grouping: str, bias: bool, norm: bool, data: st.DataObject) -> None:
    groups = {"": 1, "pairs": 2, "depthwise": inner}[grouping]
    model = randomised(Bottleneck(inner, groups, bias, norm), seed=0)
    widths = widths_of(build_chain(model, images(1)))
    assert [width.kind for width in widths] == ["channels"] * {"": 2, "pairs": 0, "depthwise": 1}[grouping]
    assert {width.units for width in widths} <= {inner}
    if widths:
        check_cut(model, widths, "channels", data.draw(st.integers(1, inner - 1)) / inner)


def test_parameters_that_no_output_reads() -> None:
    """They may become smaller with the others, which a classifier without its tower's pooling asks for."""
    model = Transformer(Attention(2, 1, True), Mlp(4, "", True))
    model.pooling = nn.Linear(12, 12)
    assert unread(build_chain(randomised(model, seed=0), images(1))) == {"pooling.weight", "pooling.bias"}
