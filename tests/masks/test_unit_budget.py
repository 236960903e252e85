"""Units shared out among layers, against least squares and against all that could be chosen."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import images, transformers_vit
from torch import Tensor, nn
from torch.func import functional_call

from snows_hf.adapters import build_chain
from snows_hf.adapters.flops import count_flops
from snows_hf.adapters.frozen import frozen
from snows_hf.adapters.widths import Width, widths_of
from snows_hf.errors import ConfigError
from snows_hf.masks import aims
from snows_hf.masks.aims import damped, importance
from snows_hf.masks.evidence import Evidence
from snows_hf.masks.group_obs import Reader, units_left
from snows_hf.masks.unit_budget import find_counts, losses_of, possible_counts, price_of, shared_out
from snows_hf.patterns import Full
from snows_hf.settings import settings_for


def evidence_of(kind: str, budget: str = "weights") -> tuple[Evidence, list[Width]]:
    model, pixels = transformers_vit().double(), images(40, seed=3).double()
    chain = build_chain(model, pixels[:1])
    widths = [width for width in widths_of(chain) if width.kind == kind]
    config = settings_for("quick", chain.family, "mlp:0.5", {"budget": budget, "allocation": "sensitivity"})
    weights = {slot.name: model.get_parameter(slot.name).detach() for width in widths for slot in width.readers}
    return Evidence(weights, Full(), config, chain, pixels), widths


@pytest.mark.parametrize("kind, keep", [("mlp", 6), ("heads", 2)])
def test_losses_are_what_the_network_loses_by_the_best_repair_of_each_layer(
    monkeypatch: pytest.MonkeyPatch, kind: str, keep: int
) -> None:
    """By lstsq, with what positions weigh, on three quarters of the images; the others judge."""
    monkeypatch.setattr(aims, "DAMPING", 1e-9)
    evidence, widths = evidence_of(kind)
    model, images = evidence.network.model, evidence.calibration[:]
    learning, judging = images[:30], images[30:]
    losses = losses_of(evidence, dict.fromkeys(widths, keep))
    with frozen(model):
        weighed = importance(replace(evidence, images=learning))
    for width in widths:
        name = width.readers[0].name
        bias = name.removesuffix("weight") + "bias"
        W, b = (model.get_parameter(own).detach() for own in (name, bias))
        x = seen_by(model, name, learning)
        roots = weighed[name].positions.sqrt().repeat(len(learning))[:, None]
        centred = x - (roots**2 * x).sum(0) / (roots**2).sum()
        C = damped(((roots * centred).T @ (roots * centred) / (roots**2).sum())[None])[0]
        assert len(losses[width]) == width.units + 1 and losses[width][-1] < 1e-12 * losses[width][0]
        for own in {keep // 2, keep, (keep + width.units) // 2}:
            stays = units_left([Reader(W, C, width.units)], own)
            columns = width.readers[0].entries(width.marked(stays))
            ones = torch.cat([x[:, columns], torch.ones(len(x), 1, dtype=x.dtype)], 1)
            best = torch.linalg.lstsq(roots * ones, roots * (x @ W.T + b), driver="gelsd").solution
            changed = {name: torch.zeros_like(W).index_copy_(1, columns.nonzero().flatten(), best[:-1].T)}
            with torch.no_grad():
                logits = functional_call(model, changed | {bias: best[-1]}, (judging,)).logits
                error = (logits - model(judging).logits).square().mean()
            assert losses[width][own] == pytest.approx(float(error), rel=1e-3)


@torch.no_grad()
def seen_by(model: nn.Module, name: str, pixels: Tensor) -> Tensor:
    """What a layer reads, (n, d)."""
    seen = list[Tensor]()
    layer = model.get_submodule(name.removesuffix(".weight"))
    with layer.register_forward_hook(lambda module, given, output: seen.append(given[0].flatten(0, -2))):
        model(pixels)
    return seen[0]


def test_a_sensitivity_takes_images_that_judge() -> None:
    evidence, widths = evidence_of("mlp")
    with pytest.raises(ConfigError, match="takes four images at least, one of which judges: there are 3"):
        losses_of(replace(evidence, images=evidence.calibration[:3]), dict.fromkeys(widths, 6))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=2, max_size=3),
    prices=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    gone=st.floats(0.2, 0.8),
    seed=st.integers(0, 99),
)
def test_of_all_counts_in_the_budget_those_of_the_least_loss(
    sizes: list[int], prices: list[int], gone: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = [Width(str(i), "mlp", units, (), (), ()) for i, units in enumerate(sizes)]
    keep = {width: max(1, width.units - round(gone * width.units)) for width in widths}
    each = {width: float(price) for width, price in zip(widths, prices, strict=False)}
    drawn = [torch.rand(width.units, generator=generator).cumsum(0).tolist() for width in widths]
    losses = {width: [*own[::-1], 0.0] for width, own in zip(widths, drawn, strict=True)}
    found = shared_out([[width] for width in widths], keep, losses, each)

    def cost(counts: tuple[int, ...]) -> float:
        return sum(each[width] * count for width, count in zip(widths, counts, strict=True))

    def loss(counts: tuple[int, ...]) -> float:
        return sum(losses[width][count] for width, count in zip(widths, counts, strict=True))

    all_counts = product(*(range(1, width.units + 1) for width in widths))
    best = min((counts for counts in all_counts if cost(counts) <= cost(tuple(keep.values()))), key=loss)
    assert cost(tuple(found.values())) <= cost(tuple(keep.values()))
    assert loss(tuple(found[width] for width in widths)) == pytest.approx(loss(best))


@pytest.mark.parametrize("budget", ["weights", "flops"])
@pytest.mark.parametrize("kind", ["mlp", "heads"])
def test_counts_are_within_what_the_same_share_of_all_would_cost(kind: str, budget: str) -> None:
    evidence, widths = evidence_of(kind, budget)
    keep = {width: width.units // 2 for width in widths}
    flops = count_flops(evidence.network, evidence.calibration[:1])
    found = find_counts(evidence, [[width] for width in widths], keep, flops)
    prices = {width: price_of(evidence.network, width, flops, budget) for width in widths}
    assert sum(prices[w] * found[w] for w in widths) <= sum(prices[w] * keep[w] for w in widths) + len(widths)
    losses = losses_of(evidence, keep)
    assert sum(losses[w][found[w]] for w in widths) <= sum(losses[w][keep[w]] for w in widths)
    together = find_counts(evidence, [widths], keep, flops)
    assert together == keep, "widths of one group keep the same number"


def test_prices_are_the_weights_and_operations_of_a_unit() -> None:
    evidence, (width, *_) = evidence_of("mlp")
    chain = evidence.network
    fc1, fc2 = (chain.weight(slot.name) for slot in (width.makers[0], width.readers[0]))
    assert price_of(chain, width, {}, "weights") == fc1.shape[1] + 1 + fc2.shape[0]
    flops = count_flops(chain, evidence.calibration[:1])
    positions = flops[width.readers[0].name.removesuffix(".weight")] / (2 * fc2.numel())
    assert price_of(chain, width, flops, "flops") == 2 * positions * (fc1.shape[1] + fc2.shape[0])


def test_wide_layers_lose_eight_units_at_a_time() -> None:
    assert possible_counts(6, 3) == [1, 2, 3, 4, 5, 6]
    assert possible_counts(64, 30)[:3] == [8, 16, 24]
    assert 100 in possible_counts(256, 100) and possible_counts(256, 128)[-1] == 256
