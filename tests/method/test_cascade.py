"""Algorithm 3 on tiny networks of every family."""

import copy

import pytest
import tiny
import torch
from torch import nn

from snows_hf.adapters import build_chain, frozen
from snows_hf.method.cascade import prune_chain
from snows_hf.method.objective import ActiveWeights, Segment
from snows_hf.method.streams import Batches, Streams, split_images
from snows_hf.runtime.memory import Shelf
from snows_hf.runtime.run import Progress, Run


ALL = [tiny.transformers_vit, tiny.timm_vit, tiny.cifar_resnet, tiny.timm_resnet]
SLOW = {tiny.timm_vit, tiny.timm_resnet}
NETWORKS = [pytest.param(net, marks=pytest.mark.slow) if net in SLOW else net for net in ALL]
SETTINGS = [
    {"targets": "dense"},
    {"targets": "cascaded", "curvature": "hessian"},
    {"targets": "dense", "preconditioner": "gram", "weighting": "relative"},
]


def run_id(param: tuple) -> str:
    network, given = param
    return "-".join([network.__name__, *given.values()])


RUNS = [
    pytest.param((net, given), marks=[pytest.mark.slow] if net in SLOW else [], id=run_id((net, given)))
    for net in ALL
    for given in SETTINGS
]


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest) -> tiny.Run:
    network, given = request.param
    return tiny.prune(network(), batch_size=3, **given)


def test_every_group_is_reported_in_forward_order(run):
    names = [group.name for _, group in tiny.chain_of(run.dense).groups() if group.parameters[0] in run.masks]
    assert [report.name for report in run.reports] == names
    assert names


def test_no_layer_is_worse_than_its_masked_start(run):
    for report in run.reports:
        assert report.loss_pruned <= report.loss_start == report.loss_masked
        assert (report.status == "improved") == (report.loss_pruned < report.loss_start)
    assert any(report.status == "improved" for report in run.reports)


def test_reported_losses_are_those_of_the_weights_in_the_model(run):
    for report in run.reports:
        masked, pruned = run.losses(report)
        assert report.loss_start == pytest.approx(masked, rel=1e-9)
        assert report.loss_pruned == pytest.approx(pruned, rel=1e-9)


def test_pruned_weights_are_zero_exactly_where_masked(run):
    for report in run.reports:
        weights = [run.pruned.get_parameter(name) for name in report.parameters]
        for name, weight in zip(report.parameters, weights, strict=True):
            assert torch.equal(weight != 0, run.masks[name])
        total = sum(weight.numel() for weight in weights)
        assert report.sparsity == pytest.approx(sum(int((w == 0).sum()) for w in weights) / total)
        assert report.shape == (sum(w.shape[0] for w in weights), *weights[0].shape[1:])


def test_everything_without_a_mask_keeps_its_bits(run):
    dense = run.dense.state_dict()
    for name, tensor in run.pruned.state_dict().items():
        if name not in run.masks:
            assert torch.equal(tensor, dense[name]), name


def test_the_same_run_gives_the_same_bits(run):
    model = copy.deepcopy(run.dense)
    reports = prune_chain(build_chain(model), run.images, run.masks, run.config)
    for name, tensor in run.pruned.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for first, second in zip(run.reports, reports, strict=True):
        assert {**first.to_dict(), "seconds": 0} == {**second.to_dict(), "seconds": 0}


@pytest.mark.parametrize("network", NETWORKS)
def test_both_kinds_of_targets_agree_on_the_first_layer_and_differ_later(network):
    dense, cascaded = (tiny.prune(network(), targets=targets, batch_size=3) for targets in ("dense", "cascaded"))
    first, other = dense.reports[0], cascaded.reports[0]
    assert {**first.to_dict(), "seconds": 0} == {**other.to_dict(), "seconds": 0}
    for name in first.parameters:
        assert torch.equal(dense.pruned.get_parameter(name), cascaded.pruned.get_parameter(name))
    assert dense.reports[-1].loss_start != cascaded.reports[-1].loss_start


def test_targets_halfway_are_the_mean_of_both_and_the_judge_sees_the_dense():
    chain, images = build_chain(tiny.transformers_vit()), tiny.images(6)
    index, group = next((i, group) for i, group in chain.groups() if group.kind == "mlp3")
    segment = Segment.cut(chain, index, 3)
    masks = {name: torch.ones_like(chain.weight(name), dtype=torch.bool) for name in group.parameters}
    active = ActiveWeights.of(group, masks, torch.device("cpu"))
    with torch.no_grad(), frozen(chain.model):
        state = next(state for i, _, state in chain.walk((images,)) if i == index)
        pruned = tuple(tensor + 0.1 for tensor in state)
        shelf = Shelf()
        kept = [[shelf.keep(each)] * 2 for each in (state, pruned)]
        streams = Streams(shelf, *kept, [slice(0, 6)] * 2)

        def targets(kind: str, step: int | None = 0) -> list[torch.Tensor]:
            config = tiny.config(targets=kind)
            return list(Batches(segment, {}, active, streams, config, [(0, 0)]).objective(0, step).targets)

        dense, cascaded, halfway = map(targets, ("dense", "cascaded", "halfway"))
    for found, one, other in zip(halfway, dense, cascaded, strict=True):
        torch.testing.assert_close(found, (one + other) / 2)
        assert not torch.equal(one, other)
    assert all(map(torch.equal, targets("halfway", step=None), dense))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_to_the_end_brings_the_logits_nearer(network):
    run = tiny.prune(network(), count=40, k=1000, batch_size=30, cg_max_iter=15)
    masked = build_chain(network())
    fresh = tiny.images(40, seed=99)
    with torch.no_grad(), frozen(run.dense), frozen(run.pruned), frozen(masked.model):
        for name, mask in run.masks.items():
            masked.weight(name).mul_(mask)
        expected = tiny.chain_of(run.dense).logits(fresh)
        pruned = (tiny.chain_of(run.pruned).logits(fresh) - expected).square().mean()
        start = (masked.logits(fresh) - expected).square().mean()
    assert pruned < start


@pytest.mark.parametrize("network", NETWORKS)
def test_a_single_masked_layer_is_the_only_one_that_changes(network):
    model = network()
    masks = tiny.magnitude_masks(model)
    name = list(masks)[len(masks) // 2]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    reports = prune_chain(build_chain(model), tiny.images(6), {name: masks[name]}, tiny.config())
    assert len(reports) == 1
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key != name)


def test_no_mask_at_all_changes_nothing():
    model = tiny.cifar_resnet()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert prune_chain(build_chain(model), tiny.images(6), {}, tiny.config()) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def in_place(model: nn.Module, inplace: bool = True) -> nn.Module:
    """The model with every ReLU of its own in place, or none."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.ReLU(inplace))
    return model


def flags(model: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {f"{name}.training": module.training for name, module in model.named_modules()}
    found |= {f"{n}.inplace": m.inplace for n, m in model.named_modules() if hasattr(m, "inplace")}
    return found | {f"{name}.requires_grad": p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("network", [*NETWORKS, lambda: in_place(tiny.cifar_resnet())])
@pytest.mark.parametrize("training", [False, True])
def test_modes_and_flags_are_put_back(network, training):
    model = network().train(training)
    next(model.children()).train(not training)  # modules may differ from each other
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    before = flags(model)
    masks = dict(list(tiny.magnitude_masks(model).items())[:2])
    prune_chain(build_chain(model), tiny.images(4), masks, tiny.config())
    assert flags(model) == before


def test_modes_and_flags_are_put_back_after_an_error():
    class InterruptionError(Exception):
        pass

    def interrupt(progress: Progress) -> None:
        raise InterruptionError

    model = in_place(tiny.cifar_resnet()).train()
    before = flags(model)
    with pytest.raises(InterruptionError):
        prune_chain(
            build_chain(model), tiny.images(4), tiny.magnitude_masks(model), tiny.config(), Run(on_progress=interrupt)
        )
    assert flags(model) == before


def test_in_place_activations_change_no_result():
    plain, overwriting = (tiny.prune(in_place(tiny.cifar_resnet(), inplace)) for inplace in (False, True))
    for name, tensor in plain.pruned.state_dict().items():
        assert torch.equal(tensor, overwriting.pruned.state_dict()[name]), name


def test_progress_tells_of_every_layer():
    model, seen = tiny.transformers_vit(), []
    masks = tiny.magnitude_masks(model)
    said: list[str] = []
    run = Run(on_stage=said.append, on_progress=seen.append)
    reports = prune_chain(build_chain(model), tiny.images(8), masks, tiny.config(batch_size=3), run)
    assert [line.split(":")[0] for line in said] == [
        f"{i:3d}/{len(reports)} {report.name}" for i, report in enumerate(reports, 1)
    ]
    starts = [p for p in seen if not p.detail and p.done < p.total and p.done == int(p.done)]
    assert {(p.done, p.part) for p in starts} >= {(i, report.name) for i, report in enumerate(reports)}
    assert {p.total for p in seen} == {len(reports)}
    assert [p.done for p in seen] == sorted(p.done for p in seen) and seen[-1].done == len(reports)
    for i, report in enumerate(reports):
        steps = [p for p in seen if p.part == report.name and p.detail]
        assert len(steps) == report.steps
        assert all(i < p.done < i + 1 for p in steps)
        if steps:
            assert steps[-1].detail.endswith(f"loss {report.loss_start:.4g} → {report.loss_pruned:.4g}")


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (1, [1, 1]),  # one image is both batch and judge
        (2, [1, 1]),
        (5, [4, 1]),
        (250, [225, 25]),
        (513, [231, 231, 51]),
    ],
)
def test_split_images(count, sizes):
    images = torch.arange(count)[:, None]
    batches = [images[part] for part in split_images(count, batch_size=250, held_out=0.1)]
    assert [len(batch) for batch in batches] == sizes
    assert torch.equal(torch.cat(batches)[:count], images)
    if count > 1:
        assert torch.equal(torch.cat(batches), images)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
@pytest.mark.parametrize("held_out", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("count", [2, 3, 20, 101])
def test_split_images_into_equal_batches_that_never_judge(count, held_out, batch_size):
    *learners, judges = (torch.arange(count)[part] for part in split_images(count, batch_size, held_out))
    sizes = {len(batch) for batch in learners}
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert len(judges) == min(max(1, round(held_out * count)), count - 1, batch_size)
    assert torch.cat([*learners, judges]).tolist() == list(range(count))


@pytest.mark.parametrize("targets", ["dense", "cascaded"])
def test_a_second_sweep_starts_from_the_first_and_is_no_worse(targets):
    """Its losses are measured with everything after a layer pruned, and against the dense network's outputs."""
    once = tiny.prune(tiny.cifar_resnet(), targets=targets)
    twice = tiny.prune(tiny.cifar_resnet(), targets=targets, sweeps=2)
    first, second = twice.reports[: len(once.reports)], twice.reports[len(once.reports) :]
    assert [report.sweep for report in second] == [2] * len(first)
    for a, b in zip(first, once.reports, strict=True):
        assert {**a.to_dict(), "seconds": 0} == {**b.to_dict(), "seconds": 0}
    for name, mask in twice.masks.items():
        assert torch.equal(twice.pruned.get_parameter(name) != 0, mask)
    for report in second:
        assert report.loss_pruned <= report.loss_start
    assert second[0].loss_pruned < second[0].loss_start


@pytest.mark.parametrize("network", NETWORKS)
def test_the_joint_solve_lowers_the_loss_of_the_whole_network(network):
    """Its losses, recomputed from the networks before and after it on the images that judge."""
    before = tiny.prune(network(), count=100)
    after = tiny.prune(network(), count=100, joint_steps=6)
    *layers, joint = after.reports
    assert (joint.name, joint.sweep, joint.sparsity) == ("all layers", 2, pytest.approx(0.5))
    assert set(joint.parameters) == set(after.masks)
    for a, b in zip(layers, before.reports, strict=True):
        assert {**a.to_dict(), "seconds": 0} == {**b.to_dict(), "seconds": 0}
    for name, mask in after.masks.items():
        assert torch.equal(after.pruned.get_parameter(name) != 0, mask)

    images = after.images[split_images(len(after.images), after.config.batch_size, after.config.held_out)[-1]]
    with torch.no_grad(), frozen(after.dense), frozen(after.pruned), frozen(before.pruned):
        dense, masked, pruned = (tiny.chain_of(net)((images,)) for net in (after.dense, before.pruned, after.pruned))
    losses = [
        sum(float((o - y).square().mean()) for o, y in zip(outputs, dense, strict=True))
        for outputs in (masked, pruned)
    ]
    assert [joint.loss_start, joint.loss_pruned] == pytest.approx(losses, rel=1e-9)
    assert joint.loss_pruned < joint.loss_start


def test_weights_without_a_mask_are_there_from_the_beginning_and_targets_are_of_the_dense_network():
    """A joint loss recomputed by hand, where the last layer's weight was doubled beforehand."""
    network = tiny.cifar_resnet()
    chain, images = tiny.chain_of(copy.deepcopy(network)), tiny.images(40)
    config = tiny.config(joint_steps=1, sweeps=0, max_backtracks=0, cg_max_iter=1)
    *others, last = (name for _, group in chain.groups() for name in group.parameters)
    masks = {name: torch.ones_like(chain.weight(name), dtype=torch.bool) for name in others}
    doubled = 2 * chain.weight(last).detach()
    *_, joint = prune_chain(chain, images, masks, config, start={last: doubled})
    assert torch.equal(chain.weight(last), doubled)

    judges = images[split_images(len(images), config.batch_size, config.held_out)[-1]]
    with torch.no_grad(), frozen(network):
        dense, started = tiny.chain_of(network)((judges,)), tiny.chain_of(copy.deepcopy(network))
        started.put({last: doubled})
        with frozen(started.model):
            outputs = started((judges,))
    loss = sum(float((o - y).square().mean()) for o, y in zip(outputs, dense, strict=True))
    assert joint.loss_start == pytest.approx(loss, rel=1e-9) and loss > 0


@pytest.mark.slow
def test_augmented_images_teach_and_never_judge():
    settings = {"joint_steps": 4, "average": 3}
    plain, augmented, again = (
        tiny.prune(tiny.cifar_resnet(), count=200, augment=augment, **settings) for augment in (False, True, True)
    )
    assert augmented.reports[-1].loss_start == plain.reports[-1].loss_start > augmented.reports[-1].loss_pruned
    assert augmented.reports[-1].loss_pruned != plain.reports[-1].loss_pruned
    for name in augmented.masks:
        assert torch.equal(augmented.pruned.get_parameter(name), again.pruned.get_parameter(name))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_better_start_is_taken_and_a_worse_one_is_not(network):
    """The start never enters the targets: losses are those of the dense network's, whichever start was taken."""
    plain = tiny.prune(network(), 12)
    reached = {name: plain.pruned.get_parameter(name).detach() for name in plain.masks}
    worse = {name: 100 * weight for name, weight in reached.items()}
    runs = {}
    for what, start in (("better", reached), ("worse", worse)):
        pruned = network()
        reports = prune_chain(build_chain(pruned), plain.images, plain.masks, plain.config, start=start)
        runs[what] = tiny.Run(plain.dense, pruned, plain.masks, plain.images, plain.config, reports)
    assert runs["worse"].reports[0].loss_start == plain.reports[0].loss_start
    assert all(
        torch.equal(runs["worse"].pruned.get_parameter(name), plain.pruned.get_parameter(name)) for name in plain.masks
    )
    first = runs["better"].reports[0]
    assert first.loss_start == pytest.approx(plain.reports[0].loss_pruned, rel=1e-9)
    assert first.loss_pruned <= plain.reports[0].loss_pruned
    for report in runs["better"].reports:
        assert report.loss_pruned == pytest.approx(runs["better"].losses(report)[1], rel=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_loss_masked_is_that_of_the_mask_alone_whatever_a_layer_begins_with(network):
    """Of the dense weights under the mask, on the images that judge, also where a criterion's weights begin; and there
    is none where no dense weights are left to mask."""
    plain = tiny.prune(network(), 12)
    start = {name: plain.pruned.get_parameter(name).detach() for name in plain.masks}
    pruned = network()
    reports = prune_chain(build_chain(pruned), plain.images, plain.masks, plain.config, start=start)
    run = tiny.Run(plain.dense, pruned, plain.masks, plain.images, plain.config, reports)
    for report in reports:
        objective = run.held_out_objective(report)
        with torch.no_grad(), frozen(run.dense), frozen(pruned):
            own, theirs = (
                objective.value(objective.active.gather({name: weights[name] for name in report.parameters}))
                for weights in (run.dense.state_dict(), start)
            )
        assert report.loss_masked == pytest.approx(own, rel=1e-9)
        assert report.loss_start == pytest.approx(min(own, theirs), rel=1e-9)
    assert any(report.loss_start < report.loss_masked for report in reports)

    longer = plain.config.updated(sweeps=2, joint_steps=2)
    later = prune_chain(build_chain(network()), plain.images, plain.masks, longer, start=start)
    assert [report.loss_masked for report in later[: len(reports)]] == [report.loss_masked for report in reports]
    assert [report.sweep for report in later[len(reports) :]] == [2] * len(reports) + [3]
    assert all(report.loss_masked is None for report in later[len(reports) :])
