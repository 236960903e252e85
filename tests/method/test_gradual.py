"""Masks that thin out between Newton steps."""

from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from snows_hf.adapters import build_chain, frozen
from snows_hf.errors import ConfigError
from snows_hf.masks.choose import choose_masks
from snows_hf.method.cascade import prune_chain
from snows_hf.method.factors import RowBlocks
from snows_hf.method.gradual import surplus, thinned, thinning_step
from snows_hf.method.objective import ActiveWeights, KStepObjective
from snows_hf.method.streams import whole_network
from snows_hf.patterns import NM, PerLayer, Unstructured
from snows_hf.runtime.journal import Journal
from snows_hf.runtime.run import Progress, Run
from snows_hf.settings import PruneConfig


PATTERNS = {
    "1:4": NM(1, 4),
    "2:8": NM(2, 8),
    "global": Unstructured(0.8),
    "layer": Unstructured(0.7, "layer"),
    "each its own": PerLayer({"a": NM(1, 4), "b": Unstructured(0.75, "layer")}, "each"),
}


def scores(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in {"a": (6, 16), "b": (4, 8, 3, 3)}.items()}


@pytest.mark.parametrize(
    ("pattern", "relaxed"),
    [
        (NM(1, 4), NM(2, 4)),
        (NM(3, 8), NM(6, 8)),
        (NM(2, 4), None),
        (NM(3, 4), None),
        (Unstructured(0.9), Unstructured(0.8)),
        (Unstructured(0.6, "layer"), Unstructured(0.2, "layer")),
        (Unstructured(0.5), None),
        (PerLayer({"a": NM(1, 4), "b": NM(2, 4), "c": None}, "x"), {"a": NM(2, 4), "b": None, "c": None}),
        (PerLayer({"a": NM(2, 4), "c": None}, "x"), None),
    ],
)
def test_a_relaxed_pattern_keeps_twice_as_many(pattern, relaxed):
    found = pattern.relaxed()
    assert (found.patterns if isinstance(found, PerLayer) else found) == relaxed


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_of_the_superfluous_weights_those_of_highest_saliency_stay(pattern, seed, share):
    relaxed = pattern.relaxed()
    assert relaxed is not None
    masks, saliencies = relaxed.masks(scores(seed)), scores(seed + 1)
    found = thinned(masks, saliencies, pattern, share)
    end = thinned(masks, saliencies, pattern, 0)
    everything = pattern.masks({name: torch.where(masks[name], saliencies[name], -1) for name in masks})
    leaving = sorted(
        (-float(saliencies[name][place]), name, place)  # of equal ones the first stay
        for name in masks
        for place in map(tuple, (masks[name] & ~end[name]).nonzero().tolist())
    )
    stay = {(name, place) for _, name, place in leaving[: round(share * len(leaving))]}
    for name, mask in found.items():
        assert torch.equal(end[name], everything[name])
        assert not (mask & ~masks[name]).any() and not (end[name] & ~mask).any()
        extra = {(name, tuple(place)) for place in (mask & ~end[name]).nonzero().tolist()}
        assert extra == {found for found in stay if found[0] == name}


def test_the_surplus_falls_with_the_square_of_the_steps_to_go():
    left, shares = 1.0, []
    for step in range(1, 11):
        left *= surplus(step, 10)
        shares.append(left)
    assert shares == pytest.approx([(1 - step / 10) ** 2 for step in range(1, 11)])
    assert surplus(10, 10) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_saliency_is_the_least_cost_of_a_removal(groups):
    """½ δᵀMδ under δᵢ = -wᵢ, minimised over the other weights of the row, each by a dense solve of its own."""
    rows, width, damping = 4, 6, 0.1
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(groups, 30, width, generator=generator, dtype=torch.float64)
    b = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    mask = torch.rand(rows, width, generator=generator) < 0.7
    mask[2] = False
    block = RowBlocks(mask, X.mT @ X, b, damping)
    w = torch.randn(int(mask.sum()), generator=generator, dtype=torch.float64)
    expected, taken = [], 0
    for r in range(rows):
        kept, count = mask[r], int(mask[r].sum())
        factor = block.factor[r, 0, :count, :count]
        M, own = factor @ factor.T, w[taken : taken + count]
        G = X[r // (rows // groups)].T @ X[r // (rows // groups)]
        system = b[r] * G[kept][:, kept] + damping * torch.eye(count, dtype=torch.float64)
        assert float((M - system).norm()) <= 0.01 * float(system.norm())  # its diagonal is a little larger
        taken += count
        for i in range(count):
            others = torch.arange(count) != i
            delta = torch.zeros(count, dtype=torch.float64)
            delta[i] = -own[i]
            delta[others] = torch.linalg.solve(M[others][:, others], own[i] * M[others, i])
            expected.append(float(delta @ M @ delta / 2))
    torch.testing.assert_close(block.saliency(w), torch.tensor(expected, dtype=torch.float64))


SETTINGS = {"gradual": 0.6, "joint_steps": 7, "preconditioner": "gram", "batch_size": 45, "layer_steps": 1}


def prune(model, pattern, run: Run | None = None, count: int = 100, **changes):
    """Prunes a tiny network in place, from the relaxed pattern on; gives the reports."""
    weights = {name: model.get_parameter(name) for _, g in build_chain(model).groups() for name in g.parameters}
    masks = choose_masks(weights, pattern.relaxed(), "magnitude")
    config = tiny.config(**SETTINGS | changes)
    images = tiny.images(count, seed=7)
    return prune_chain(build_chain(model), images, masks, config, run, pattern=pattern)


@pytest.mark.parametrize(
    ("network", "pattern"),
    [
        (tiny.cifar_resnet, NM(1, 4)),
        (tiny.timm_vit, Unstructured(0.8)),
        pytest.param(tiny.cifar_resnet, Unstructured(0.8), marks=pytest.mark.slow),
        pytest.param(tiny.timm_vit, NM(1, 4), marks=pytest.mark.slow),
    ],
)
def test_a_network_comes_to_the_pattern(network, pattern):
    model = network()
    seen, said = list[Progress](), list[str]()
    *layers, thinning, joint = prune(model, pattern, Run(on_stage=said.append, on_progress=seen.append))
    weights = {name: model.get_parameter(name) for name in joint.parameters}
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros == sum(pattern.zeros(weights).values())
    assert all(pattern.holds(weight) for weight in weights.values())
    assert (thinning.status, thinning.steps, len(thinning.losses)) == ("thinned_out", 4, 4)
    assert thinning.sparsity == joint.sparsity == pytest.approx(pattern.sparsity, abs=1e-3)
    assert joint.loss_start == pytest.approx(thinning.loss_pruned, rel=1e-6) and joint.loss_pruned < joint.loss_start
    assert all(abs(layer.sparsity - pattern.relaxed().sparsity) < 0.4 for layer in layers)
    assert len(said) == len([*layers, thinning, joint])
    assert {p.total for p in seen} == {len(layers) + 2}


@pytest.mark.slow
def test_thinning_out_ends_better_than_the_mask_of_the_dense_network():
    """The loss of all operations on images that judge, after as many joint steps."""
    gradual = prune(tiny.cifar_resnet(), NM(1, 4), count=200, gradual=0.5, joint_steps=12)[-1]
    fixed = tiny.prune(tiny.cifar_resnet(), 200, 1, 4, **SETTINGS | {"gradual": 0.0, "joint_steps": 12}).reports[-1]
    assert gradual.loss_pruned < fixed.loss_pruned


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_is_broken_off_gives_the_same_bits(stop, tmp_path: Path):
    class StopError(Exception):
        pass

    def interrupt(progress: Progress) -> None:
        nonlocal left
        if progress.part == "all layers, thinning out" and progress.detail:
            left -= 1
            if left == 0:
                raise StopError

    whole, broken = tiny.cifar_resnet(), tiny.cifar_resnet()
    expected = prune(whole, NM(1, 4))
    left = stop
    with pytest.raises(StopError):
        prune(broken, NM(1, 4), Run(journal=Journal(tmp_path), on_progress=interrupt))
    again = tiny.cifar_resnet()
    reports = prune(again, NM(1, 4), Run(journal=Journal(tmp_path)))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for a, b in zip(expected, reports, strict=True):
        assert {**a.to_dict(), "seconds": 0} == {**b.to_dict(), "seconds": 0}


def test_without_finite_numbers_the_pattern_is_reached_by_magnitude():
    model = tiny.cifar_resnet()
    chain, masks = build_chain(model), tiny.magnitude_masks(model)
    segment, active = whole_network(chain, masks), ActiveWeights(masks)
    images = (tiny.images(4),)
    weights = active.scatter(active.within(chain))
    with frozen(model):
        targets = [torch.full_like(y, torch.nan) for y in segment.outputs(images)]
        batch = KStepObjective(segment, active, images, tiny.config(preconditioner="gram"), targets)
        taken, left = thinning_step(batch, weights, tiny.config().solver, NM(1, 4), share=0.5)
    assert taken is None
    for name, weight in left.items():
        assert torch.equal(weight, torch.where(NM(1, 4).mask(weights[name].abs()), weights[name], 0))


def test_gradual_steps_need_the_preconditioner():
    with pytest.raises(ConfigError, match="preconditioner = 'none': expected 'gram', or gradual = 0"):
        PruneConfig("1:4", gradual=0.5, joint_steps=5).updated(preconditioner="none")


def test_gradual_steps_are_joint_steps():
    with pytest.raises(ConfigError, match=r"gradual = 1\.5: expected a number ≥ 0 and ≤ 1"):
        PruneConfig("1:4", gradual=1.5)
    *_, thinning, joint = prune(tiny.timm_vit(), NM(1, 4))
    assert (thinning.steps, joint.steps) == (4, 3)
    assert prune(tiny.timm_vit(), NM(1, 4), gradual=1.0)[-1].status == "thinned_out"
