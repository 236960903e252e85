"""Numbers and memory that give out: every layer says so, and keeps the best weights that it had."""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from snows_hf.adapters import build_chain
from snows_hf.errors import MemoryLimitError
from snows_hf.jobs.subject import restore_untouched
from snows_hf.method.cascade import prune_chain
from snows_hf.method.layers import smaller
from snows_hf.method.objective import Segment
from snows_hf.method.records import LayerReport
from snows_hf.method.streams import Streams
from snows_hf.runtime.distributed import share, whole
from snows_hf.runtime.journal import Journal
from snows_hf.runtime.memory import Shelf, halves, in_parts, out_of_memory
from snows_hf.runtime.run import Progress, Run


NETWORKS = [tiny.transformers_vit, tiny.cifar_resnet]


def solved(model: nn.Module, images: Tensor, **changes: object) -> list[LayerReport]:
    """Prunes in place, and checks what must hold whatever happens."""
    masks = tiny.magnitude_masks(model)
    dense = {name: model.get_parameter(name).detach().clone() for name in masks}
    settings = tiny.config(**{"preconditioner": "gram", "weighting": "relative", "batch_size": 3} | changes)
    reports = prune_chain(build_chain(model), images, masks, settings)
    for report in reports:
        assert (report.loss_pruned < report.loss_start) == (report.status == "improved")
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight.isfinite().all() and not weight[~mask].any()
        if all(report.status != "improved" for report in reports):
            assert torch.equal(weight, dense[name] * mask), name
    return reports


def statuses(reports: list[LayerReport]) -> set[str]:
    return {report.status for report in reports}


def with_value(image: int, value: float) -> Tensor:
    images = tiny.images(8)
    images[image, 0, 0, 0] = value
    return images


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("joint_steps", [0, 2])
@pytest.mark.parametrize(
    "images",
    [with_value(0, float("nan")), with_value(0, float("inf")), with_value(-1, float("nan")), 1e200 * tiny.images(8)],
    ids=["NaN", "infinite", "NaN judges", "overflow of float64"],
)
def test_activations_that_are_not_finite(network: Callable, images: Tensor, joint_steps: int) -> None:
    reports = solved(network(), images, joint_steps=joint_steps)
    assert statuses(reports) == {"non_finite"}
    assert all("best finite weights were kept" in report.remedy for report in reports)


@pytest.mark.parametrize("network", NETWORKS)
def test_half_precision_that_overflows(network: Callable) -> None:
    reports = solved(network().half(), (6e4 * tiny.images(8)).half())
    assert statuses(reports) == {"non_finite"}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_does_not(network: Callable, dtype: torch.dtype) -> None:
    assert "improved" in statuses(solved(network().to(dtype), tiny.images(8).to(dtype)))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("damping", [pytest.param(1e-4, marks=pytest.mark.slow), 0.0])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_constant_inputs_whose_gram_matrices_are_singular(network: Callable, constant: float, damping: float) -> None:
    images = torch.full_like(tiny.images(8), constant)
    assert statuses(solved(network(), images, damping=damping)) == {"improved"}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("curvature", ["gauss-newton", pytest.param("hessian", marks=pytest.mark.slow)])
def test_dead_channels(network: Callable, curvature: str) -> None:
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter[::2] = 0
    assert "improved" in statuses(solved(model, tiny.images(8), curvature=curvature))


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_of_zero(network: Callable) -> None:
    """Nothing to keep, and nothing to lose: targets that do not vary and are all zero among them."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    solved(model, tiny.images(8))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("joint_steps", [0, 2])
def test_one_image(network: Callable, count: int, joint_steps: int) -> None:
    assert statuses(solved(network(), tiny.images(count), joint_steps=joint_steps)) <= {"improved", "not_improved"}


def test_one_image_and_one_class() -> None:
    """A single logit has no variance; its weight is a number all the same."""
    model = tiny.transformers_vit()
    model.classifier = nn.Linear(8, 1).double()
    assert statuses(solved(model, tiny.images(1), k=100)) == {"improved"}


@pytest.mark.parametrize("y, expected", [([5.0], 25.0), ([2.0, 2.0], 4.0), ([0.0, 0.0], 1.0), ([0.0, 2.0], 2.0)])
def test_the_variance_of_what_does_not_vary(y: list[float], expected: float) -> None:
    assert whole(len(y)).variance(torch.tensor(y)) == expected


def test_weights_beyond_the_checkpoints_own_type() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    original = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.float()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1e9, 1.0], [0.0, -1e9]]))
    masks = {f"{i}.weight": torch.ones(2, 2, dtype=torch.bool) for i in range(2)}
    assert restore_untouched(network, original, masks) == ["0.weight"]
    assert network[0].weight.tolist() == [[65504.0, 1.0], [0.0, -65504.0]]
    assert torch.equal(network[0].bias, original["0.bias"]) and network[0].weight.dtype == torch.float16


# What does not fit into memory


def last_operation(model: nn.Module) -> str:
    return build_chain(model).operations[-1].name


@pytest.mark.parametrize("joint_steps", [0, 2])
def test_batches_are_halved_until_they_fit(joint_steps: int) -> None:
    model, said = tiny.cifar_resnet(), list[str]()
    chain = tiny.hungry(build_chain(model), last_operation(model), fits=4)
    settings = tiny.config(batch_size=12, joint_steps=joint_steps)
    reports = prune_chain(chain, tiny.images(18), tiny.magnitude_masks(model), settings, Run(on_stage=said.append))
    sizes = [report.batch_size for report in reports]
    assert sizes[0] > 4 >= sizes[-1]  # the first layers do not reach that far
    notes = [line for line in said if "out of memory" in line]
    assert "out of memory; solved again in batches of" in notes[0]
    assert all(report.loss_pruned <= report.loss_start for report in reports)
    assert any(report.status == "improved" for report in reports if report.batch_size <= 4)


def test_activations_that_do_not_fit_move_in_parts() -> None:
    whole_run, parts = (copy.deepcopy(tiny.cifar_resnet()) for _ in range(2))
    masks, settings = tiny.magnitude_masks(whole_run), tiny.config(k=0, batch_size=12)
    prune_chain(build_chain(whole_run), tiny.images(18), masks, settings)
    # An operation between two layers: no objective runs it at K = 0.
    chain = build_chain(parts)
    name = next(
        o.name for i, o in enumerate(chain.operations) if o.group is None and 0 < i < len(chain.operations) - 2
    )
    prune_chain(tiny.hungry(chain, name, fits=3), tiny.images(18), masks, settings)
    for key, tensor in whole_run.state_dict().items():
        torch.testing.assert_close(tensor, parts.state_dict()[key])


@pytest.mark.slow
def test_what_is_halved_stays_so_after_a_run_that_was_broken_off(tmp_path: Path) -> None:
    def run(stop_at: int | None, journal: Journal) -> nn.Module:
        model = tiny.cifar_resnet()
        seen = done = 0

        def progress(progress: Progress) -> None:
            nonlocal seen, done
            seen += progress.done == done + 1
            done = int(progress.done)
            if seen == stop_at:
                raise KeyboardInterrupt

        chain = tiny.hungry(build_chain(model), last_operation(model), fits=4)
        settings = tiny.config(batch_size=12, joint_steps=2)
        prune_chain(
            chain, tiny.images(18), tiny.magnitude_masks(model), settings, Run(journal=journal, on_progress=progress)
        )
        return model

    for stop_at in (2, 5, 6):
        with pytest.raises(KeyboardInterrupt):
            run(stop_at, Journal(tmp_path))
    for first, second in zip(
        run(None, Journal()).parameters(), run(None, Journal(tmp_path)).parameters(), strict=True
    ):
        assert torch.equal(first, second)


@pytest.mark.slow
def test_single_images_that_do_not_fit_are_solved_with_a_smaller_k() -> None:
    model, said = tiny.cifar_resnet(), list[str]()
    chain = tiny.hungry(build_chain(model), last_operation(model), fits=0)
    settings = tiny.config(k=100, batch_size=2)
    reports = prune_chain(chain, tiny.images(6), tiny.magnitude_masks(model), settings, Run(on_stage=said.append))
    groups = [index for index, _ in chain.groups() if index < len(chain.operations) - 1]
    assert [report.k for report in reports] == [len(chain.operations) - 2 - index for index in groups]
    assert {report.batch_size for report in reports} == {1}
    first = reports[0]
    notes = [line for line in said if "out of memory" in line]
    assert notes[:2] == [
        f"{first.name}: out of memory; solved again {less}"
        for less in ("in batches of 1 images", f"with K = {first.k}")
    ]
    assert all(report.loss_pruned <= report.loss_start for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "joint_steps", "remedy"), [(0, 0, r"Give --device cpu"), (None, 2, r"Set joint_steps to 0")]
)
def test_one_image_that_does_not_fit_is_an_error_of_its_layer(
    group: int | None, joint_steps: int, remedy: str
) -> None:
    model = tiny.cifar_resnet()
    chain = build_chain(model)
    place = -1 if group is None else chain.groups()[group][0]
    tiny.hungry(chain, chain.operations[place].name, fits=0)
    settings = tiny.config(k=0, joint_steps=joint_steps)
    with pytest.raises(MemoryLimitError, match=rf": memory does not suffice for a single image\. {remedy}"):
        prune_chain(chain, tiny.images(6), tiny.magnitude_masks(model), settings)


def test_one_process_of_several_ends_where_another_would_go_on_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snows_hf.method.layers.processes", lambda: 2)
    chain = tiny.chain_of(tiny.cifar_resnet())
    index, group = chain.groups()[0]
    streams = Streams.start(tiny.images(8), [slice(0, 4), slice(4, 8)], Shelf())
    with pytest.raises(MemoryLimitError, match=rf"{group.name}: out of memory, in one process of several"):
        smaller(Segment.cut(chain, index, 1), streams)


def test_what_counts_as_out_of_memory() -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert not out_of_memory(RuntimeError("shapes do not match")) and not out_of_memory(KeyboardInterrupt())
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert out_of_memory(error.value)
    with pytest.raises(MemoryLimitError, match="single image"):
        in_parts(lambda state: (torch.empty(10**15),), (torch.zeros(3),))
    with pytest.raises(RuntimeError, match="shapes"):
        in_parts(lambda state: (_ for _ in ()).throw(RuntimeError("shapes")), (torch.zeros(4),))


@pytest.mark.parametrize("size", range(1, 9))
def test_halves(size: int) -> None:
    parts = halves(slice(3, 3 + size))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(3, 3 + size))
    assert len(parts) == min(size, 2)


@pytest.mark.parametrize("sizes", [(4, 4, 3), (1, 1), (5, 1), (1, 2)])
def test_streams_halve_batches_and_keep_a_judge(sizes: tuple[int, ...]) -> None:
    images = torch.arange(sum(sizes))[:, None]
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    streams = Streams.start(images, [slice(*pair) for pair in pairwise(ends)], Shelf())
    streams.halve()
    for states in (streams.dense, streams.pruned):
        *learners, judge = [kept.get()[0].flatten().tolist() for kept in states]
        assert [i for batch in learners for i in batch] == list(range(ends[-2]))
        assert judge == list(range(ends[-2], ends[-2] + -(-sizes[-1] // 2)))
        assert [len(batch) for batch in [*learners, judge]] == [streams.size(i) for i in range(len(states))]


def test_one_process_has_all_images() -> None:
    part = share(5)
    assert (part.start, part.stop, part.weight, part.alone) == (0, 5, 1.0, True)
    x = torch.randn(5, 3)
    assert part.sum(x) is x and torch.equal(part.mean(x), x) and part.variance(x) == float(x.var())
