"""Wanda, SparseGPT, OBC and ALPS against recomputing everything from the definition."""

from itertools import combinations, product

import pytest
import torch
from networks import convolutions, evidence, images_for, linears
from torch import Tensor, nn
from torch.func import functional_call

from snows_hf.masks.aims import damped
from snows_hf.masks.choose import choose
from snows_hf.masks.evidence import matrix, unmatrix
from snows_hf.masks.scores.alps import fitted, places, within_groups
from snows_hf.masks.scores.obc import nm_kept, refit, unstructured_kept
from snows_hf.masks.scores.sparsegpt import BLOCK, sweep
from snows_hf.patterns import NM, Unstructured


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(rows: int, d: int, groups: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights (rows, d) and the damped Gram matrices (groups, d, d) of correlated inputs."""
    X = randn(groups, d, 3 * d, seed=seed)
    X = X + 0.7 * X.roll(1, 1)
    return randn(rows, d, seed=seed + 1), damped(X @ X.mT)


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    seen = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_hook(lambda m, x, out, n=f"{name}.weight": seen.update({n: (m, x[0])}))
    model(images)
    return seen


@pytest.mark.parametrize("make", [linears, convolutions])
def test_grams_measure_the_output_of_every_layer(make):
    """Σ z_r² = w_rᵀ H w_r for any weights, with z as the module itself computes it, less its bias."""
    model = make()
    grams = dict(evidence(model, "0.5", "wanda").grams())
    for name, (module, x) in inputs_of(make(), images_for(model)).items():
        w = randn(*module.weight.shape, seed=3)
        with torch.no_grad():
            z = functional_call(module, {"weight": w, "bias": torch.zeros_like(module.bias)}, (x,))
        norms = z.movedim(1, -1).flatten(0, -2).square().sum(0)
        H = grams[name].repeat_interleave(len(w) // len(grams[name]), 0)
        torch.testing.assert_close(torch.einsum("rd,rde,re->r", matrix(w), H, matrix(w)), norms)


@pytest.mark.parametrize("make", [linears, convolutions])
def test_grams_are_the_same_a_few_layers_at_a_time(make, monkeypatch):
    given = evidence(make(), "0.5", "wanda")
    whole = dict(given.grams())
    monkeypatch.setattr("snows_hf.masks.evidence.GRAM_ENTRIES", 1)
    one_by_one = dict(given.grams())
    assert list(whole) == list(one_by_one) == list(given.weights)
    assert all(torch.equal(whole[name], one_by_one[name]) for name in whole)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 1, 1), (3, 8, 2, 3)])
def test_consecutive_columns_are_channels_at_one_position(shape):
    weight = randn(*shape)
    assert torch.equal(unmatrix(matrix(weight), weight.shape), weight)
    rows = matrix(torch.ones(shape)).unflatten(1, (-1, 4)).clone()
    rows[..., 2:] = 0
    assert NM(2, 4).holds(unmatrix(rows.flatten(1), weight.shape))
    assert torch.equal(matrix(weight)[:, :4], weight[(slice(None), slice(0, 4), *[0] * (len(shape) - 2))])


@pytest.mark.parametrize("make", [linears, convolutions])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_wanda_by_one_weight_at_a_time(make, pattern):
    """‖X_j‖ is the norm of the layer's output with the weight j alone set to one."""
    model = make()
    given = evidence(model, pattern, "wanda")
    masks = choose(given).masks
    for name, (module, x) in inputs_of(make(), images_for(model)).items():
        scores = torch.zeros_like(module.weight)
        for at in torch.cartesian_prod(*map(torch.arange, module.weight.shape)):
            one = torch.zeros_like(module.weight)
            one[tuple(at)] = 1
            with torch.no_grad():
                z = functional_call(module, {"weight": one, "bias": torch.zeros_like(module.bias)}, (x,))
            scores[tuple(at)] = module.weight[tuple(at)].abs() * z.norm()
        if pattern == "2:4":
            assert torch.equal(masks[name], NM(2, 4).mask(scores))
        else:  # every row loses half, its lowest
            for row, kept in zip(scores.flatten(1), masks[name].flatten(1), strict=True):
                assert int(kept.sum()) * 2 == len(row)
                assert row[kept].min() > row[~kept].max()


def best_fit(w: Tensor, H: Tensor, gone: set[int]) -> tuple[Tensor, float]:
    """The weights of one row that minimise ½ ΔᵀHΔ with some of them zero, and that minimum; by least squares on √H."""
    keep = [j for j in range(len(w)) if j not in gone]
    root = torch.linalg.cholesky(H).T
    fitted = torch.zeros_like(w)
    if keep:
        fitted[keep] = torch.linalg.lstsq(root[:, keep], (root @ w)[:, None]).solution[:, 0]
    return fitted, float((root @ (fitted - w)).square().sum()) / 2


def cheapest(w: Tensor, H: Tensor, gone: set[int], pattern: NM | None) -> tuple[int, float]:
    """Which weight goes next, and the growth of the loss, by trying every one."""

    def full(j: int) -> bool:
        return pattern is not None and sum(i // pattern.m == j // pattern.m for i in gone) == pattern.m - pattern.n

    now = best_fit(w, H, gone)[1]
    costs = {j: best_fit(w, H, gone | {j})[1] - now for j in range(len(w)) if j not in gone and not full(j)}
    j = min(costs, key=costs.__getitem__)
    return j, costs[j]


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 3)], ids=str)
def test_obc_removes_what_brute_force_removes(pattern):
    W, H = problem(rows=4, d=12, groups=2)
    kept = nm_kept(W, H, pattern)
    fitted = refit(W, H, kept)
    for r in range(4):
        gone: set[int] = set()
        for _ in range(12 // pattern.m * (pattern.m - pattern.n)):
            gone.add(cheapest(W[r], H[r // 2], gone, pattern)[0])
        assert set((~kept[r]).nonzero().flatten().tolist()) == gone
        torch.testing.assert_close(fitted[r], best_fit(W[r], H[r // 2], gone)[0])


@pytest.mark.parametrize("zeros", [1, 7, 17, 30, 32])
def test_unstructured_obc_takes_the_cheapest_next_weight_of_any_row(zeros):
    W, H = problem(rows=4, d=8, groups=2, seed=5)
    W[1] *= 3
    gone: list[set[int]] = [set() for _ in W]
    for _ in range(zeros):
        choices = {r: cheapest(W[r], H[r // 2], gone[r], None) for r in range(4) if len(gone[r]) < 8}
        r = min(choices, key=lambda r: choices[r][1])
        gone[r].add(choices[r][0])
    kept = unstructured_kept(W, H, zeros)
    assert [set((~row).nonzero().flatten().tolist()) for row in kept] == gone


def plain_sparsegpt(W: Tensor, H: Tensor, pattern: NM | None, zeros: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 with a fresh inverse of H[i:, i:] at every column, for one group."""
    W, (rows, d) = W.clone(), W.shape
    kept = torch.ones_like(W, dtype=torch.bool)
    inverses = [torch.linalg.inv(H[i:, i:]) for i in range(d)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    for i in range(d):
        if pattern is not None and i % pattern.m == 0:
            for r in range(rows):
                scores = W[r, i : i + pattern.m].square() / pivots[i : i + pattern.m]
                kept[r, i + scores.argsort()[: pattern.m - pattern.n]] = False
        if pattern is None and i % BLOCK == 0:
            stop = min(i + BLOCK, d)
            scores = (W[:, i:stop].square() / pivots[i:stop]).flatten()
            count = round(zeros * stop / d) - round(zeros * i / d)
            for at in scores.argsort()[:count].tolist():
                kept[at // (stop - i), i + at % (stop - i)] = False
        for r in range(rows):
            if not kept[r, i]:
                W[r, i:] -= W[r, i] / pivots[i] * inverses[i][0]
    return kept, W


@pytest.mark.parametrize(
    ("pattern", "zeros", "d"),
    [(NM(2, 4), 0, 12), (NM(1, 4), 0, 140), (NM(2, 6), 0, 132), (None, 30, 16), (None, 333, 150)],
    ids=str,
)
def test_sparsegpt_is_the_plain_sweep(pattern, zeros, d):
    W, H = problem(rows=3, d=d)
    kept, updated = sweep(W[None], H, pattern, zeros)
    expected_kept, expected = plain_sparsegpt(W, H[0], pattern, zeros)
    assert torch.equal(kept[0], expected_kept)
    torch.testing.assert_close(updated[0], expected, rtol=1e-8, atol=1e-8)


def test_groups_are_swept_each_with_its_own_inputs():
    W, H = problem(rows=6, d=8, groups=2)
    together = sweep(W.unflatten(0, (2, 3)), H, NM(2, 4), 0)
    for g in range(2):
        alone = sweep(W[None, 3 * g : 3 * g + 3], H[g : g + 1], NM(2, 4), 0)
        assert all(torch.equal(a[0], b[g]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("make", [linears, convolutions])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "0.6"])
def test_updates_keep_the_output(make, pattern):
    """OBC's weights are the best for its mask, so better than the mask alone; SparseGPT's and ALPS's cannot be better
    than the best for their own."""
    given = evidence(make(), pattern, "obc")
    grams = {name: damped(H) for name, H in given.grams()}
    chosen = {mask: choose(evidence(make(), pattern, mask)) for mask in ("obc", "sparsegpt", "alps")}
    for name, dense in given.weights.items():
        H = grams[name].repeat_interleave(len(dense) // len(grams[name]), 0)

        def error(w: Tensor, H: Tensor = H, dense: Tensor = dense) -> float:
            return float(torch.einsum("rd,rde,re->", matrix(w - dense), H, matrix(w - dense)))

        for choice in chosen.values():
            assert torch.equal(choice.weights[name] != 0, choice.masks[name])
        assert error(chosen["obc"].weights[name]) < error(dense * chosen["obc"].masks[name])
        for mask in ("sparsegpt", "alps"):
            best = refit(matrix(dense), grams[name], matrix(chosen[mask].masks[name]))
            assert error(unmatrix(best, dense.shape)) <= error(chosen[mask].weights[name]) + 1e-12


@pytest.mark.parametrize("mask", ["sparsegpt", "obc", "alps"])
def test_unstructured_layers_lose_the_same_share(mask):
    masks = choose(evidence(convolutions(), "0.7", mask)).masks
    total = sum(kept.numel() for kept in masks.values())
    assert sum(int((~kept).sum()) for kept in masks.values()) == round(0.7 * total)
    assert all(abs(int((~kept).sum()) - 0.7 * kept.numel()) <= 1 for kept in masks.values())
    assert Unstructured(0.7).zeros(masks) == {name: int((~kept).sum()) for name, kept in masks.items()}


def test_inputs_that_never_fire_leave_it_defined():
    W, _ = problem(rows=2, d=4)
    H = torch.zeros(1, 4, 4, dtype=torch.float64)
    H[0, 0, 0] = 1
    kept = nm_kept(W, damped(H), NM(1, 4))
    assert kept[:, 0].all()
    assert torch.isfinite(refit(W, damped(H), kept)).all()
    assert torch.isfinite(sweep(W[None], damped(torch.zeros_like(H)), NM(2, 4), 0)[1]).all()
    apart = within_groups(None, W[None])
    assert torch.isfinite(places(W[None], damped(torch.zeros_like(H)), apart, NM(2, 4), 0)[1]).all()


def plain_alps(W: Tensor, H: Tensor, G: Tensor, pattern: NM) -> Tensor:
    """The kept weights of one group by Eq. 5 as it is written, with G on the left: by a solve for all rows."""
    scale = G.diagonal().sqrt()[:, None] * H.diagonal().sqrt()
    hessian = torch.kron(G, H) / scale.flatten() / scale.flatten()[:, None]
    W = W * scale
    kept = before = pattern.mask(W.abs())
    D, V, rho = W * kept, torch.zeros_like(W), 0.05
    for t in range(1, 301):
        right = (hessian @ W.flatten()).view_as(W) - V + rho * D
        X = torch.linalg.solve(hessian + rho * torch.eye(len(hessian)), right.flatten()).view_as(W)
        kept = pattern.mask((X + V / rho).abs())
        D = torch.where(kept, X + V / rho, 0.0)
        V = V + rho * (X - D)
        if t % 3 == 0:
            changed = int((kept ^ before).sum()) / 2 / int(kept.sum())
            if changed < 0.01:
                break
            rho, before = rho * (1.5 if changed > 0.1 else 1.3), kept
    return kept


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 3)], ids=str)
def test_alps_is_the_plain_iteration(pattern, coupled):
    W, H = problem(rows=6, d=24, seed=3)
    root = randn(6, 9, seed=9)
    G = root @ root.T if coupled else torch.eye(6).double()
    assert torch.equal(places(W[None], H, G[None], pattern, 0)[0][0], plain_alps(W, H[0], G, pattern))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), None], ids=str)
def test_alps_leaves_less_error_than_the_greedy_criteria(pattern):
    """With the best weights for each mask; by the pattern in every row, or so many zeros in all."""
    W, H = problem(rows=24, d=48, seed=6)
    zeros = int(0.6 * W.numel())
    kept = places(W[None], H, within_groups(None, W[None]), pattern, zeros)[0][0]
    assert pattern.holds(kept) if pattern else int((~kept).sum()) == zeros
    obc = nm_kept(W, H, pattern) if pattern else unstructured_kept(W, H, zeros)
    errors = []
    for mask in (kept, sweep(W[None], H, pattern, zeros)[0][0], obc):
        delta = refit(W, H, mask) - W
        errors.append(float(((delta @ H[0]) * delta).sum()))
    assert errors[0] < min(errors[1:]), errors


@pytest.mark.parametrize("coupled", [False, True])
def test_alps_fits_what_it_keeps(monkeypatch, coupled):
    """Of rows of two groups, one of which keeps nothing and one everything; by a dense solve of each group's kept
    weights as one vector, whose Hessian is the Kronecker product of G and H between them."""
    monkeypatch.setattr("snows_hf.masks.scores.alps.TOLERANCE", 1e-9)
    W, H = problem(rows=6, d=12, groups=2)
    kept = randn(6, 12, seed=8) > 0
    kept[0], kept[1] = False, True
    root = randn(6, 9, seed=9)
    G = within_groups(root @ root.T if coupled else None, W.unflatten(0, (2, 3)))
    own, start = (matrix.unflatten(0, (2, 3)) for matrix in (kept, W * kept))
    x = fitted(W.unflatten(0, (2, 3)), H, G, own, start).flatten(0, 1)
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        between = (root[rows] @ root[rows].T) if coupled else torch.eye(3).double()
        hessian, stays = torch.kron(between, H[group]), kept[rows].flatten()
        best = torch.zeros_like(W[rows]).flatten()
        best[stays] = torch.linalg.solve(hessian[stays][:, stays], (hessian @ W[rows].flatten())[stays])
        torch.testing.assert_close(x[rows].flatten(), best)
    if not coupled:
        torch.testing.assert_close(x, refit(W, H, kept))


def error(w: Tensor, H: Tensor, kept: Tensor) -> float:
    return best_fit(w, H, set((~kept).nonzero().flatten().tolist()))[1]


def test_alps_finds_the_best_mask_of_all_more_often_than_the_greedy_criteria():
    W, (H,) = problem(rows=40, d=8, seed=4)
    pattern, pairs = NM(2, 4), list(combinations(range(4), 2))
    best = torch.zeros_like(W, dtype=torch.bool)
    for r, w in enumerate(W):
        masks = []
        for both in product(pairs, repeat=2):
            mask = torch.zeros(2, 4, dtype=torch.bool)
            for group, pair in enumerate(both):
                mask[group, list(pair)] = True
            masks.append(mask.flatten())
        best[r] = min(masks, key=lambda mask: error(w, H, mask))
    greedy = sweep(W[None], H[None], pattern, 0)[0][0], nm_kept(W, H[None], pattern)
    alps = places(W[None], H[None], within_groups(None, W[None]), pattern, 0)[0][0]
    found = [int((kept == best).all(1).sum()) for kept in (*greedy, alps)]
    assert found[2] > 1.5 * max(found[:2]), found
