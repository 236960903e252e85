"""Patterns against brute force over groups and over sorted lists."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, nn

from snows_hf.errors import ConfigError, PatternError
from snows_hf.patterns import NM, Unstructured, parse_pattern


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(scores: Tensor, n: int, m: int) -> Tensor:
    """For every output and kernel position, for every m consecutive inputs: the n whose scores sum highest."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    outer = [range(size) for axis, size in enumerate(scores.shape) if axis != 1]
    for where in itertools.product(*outer):
        for start in range(0, scores.shape[1], m):
            columns = range(start, start + m)

            def at(column: int, where: tuple[int, ...] = where) -> tuple[int, ...]:
                return (where[0], column, *where[1:])

            # max takes the first of equals, and combinations come with earlier columns first.
            best = max(itertools.combinations(columns, n), key=lambda kept: math.fsum(scores[at(c)] for c in kept))
            for column in best:
                mask[at(column)] = True
    return mask


@st.composite
def layers(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """Shape, N and M of a Linear, a Conv2d, or a grouped Conv2d (whose weight has in / groups columns)."""
    m = draw(st.integers(2, 6))
    n = draw(st.integers(1, m - 1))
    rows, blocks, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width = blocks * m
    layer = draw(st.sampled_from(["linear", "conv", "grouped conv"]))
    if layer == "linear":
        return tuple(nn.Linear(width, rows).weight.shape), n, m
    kernel = draw(st.sampled_from([1, 2, (1, 3)]))
    if layer == "conv":
        groups = 1
    return tuple(nn.Conv2d(width * groups, rows * groups, kernel, groups=groups).weight.shape), n, m


@given(layer=layers(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_nm_mask_equals_brute_force(layer, seed):
    shape, n, m = layer
    scores = randn(*shape, seed=seed).abs()
    mask = NM(n, m).mask(scores)
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert torch.equal(mask, brute_force(scores, n, m))
    assert int(mask.sum()) * m == mask.numel() * n


@given(layer=layers(), seed=st.integers(0, 1000), levels=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_ties_keep_the_earlier_weight(layer, seed, levels):
    shape, n, m = layer
    scores = torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(NM(n, m).mask(scores), brute_force(scores, n, m))


@pytest.mark.parametrize(
    ("scores", "pattern", "kept"),
    [
        ([1, 2, 3, 4], "2:4", [0, 0, 1, 1]),
        ([4, 3, 2, 1], "2:4", [1, 1, 0, 0]),
        ([1, 1, 1, 1], "2:4", [1, 1, 0, 0]),
        ([0, 0, 0, 0], "1:4", [1, 0, 0, 0]),
        ([1, 9, 2, 8, 9, 1, 8, 2], "1:4", [0, 1, 0, 0, 1, 0, 0, 0]),
        ([5, 6, 7, 8, 1, 2, 3, 4], "2:4", [0, 0, 1, 1, 0, 0, 1, 1]),
        ([5, 6, 7, 8, 1, 2, 3, 4], "4:8", [1, 1, 1, 1, 0, 0, 0, 0]),
        ([5, 6, 7, 8, 1, 2, 3, 4], "1:2", [0, 1, 0, 1, 0, 1, 0, 1]),
    ],
)
def test_nm_masks_by_hand(scores, pattern, kept):
    mask = parse_pattern(pattern).mask(torch.tensor([scores], dtype=torch.float64))
    assert mask.int().tolist() == [kept]


@pytest.mark.parametrize(
    ("shape", "m", "fits"),
    [((8, 12), 4, True), ((8, 10), 4, False), ((8, 3, 7, 7), 4, False), ((8, 1, 3, 3), 4, False), ((12,), 4, False)],
)
def test_nm_fits_where_the_input_width_divides(shape, m, fits):
    assert NM(1, m).fits(torch.Size(shape)) == fits
    if not fits:
        with pytest.raises(PatternError, match=f"1:{m}.*must divide by {m}"):
            NM(1, m).mask(torch.ones(shape))


@given(layer=layers(), seed=st.integers(0, 1000), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_nm_holds_equals_brute_force(layer, seed, share):
    shape, n, m = layer
    weight = randn(*shape, seed=seed)
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share] = 0
    columns = weight.movedim(1, -1).reshape(-1, shape[1]).tolist()
    counts = [sum(x != 0 for x in row[i : i + m]) for row in columns for i in range(0, shape[1], m)]
    assert NM(n, m).holds(weight) == all(count <= n for count in counts)
    assert NM(n, m).holds(weight * NM(n, m).mask(weight.abs()))


def test_nm_holds_nowhere_that_it_does_not_fit():
    assert not NM(2, 4).holds(torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:4", NM(2, 4)),
        ("1:4", NM(1, 4)),
        ("4:8", NM(4, 8)),
        ("1:16", NM(1, 16)),
        (" 2:4 ", NM(2, 4)),
        ("0.5", Unstructured(0.5)),
        (".75", Unstructured(0.75)),
        ("5e-1", Unstructured(0.5)),
    ],
)
def test_parse_pattern(text, expected):
    pattern = parse_pattern(text)
    assert pattern == expected
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5:4", r"5:4.*0 < N < M"),
        ("0:4", r"0:4.*0 < N < M"),
        ("4:4", r"4:4.*0 < N < M"),
        ("0:0", r"0:0.*0 < N < M"),
        ("1.2", r"1\.2.*between 0 and 1"),
        ("0", r"Sparsity 0\.0.*between 0 and 1"),
        ("1", r"Sparsity 1\.0.*between 0 and 1"),
        ("-0.5", r"-0\.5.*between 0 and 1"),
        ("nan", r"nan.*between 0 and 1"),
        ("inf", r"inf.*between 0 and 1"),
        ("abc", r"'abc'.*N:M .*fraction"),
        ("", r"''.*N:M .*fraction"),
        ("2:", r"'2:'.*N:M .*fraction"),
        (":4", r"':4'.*N:M .*fraction"),
        ("-1:4", r"'-1:4'.*N:M .*fraction"),
        ("2:4:8", r"'2:4:8'.*N:M .*fraction"),
        ("2/4", r"'2/4'.*N:M .*fraction"),
        ("50%", r"'50%'.*N:M .*fraction"),
    ],
)
def test_parse_pattern_says_what_it_expected(text, message):
    with pytest.raises(PatternError, match=message) as caught:
        parse_pattern(text)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5, "scope": "row"}, "Scope 'row'.*'global' or 'layer'"),
        ({"sparsity": 0.5, "layer_cap": 0.4}, r"Layer cap 0\.4.*0\.5.*to 1"),
        ({"sparsity": 0.5, "layer_cap": 1.1}, r"Layer cap 1\.1"),
    ],
)
def test_unstructured_refuses_what_it_cannot_do(arguments, message):
    with pytest.raises(PatternError, match=message):
        Unstructured(**arguments)


def scores_of(sizes: list[int], seed: int) -> dict[str, Tensor]:
    """Distinct scores, of layers that differ in size and scale."""
    return {f"layer{i}": (i + 1) * randn(size, 2, seed=seed + i).abs() for i, size in enumerate(sizes)}


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(sizes=SIZES, seed=st.integers(0, 1000), sparsity=st.floats(0.01, 0.99), room=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_global_sparsity_is_exact_and_no_layer_is_above_the_cap(sizes, seed, sparsity, room):
    cap = min(1.0, sparsity + room * (1 - sparsity))
    scores = scores_of(sizes, seed)
    masks = Unstructured(sparsity, layer_cap=cap).masks(scores)
    total = sum(s.numel() for s in scores.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * total)
    for name, mask in masks.items():
        assert mask.shape == scores[name].shape
        assert int((~mask).sum()) < cap * mask.numel() + 1
        if mask.any() and not mask.all():  # what goes from a layer are its lowest
            assert scores[name][~mask].max() < scores[name][mask].min()


@given(sizes=SIZES, seed=st.integers(0, 1000), sparsity=st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_global_masks_equal_a_sort_of_all_weights_where_no_cap_binds(sizes, seed, sparsity):
    scores = scores_of(sizes, seed)
    everything = sorted(float(x) for s in scores.values() for x in s.flatten())
    assume(len(set(everything)) == len(everything))
    gone = set(everything[: round(sparsity * len(everything))])
    for name, mask in Unstructured(sparsity, layer_cap=1.0).masks(scores).items():
        expected = [float(x) not in gone for x in scores[name].flatten()]
        assert mask.flatten().tolist() == expected


def test_what_a_capped_layer_cannot_give_the_others_do():
    scores = {"low": torch.arange(10.0).reshape(2, 5), "high": 100 + torch.arange(10.0).reshape(2, 5)}
    masks = Unstructured(0.5, layer_cap=0.8).masks(scores)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"low": 8, "high": 2}
    assert not masks["high"].flatten()[:2].any()


@pytest.mark.parametrize(("sparsity", "cap"), [(0.5, 0.9), (0.7, 0.9), (0.8, 0.9), (0.9, 0.95), (0.98, 0.99)])
def test_cap_by_default_leaves_room_above_the_sparsity(sparsity, cap):
    assert Unstructured(sparsity).cap == pytest.approx(cap)


@given(sizes=SIZES, seed=st.integers(0, 1000), sparsity=st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_layer_scope_is_exact_in_every_layer(sizes, seed, sparsity):
    scores = scores_of(sizes, seed)
    for name, mask in Unstructured(sparsity, scope="layer").masks(scores).items():
        zeros = round(sparsity * mask.numel())
        lowest = set(scores[name].flatten().sort().values[:zeros].tolist())
        assert [x not in lowest for x in scores[name].flatten().tolist()] == mask.flatten().tolist()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_equal_scores_still_give_the_exact_sparsity(scope):
    masks = Unstructured(0.5, scope=scope).masks({"a": torch.ones(4, 5), "b": torch.ones(3, 2)})
    assert sum(int(mask.sum()) for mask in masks.values()) == 13
