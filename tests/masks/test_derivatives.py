"""Gradient and curvature criteria against autograd on the whole network, torch.func.hessian and curvlinops."""

import copy
import math
from itertools import pairwise
from pkgutil import resolve_name

import pytest
import torch
import torch.nn.functional as F
from curvlinops import EFLinearOperator, HessianLinearOperator
from networks import Small, convolutions, evidence, images_for, linears, read
from torch import Tensor
from torch.func import functional_call, grad, hessian, vmap

from snows_hf.masks.choose import choose
from snows_hf.masks.criteria import CRITERIA
from snows_hf.masks.evidence import Evidence
from snows_hf.masks.scores.fisher import fisher
from snows_hf.masks.scores.hutchinson import PROBES, estimate, on_k_step_loss, on_task_loss
from snows_hf.masks.scores.synflow import schedule
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment


MAKES = [linears, convolutions]


def flat(tensors: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def loss_of(given: Evidence, images: Tensor, labels: Tensor):
    """The task loss as a function of θ (m,), by calling the model itself."""
    model = given.network.model

    def loss(theta: Tensor, x: Tensor = images, y: Tensor = labels) -> Tensor:
        parts = theta.split([w.numel() for w in given.weights.values()])
        weights = {n: p.view_as(w) for (n, w), p in zip(given.weights.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    return loss


@pytest.fixture(params=MAKES, ids=["linears", "convolutions"])
def known(request) -> tuple[Evidence, Tensor, Tensor, Tensor]:
    """Evidence, θ, the gradient and per-image gradients."""
    model = request.param()
    given = evidence(model, "2:4", "snip")
    theta = flat(given.weights, list(given.weights))
    loss = loss_of(given, images_for(model), given.labels)
    per_image = vmap(lambda x, y: grad(loss)(theta, x[None], y[None]))(images_for(model), given.labels)
    return given, theta, grad(loss)(theta), per_image


def scores(given: Evidence, name: str) -> Tensor:
    score = resolve_name(f"snows_hf.masks.scores.{CRITERIA[name].function}")
    return flat(score(given), list(given.weights))


def test_first_order_scores(known):
    given, theta, g, _ = known
    torch.testing.assert_close(scores(given, "grad-norm"), g.abs())
    torch.testing.assert_close(scores(given, "snip"), (theta * g).abs())


def test_grasp_keeps_what_the_gradient_flow_needs(known):
    """−θ·Hg from the gradient of ½‖g‖², in one batch."""
    given, theta, _, _ = known
    loss = loss_of(given, images_for(given.network.model), given.labels)
    Hg = grad(lambda t: grad(loss)(t).square().sum() / 2)(theta)
    torch.testing.assert_close(scores(given, "grasp"), theta * Hg)


def test_fisher_scores(known):
    given, theta, g, per_image = known
    squares = per_image.square().mean(0)
    torch.testing.assert_close(scores(given, "fd"), squares)
    torch.testing.assert_close(scores(given, "fp"), theta**2 / 2 * squares)
    torch.testing.assert_close(scores(given, "fts"), (theta * g + theta**2 / 2 * squares).abs())


def curvlinops_diagonal(operator: type, given: Evidence) -> Tensor:
    model = copy.deepcopy(given.network.model)
    parameters = [model.get_parameter(name) for name in given.weights]
    data = [(images_for(model), given.labels)]
    matrix = operator(model, torch.nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
    m = sum(w.numel() for w in given.weights.values())
    return (matrix @ torch.eye(m, dtype=torch.float64)).diagonal()


@pytest.mark.parametrize("make", MAKES)
def test_fisher_diagonal_is_that_of_curvlinops(make):
    given = evidence(make(), "2:4", "fd")
    torch.testing.assert_close(fisher(given)[1], curvlinops_diagonal(EFLinearOperator, given))


def exact_task_diagonal(given: Evidence) -> Tensor:
    theta = flat(given.weights, list(given.weights))
    return hessian(loss_of(given, images_for(given.network.model), given.labels))(theta).diagonal()


def exact_k_step_diagonal(given: Evidence, k: int) -> Tensor:
    """Layer by layer: mean squared errors of the layer's output and of the k after it, over all images."""
    model, parts = given.network.model, []
    assert isinstance(model, Small)
    x = images_for(model)
    for i, layer in enumerate(model.layers):
        after = list(model.layers[i + 1 : i + 1 + k])

        def outputs(w: Tensor, x: Tensor = x, layer=layer, after=tuple(after), first=i) -> list[Tensor]:
            values = [functional_call(layer, {"weight": w}, (read_input(layer, x),))]
            for later in after:
                values[-1] = torch.tanh(values[-1])
                values.append(read(later, values[-1]))
            if first + len(after) + 1 < len(model.layers):
                values[-1] = torch.tanh(values[-1])
            return values

        targets = [y.detach() for y in outputs(layer.weight)]

        def loss(w: Tensor, outputs=outputs, targets=targets) -> Tensor:
            return sum((o - y).square().mean() for o, y in zip(outputs(w), targets, strict=True))

        m = layer.weight.numel()
        parts.append(hessian(loss)(layer.weight.detach()).reshape(m, m).diagonal())
        with torch.no_grad():
            x = torch.tanh(read(layer, x))
    return torch.cat(parts)


def read_input(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return x.mean((2, 3)) if isinstance(layer, torch.nn.Linear) and x.dim() == 4 else x


CASES = {
    "task loss": (on_task_loss, exact_task_diagonal),
    "K-step loss": (on_k_step_loss, lambda given: exact_k_step_diagonal(given, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_hutchinson_error_falls_as_one_over_root_probes(case):
    """… to the exact diagonal of the Hessian, and the variance it reports is its squared error on average."""
    estimated, exact = CASES[case]
    given = evidence(linears(), "2:4", "hd")
    truth = exact(given).detach()
    errors, reported = {}, {}
    for probes, seeds in ((4, range(40)), (64, range(20))):
        runs = [estimated(evidence(linears(), "2:4", "hd", seed=seed), probes)[1:] for seed in seeds]
        errors[probes] = sum(float((H - truth).square().sum()) for H, _ in runs) / len(runs)
        reported[probes] = sum(float(variance.sum()) for _, variance in runs) / len(runs)
        assert errors[probes] == pytest.approx(reported[probes], rel=0.25)
    slope = math.log(errors[64] / errors[4]) / 2 / math.log(64 / 4)
    assert slope == pytest.approx(-0.5, abs=0.06)
    mean = torch.stack([H for H, _ in runs]).mean(0)
    assert (mean - truth).norm() < 0.3 * truth.norm()


def test_exact_task_diagonal_is_that_of_curvlinops():
    given = evidence(linears(), "2:4", "hd")
    torch.testing.assert_close(exact_task_diagonal(given), curvlinops_diagonal(HessianLinearOperator, given))


def test_shares_and_variance_of_an_estimate():
    """Two batches of two draws each, by hand: means 2 and 10, variances 2 and 8 of a draw."""
    draws = {0.25: iter([1.0, 3.0]), 0.75: iter([8.0, 12.0])}
    batches = [(share, torch.ones(1), lambda d=d: torch.tensor([next(d)])) for share, d in draws.items()]
    g, H, variance = (float(x) for x in estimate(batches, 2))
    assert (g, H) == (1.0, 0.25 * 2 + 0.75 * 10)
    assert variance == pytest.approx(0.25**2 * 2 / 2 + 0.75**2 * 8 / 2)


@pytest.mark.parametrize("make", MAKES)
def test_hutchinson_masks_by_their_formulas(make):
    for suffix, diagonal in (("", on_task_loss), ("-kstep", on_k_step_loss)):
        given = evidence(make(), "2:4", "hd")
        g, H, _ = diagonal(given)
        theta = given.theta()
        expected = {"hd": H, "hp": theta**2 / 2 * H, "hts": (theta * g + theta**2 / 2 * H).abs()}
        for name, score in expected.items():
            choice = choose(evidence(make(), "2:4", name + suffix))
            wanted = given.pattern.masks(given.everything.scatter(score))
            assert all(torch.equal(choice.masks[n], wanted[n]) for n in wanted)
            assert choice.facts["probes"] == PROBES
            assert choice.facts["variance"] > 0


def test_k_step_curvature_is_never_negative():
    g, H, _ = on_k_step_loss(evidence(convolutions(), "2:4", "hd-kstep"), probes=1)
    assert not g.any()
    assert (H >= 0).all()
    hp, hts = (choose(evidence(convolutions(), "2:4", name)).masks for name in ("hp-kstep", "hts-kstep"))
    assert all(torch.equal(hp[name], hts[name]) for name in hp)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["relative", "mean"])
def test_k_step_curvature_is_that_of_the_solver(weighting):
    """Enough probes come close to the diagonal of the products that Newton's systems are solved with."""
    given = evidence(convolutions(), "2:4", "hd-kstep", weighting=weighting, batch_size=12)
    chain = given.network
    H = given.everything.scatter(on_k_step_loss(given, probes=2000)[1])
    state = (given.images,)
    for index, group in chain.groups():
        (name,) = group.parameters
        segment = Segment.cut(chain, index, 2)
        active = ActiveWeights({name: torch.ones_like(given.weights[name], dtype=torch.bool)})
        with torch.no_grad():
            targets = segment.outputs(state)
        objective = KStepObjective(segment, active, state, given.config, targets)
        product = objective.expand(given.weights[name].flatten()).product
        exact = torch.stack([product(e)[i] for i, e in enumerate(torch.eye(active.size, dtype=torch.float64))])
        torch.testing.assert_close(H[name].flatten(), exact, rtol=0.2, atol=1e-12)
        with torch.no_grad():
            state = chain.operations[index].run(state)


def plain_synflow(given: Evidence) -> dict[str, Tensor]:
    """Tanaka et al.'s Algorithm 1 on a copy of the model, weights overwritten."""
    model = copy.deepcopy(given.network.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_() if parameter.dim() > 1 else parameter.zero_()
    dense = {name: model.get_parameter(name).detach().clone() for name in given.weights}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in dense.items()}
    for pattern in schedule(given.pattern):
        for name, weight in dense.items():
            model.get_parameter(name).data = weight * masks[name]
        model.zero_grad()
        model(torch.ones_like(given.images[:1])).sum().backward()
        flow = {name: model.get_parameter(name).grad * model.get_parameter(name).detach() for name in dense}
        masks = pattern.masks({name: torch.where(masks[name], flow[name], -1) for name in dense})
    return masks


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("pattern", ["1:4", "0.8"])
def test_synflow_is_the_iterated_one(make, pattern):
    given = evidence(make(), pattern, "synflow")
    before = {name: w.clone() for name, w in given.weights.items()}
    masks = choose(given).masks
    expected = plain_synflow(given)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert all(torch.equal(given.network.weight(name), before[name]) for name in before)


def test_synflow_schedule():
    assert [str(p) for p in schedule(evidence(linears(), "1:4", "synflow").pattern)] == ["3:4", "2:4", "1:4"]
    densities = [1 - p.sparsity for p in schedule(evidence(linears(), "0.9", "synflow").pattern)]
    ratios = [b / a for a, b in pairwise(densities)]
    assert len(densities) == 100
    assert densities[-1] == pytest.approx(0.1)
    assert ratios == pytest.approx([0.1 ** (1 / 100)] * 99)
