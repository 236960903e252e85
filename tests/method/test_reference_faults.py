"""Eight faults of the paper's public code, and for each a test that this package does not share it.

Every docstring tells the fault in our own words; the code below it is ours alone.
"""

from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor, nn

from snows_hf.adapters import Chain, Group, Operation, State, build_chain
from snows_hf.method.cascade import prune_chain
from snows_hf.method.newton import Expansion, NewtonStatus, newton
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment
from snows_hf.patterns import Masks


TRANSFORMERS = [tiny.transformers_vit, tiny.timm_vit]


@pytest.mark.parametrize("network", TRANSFORMERS)
@pytest.mark.parametrize("kind", ["qkv", "proj"])
def test_1_solved_attention_weights_reach_the_model(network, kind):
    """Fault: the solved QKV and out-projection weights are read back from the dense copy of the model, so that the
    solver's work on them is thrown away.

    Here the loss is measured again from the weights that the pruned model holds: it is the one the solver ended with,
    below that of the masked dense weights.
    """
    run = tiny.prune(network(), count=32, batch_size=14)
    kinds = {group.name: group.kind for _, group in tiny.chain_of(run.dense).groups()}
    reports = [report for report in run.reports if kinds[report.name] == kind]
    assert len(reports) == 2
    for report in reports:
        masked, pruned = run.losses(report)
        assert pruned == pytest.approx(report.loss_pruned, rel=1e-9)
        assert masked == pytest.approx(report.loss_start, rel=1e-9)
        assert pruned < masked
        for name in report.parameters:
            dense = run.dense.get_parameter(name) * run.masks[name]
            assert not torch.equal(run.pruned.get_parameter(name), dense)


def test_1_all_three_of_q_k_and_v_are_solved():
    """Fault: as above, for a checkpoint that stores QKV as three layers, each of which must move."""
    run = tiny.prune(tiny.transformers_vit(), count=60)
    joint = run.reports[0]
    assert [name.split(".")[-2] for name in joint.parameters] == ["q_proj", "k_proj", "v_proj"]
    for name in joint.parameters:
        moved = run.pruned.get_parameter(name) - run.dense.get_parameter(name) * run.masks[name]
        assert float(moved.detach().norm()) > 1e-6


@pytest.mark.parametrize(
    ("network", "first_block"), [(tiny.transformers_vit, "vit.layers.0"), (tiny.timm_vit, "blocks.0")]
)
def test_2_calibration_tokens_have_class_token_and_positions(network, first_block):
    """Fault: what enters the first transformer block during calibration are bare patch embeddings, without the class
    token and without position embeddings.

    Here its queries, keys and values are made of what the model's own forward pass makes them of, the class token
    first.
    """
    model, images, seen = network(), tiny.images(4), []
    chain = build_chain(model)
    index, group = chain.groups()[0]
    assert first_block in group.name
    layer = model.get_submodule(group.parameters[0].removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
        state: State = (images,)
        for operation in chain.operations[: index + 1]:
            state = operation.run(state)
    handle.remove()
    patches = (tiny.SIZE // 4) ** 2
    assert seen[1].shape == (4, patches + 1, 8)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[1][0, 0], seen[1][1, 0]) and not torch.equal(seen[1][0, 1], seen[1][1, 1])


def segment_at(model: nn.Module, index: int, k: int, images: Tensor, n: int, m: int) -> KStepObjective:
    """Exact-Hessian objective of the group at an operation, with N:M masks, on the dense network's activations."""
    chain = build_chain(model.requires_grad_(False))
    state: State = (images,)
    for operation in chain.operations[:index]:
        state = operation.run(state)
    segment = Segment.cut(chain, index, k)
    active = ActiveWeights(tiny.nm_masks(model, segment.group.parameters, n, m))
    return KStepObjective(segment, active, state, tiny.config(curvature="hessian"))


def start(objective: KStepObjective) -> Tensor:
    chain = objective.segment.chain
    return objective.active.gather({name: chain.weight(name).detach() for name in objective.active.masks})


def test_3_products_are_those_of_the_whole_hessian():
    """Fault: products are assembled from chunks of the vector, without the blocks that couple two chunks, so that the
    product called exact is that of a block-diagonal matrix.

    Here a vector that is zero outside one chunk comes back with entries everywhere, those of the dense Hessian; the
    blocks between chunks weigh enough that leaving them out would show.
    """
    objective = segment_at(tiny.transformers_vit(), 1, 4, tiny.images(4), 1, 4)
    w = start(objective)

    def loss(w: Tensor) -> Tensor:
        outputs = objective.segment.outputs(objective.state, objective.active.scatter(w))
        return sum((o - y).square().mean() for o, y in zip(outputs, objective.targets, strict=True))

    # Double backward, because masked_scatter has no batching rule for torch.func.hessian.
    H = torch.autograd.functional.hessian(loss, w)
    product = objective.expand(w).product
    chunks = torch.arange(len(w)).tensor_split(3)
    for chunk in chunks:
        p = torch.zeros_like(w)
        p[chunk] = torch.randn(len(chunk), generator=torch.Generator().manual_seed(0), dtype=w.dtype)
        torch.testing.assert_close(product(p), H @ p, rtol=1e-8, atol=1e-12)
        elsewhere = torch.ones_like(w, dtype=torch.bool)
        elsewhere[chunk] = False
        assert float((H @ p)[elsewhere].norm()) > 0.01 * float((H @ p).norm())


def test_3_one_product_covers_every_image_of_the_batch():
    """Fault: as above; the product over a batch must also be the mean of the products over its parts."""
    images = tiny.images(4)
    whole = segment_at(tiny.transformers_vit(), 1, 4, images, 1, 4)
    halves = [segment_at(tiny.transformers_vit(), 1, 4, part, 1, 4) for part in images.split(2)]
    w = start(whole)
    p = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype)
    mean = torch.stack([half.expand(w).product(p) for half in halves]).mean(0)
    torch.testing.assert_close(whole.expand(w).product(p), mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", [*TRANSFORMERS, tiny.cifar_resnet])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_4_every_row_is_pruned_whatever_their_number(network, n, m):
    """Fault: rows are masked in three slices of equal size, so that a matrix whose rows do not divide by three keeps
    its last row dense."""
    run = tiny.prune(network(), n=n, m=m)
    indivisible = [name for name in run.masks if run.masks[name].shape[0] % 3]
    assert indivisible
    for name in run.masks:
        rows = run.pruned.get_parameter(name).flatten(1)
        assert torch.equal((rows != 0).sum(1), torch.full((len(rows),), rows.shape[1] * n // m))


@pytest.mark.parametrize("network", [tiny.transformers_vit, tiny.cifar_resnet])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_5_fewer_images_than_a_batch_still_take_steps(network, count):
    """Fault: an incomplete batch is dropped, so that with fewer images than one batch no step is taken and nobody is
    told."""
    run = tiny.prune(network(), count=count, batch_size=250)
    assert [report.steps for report in run.reports] == [1] * len(run.reports)
    assert all(report.cg_iterations > 0 for report in run.reports)
    if count == 1:  # the image that was fitted is also the judge; with more, the judge has seen none of the others
        assert run.reports[0].status == "improved"


def test_5_the_last_incomplete_batch_counts_too():
    """Fault: as above, for the images that are left over after the last full batch."""
    run = tiny.prune(tiny.transformers_vit(), count=10, batch_size=4, held_out=0.1)  # 9 images in batches of 3
    assert {report.steps for report in run.reports} == {3}
    run = tiny.prune(tiny.transformers_vit(), count=10, batch_size=5, held_out=0.1)  # 5 and 4
    assert {report.steps for report in run.reports} == {2}


class Saturating(nn.Module):
    """atan(a x₁ + b x₂), at a = 5 and b = −4.9: with b masked, a Newton step from the flat tail overshoots far."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[5.0, -4.9]], dtype=torch.float64))

    def chain(self) -> Chain:
        group = Group("layer", ("weight",), "linear")
        return Chain(self, [Operation("layer", lambda s: (torch.atan(s[0] @ self.weight.T),), group)], "test")


@pytest.mark.parametrize(
    ("max_backtracks", "status", "rejected"),
    [(0, NewtonStatus.NOT_IMPROVED, 1), (10, NewtonStatus.IMPROVED, 0)],
)
def test_6_failed_line_search_writes_nothing(max_backtracks, status, rejected):
    """Fault: when no trial step of the line search lowers the loss, the last one is written all the same.

    Here the layer keeps its masked weights bit for bit, and the report says so and what to do; the same layer with
    room to backtrack is improved.
    """
    model = Saturating()
    masks: Masks = {"weight": torch.tensor([[True, False]])}
    images = torch.ones(4, 2, dtype=torch.float64)
    settings = tiny.config(k=0, max_backtracks=max_backtracks, damping=0.0)
    (report,) = prune_chain(model.chain(), images, masks, settings)

    assert (report.status, report.steps, report.rejected_steps) == (status.value, 1, rejected)
    if status is NewtonStatus.NOT_IMPROVED:
        assert torch.equal(model.weight, torch.tensor([[5.0, 0.0]], dtype=torch.float64))
        assert report.loss_pruned == report.loss_start
        assert report.remedy
    else:
        assert report.loss_pruned < report.loss_start


K_MAX = {
    # operations after the one where the group acts, counted on paper
    "vit.layers.0.attention.qkv": 10,
    "vit.layers.0.attention.o_proj": 9,
    "vit.layers.0.mlp.fc1": 8,
    "vit.layers.0.mlp.fc2": 6,
    "vit.layers.1.attention.qkv": 5,
    "vit.layers.1.attention.o_proj": 4,
    "vit.layers.1.mlp.fc1": 3,
    "vit.layers.1.mlp.fc2": 1,
}


@pytest.mark.parametrize("k", [0, 1, 3, 6, 100])
def test_7_k_is_the_same_for_every_layer_up_to_its_last_operation(k):
    """Fault: K for the MLP layers is meant to be capped at 1, and the cap is not applied: the K used is not the
    K that was asked for.

    Here every layer, MLP or not, compares min(K, K_max) + 1 outputs, and its report says which K it was.
    """
    model = tiny.transformers_vit()
    chain = build_chain(model)
    segments = {group.name: Segment.cut(chain, index, k) for index, group in chain.groups()}
    run = tiny.prune(model, count=3, k=k, cg_max_iter=1)
    assert {report.name: report.k for report in run.reports} == {n: min(k, k_max) for n, k_max in K_MAX.items()}
    for report in run.reports:
        objective = run.held_out_objective(report)
        with torch.no_grad():
            outputs = segments[report.name].outputs(objective.state)
        assert len(outputs) == len(objective.targets) == report.k + 1


@dataclass
class Recorded:
    """Notes which batch is asked for what, where, and what it answers."""

    name: str
    inner: KStepObjective
    log: list[tuple[str, str, Tensor, float]]

    def value(self, w: Tensor) -> float:
        self.log.append((self.name, "value", w, self.inner.value(w)))
        return self.log[-1][-1]

    def expand(self, w: Tensor) -> Expansion:
        expansion = self.inner.expand(w)
        self.log.append((self.name, "expand", w, expansion.value))
        return expansion


def test_8_line_search_compares_losses_and_slope_of_one_batch():
    """Fault: the line search holds the last batch's loss against the slope of the current batch, so that what it
    accepts need not lower either.

    Here every trial is evaluated on the batch whose expansion gave the direction, and the accepted one fulfils
    Armijo's rule (A.1.3) with that batch's own loss and slope.
    """
    model, log, beta = tiny.transformers_vit(), [], 1e-5
    batches = [Recorded(f"batch {i}", segment_at(model, 1, 4, tiny.images(2, seed=i), 1, 4), log) for i in range(4)]
    held_out = Recorded("held out", segment_at(model, 1, 4, tiny.images(4, seed=9), 1, 4), log)
    settings = tiny.config(curvature="hessian", beta=beta, cg_max_iter=30, max_backtracks=40).solver
    result = newton(batches, held_out, start(held_out.inner), settings)
    assert result.steps == len(batches)

    accepted = 0
    for batch in batches:
        (at,) = (i for i, entry in enumerate(log) if entry[:2] == (batch.name, "expand"))
        _, _, w, loss = log[at]
        gradient = batch.inner.expand(w).gradient
        trials = [entry for entry in log[at + 1 :] if entry[0] != "held out"]
        following = next((i for i, entry in enumerate(trials) if entry[1] == "expand"), len(trials))
        assert {name for name, *_ in trials[:following]} == {batch.name}
        for i, (_, _, trial, value) in enumerate(trials[:following]):
            sufficient = value <= loss + beta * float((trial - w) @ gradient) + 1e-14
            assert sufficient == (i == following - 1)
            accepted += sufficient
    assert accepted == result.steps - result.rejected == len(batches)
