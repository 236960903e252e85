"""Group OBS against brute force, and its repair against least squares."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import images, transformers_vit
from torch import Tensor, nn
from torch.func import functional_call

from snows_hf.adapters import build_chain
from snows_hf.adapters.frozen import frozen
from snows_hf.adapters.widths import widths_of
from snows_hf.masks import aims
from snows_hf.masks.aims import damped, importance
from snows_hf.masks.evidence import Evidence
from snows_hf.masks.group_obs import Reader, covariance, repair, units_left, variance
from snows_hf.masks.units import choose_units
from snows_hf.patterns import Full
from snows_hf.settings import settings_for


def inputs(count: int, d: int, seed: int) -> Tensor:
    """Correlated, and of a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, d, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(d, d, generator=generator, dtype=torch.float64) + 1


def ridged(x: Tensor, centred: bool = True) -> Tensor:
    """The covariance of inputs (n, d), (d, d), with a ridge."""
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return damped(covariance(ones.T @ ones, centred)[None])[0]


def brute_force(layers: list[tuple[Tensor, Tensor, float]], units: int, keep: int) -> list[int]:
    """One unit at a time, every candidate tried with the best repair that there is for it."""
    left = list(range(units))

    def cost(stays: list[int]) -> float:
        total = 0.0
        for W, C, share in layers:
            q = W.shape[1] // units
            columns = torch.zeros(units, dtype=torch.bool).index_fill_(0, torch.tensor(stays), True)
            lost = W - repair(W, C, columns.repeat_interleave(q))
            total += share * float(((lost @ C) * lost).sum())
        return total

    while len(left) > keep:
        left = min(([u for u in left if u != gone] for gone in left), key=cost)
    return left


@settings(max_examples=12, deadline=None)
@given(q=st.sampled_from([1, 2, 3]), units=st.integers(4, 9), readers=st.integers(1, 2), seed=st.integers(0, 99))
def test_units_left_are_those_of_brute_force(q: int, units: int, readers: int, seed: int) -> None:
    layers = []
    for i in range(readers):
        C = ridged(inputs(200, units * q, seed + i))
        W = torch.randn(5, units * q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        layers.append((W, C, 1 / variance(W, C)))
    keep = units // 2
    found = units_left([Reader(W, C, units, share) for W, C, share in layers], keep)
    assert found.tolist() == brute_force(layers, units, keep)


def test_what_waits_for_a_block_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(300, 40, 0)
    W = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = units_left([Reader(W, ridged(x), 40)], 11)
    monkeypatch.setattr("snows_hf.masks.group_obs.BLOCK", 3)
    assert torch.equal(units_left([Reader(W, ridged(x), 40)], 11), whole)


@settings(max_examples=20, deadline=None)
@given(d=st.integers(2, 14), rows=st.integers(1, 5), bias=st.booleans(), seed=st.integers(0, 99), data=st.data())
def test_repair_is_least_squares(d: int, rows: int, bias: bool, seed: int, data: st.DataObject) -> None:
    """Of the outputs, around their mean or not, and of the ridge as rows of their own."""
    x, generator = inputs(60, d, seed), torch.Generator().manual_seed(seed)
    W = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=d, max_size=d).filter(any)))
    C = ridged(x, centred=bias)
    repaired = repair(W, C, kept)

    centred = x - x.mean(0) if bias else x
    ridge = (C - centred.T @ centred / len(x)).diagonal().mean()
    rows_of_ridge = (len(x) * ridge).sqrt() * torch.eye(d, dtype=x.dtype)
    system = torch.cat([centred, rows_of_ridge])
    best = torch.linalg.lstsq(system[:, kept], system @ W.T).solution.T
    assert (repaired[:, ~kept] == 0).all()
    assert torch.allclose(repaired[:, kept], best, rtol=1e-6, atol=1e-6 * float(W.abs().max()))


@pytest.mark.parametrize("kind, keep", [("mlp", 5), ("heads", 1)])
def test_units_of_a_network_are_those_of_brute_force_on_what_its_layers_are_fitted_to(
    monkeypatch: pytest.MonkeyPatch, kind: str, keep: int
) -> None:
    """What reads them is fitted, layer after layer, to its output and half of what the residual stream lacks."""
    monkeypatch.setattr(aims, "DAMPING", 1e-4)
    model, pixels = transformers_vit(), images(40, seed=3)
    chain = build_chain(model, pixels[:1])
    widths = [width for width in widths_of(chain) if width.kind == kind]
    config = settings_for("quick", chain.family, "mlp:0.5").updated(batch_size=16)
    given = Evidence({}, Full(), config, chain, pixels)
    found = choose_units(given, dict.fromkeys(widths, keep))
    weights = {slot.name: model.get_parameter(slot.name).detach() for width in widths for slot in width.readers}
    with frozen(model):
        importances = importance(replace(given, weights=weights))
    done = dict[str, Tensor]()
    for place, width in enumerate(widths):
        (reader,) = width.readers
        name, bias = reader.name, reader.name.removesuffix("weight") + "bias"
        after = f"vit.layers.{place}" + (".layernorm_after" if kind == "heads" else "")
        stream = seen_in(model, {}, pixels, name, after)[2]
        x, z, now = seen_in(model, done, pixels, name, after)
        wanted = z + (stream - now) / 2
        roots = importances[name].positions.sqrt().repeat(len(pixels))[:, None]
        assert found.kept[width].tolist() == brute_force([fitted(x, wanted, roots)], width.units, keep)
        columns = torch.zeros(width.units, dtype=torch.bool).index_fill_(0, found.kept[width], True)
        columns = columns.repeat_interleave(reader.each)
        ones = torch.cat([x[:, columns], torch.ones(len(x), 1, dtype=x.dtype)], 1)
        best = roots * (ones @ torch.linalg.lstsq(roots * ones, roots * wanted).solution - wanted)
        done |= {name: found.tensors[name], bias: found.tensors[bias]}
        error = roots * (x @ found.tensors[name].T + found.tensors[bias] - wanted)
        assert float(error.square().mean()) == pytest.approx(float(best.square().mean()), rel=1e-2)


@pytest.mark.parametrize("kind", ["mlp", "ranks"])
def test_layers_between_those_that_read_units_are_fitted_whole(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """To half of what they, or where their output is a part of the residual stream, that still lack; by lstsq. What
    makes ranks stays as it was turned."""
    monkeypatch.setattr(aims, "DAMPING", 1e-6)
    model, pixels = transformers_vit().double(), images(40, seed=3).double()
    chain = build_chain(model, pixels[:1])
    widths = [width for width in widths_of(chain) if width.kind == kind]
    given = Evidence({}, Full(), settings_for("best", chain.family, "mlp:0.5", {"views": 1}), chain, pixels)
    found = choose_units(given, {width: width.units // 2 for width in widths})
    weights = [name for _, group in chain.groups() for name in group.parameters]
    first = weights.index(widths[0].readers[0].name)
    makers = {slot.name for width in widths for slot in width.makers if kind == "ranks"}
    moved = [name for name in weights[first:] if name not in makers]
    assert {name for name in found.tensors if name in weights} - makers == {*moved}
    free = [name for name in moved if name not in {width.readers[0].name for width in widths}]
    with frozen(model):
        importances = importance(replace(given, weights={name: model.get_parameter(name) for name in free}))
    layers = {name.removesuffix(".weight") for name in moved}
    done = found.turned | {key: t for key, t in found.tensors.items() if key.rpartition(".")[0] not in layers}
    for name in moved:
        own = {name, name.removesuffix("weight") + "bias"}
        if name in free:
            block, _, layer = name.removeprefix("vit.layers.").partition(".")
            joins = "o_proj" in layer or "fc2" in layer
            after = f"vit.layers.{block}" + (".layernorm_after" if "o_proj" in layer else "")
            _, z, stream = seen_in(model, {}, pixels, name, after)
            x, now, stream_now = seen_in(model, done, pixels, name, after)
            wanted = now + ((stream - stream_now) if joins else (z - now)) / 2
            roots = importances[name].positions.sqrt().repeat(len(pixels))[:, None]
            ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            best = ones @ torch.linalg.lstsq(roots * ones, roots * wanted, driver="gelsd").solution
            W, bias = (found.tensors[key] for key in sorted(own, reverse=True))
            assert torch.allclose(x @ W.T + bias, best, atol=1e-3 * float((wanted - now).abs().max()))
        done |= {key: found.tensors[key] for key in own if key in found.tensors}


def fitted(x: Tensor, wanted: Tensor, roots: Tensor) -> tuple[Tensor, Tensor, float]:
    """The weights (rows, d) that take inputs (n, d) to the outputs wanted (n, rows) by weighted least squares, with a
    constant, and those inputs' covariance (d, d)."""
    x, wanted, roots = x.double(), wanted.double(), roots.double()
    x = x - (roots**2 * x).sum(0) / (roots**2).sum()
    rows = torch.cat([roots * x, roots], 1)
    W = torch.linalg.lstsq(rows, roots * wanted).solution[:-1].T
    return W, damped((roots * x).T @ (roots * x)[None])[0], 1.0


@torch.no_grad()
def seen_in(model: nn.Module, weights: dict[str, Tensor], pixels: Tensor, name: str, after: str) -> list[Tensor]:
    """What a layer reads and puts out, and the residual stream after it, where the model has these weights."""
    layer, block, seen = model.get_submodule(name.removesuffix(".weight")), model.get_submodule(after), {}

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.update({"x": args[0], "z": out})

    def stream(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen["stream"] = args[0] if "norm" in after else out[0] if isinstance(out, tuple) else out

    with layer.register_forward_hook(note), block.register_forward_hook(stream):
        functional_call(model, weights, (pixels,))
    return [seen[key].flatten(0, 1) for key in ("x", "z", "stream")]


def test_inputs_that_never_vary_cost_nothing() -> None:
    x = inputs(100, 6, 4)
    x[:, 2] = 3.0
    W = torch.ones(2, 6, dtype=torch.float64)
    assert 2 not in units_left([Reader(W, ridged(x), 6)], 5).tolist()


def test_variances_that_float32_has_lost_leave_an_inverse() -> None:
    x = 100 + 1e-3 * torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.ones(50, 1)], 1)
    C = covariance(x.T @ x, centred=True)
    assert C.diagonal().min() < 0
    assert torch.linalg.eigvalsh(damped(C[None])[0]).min() > 0
