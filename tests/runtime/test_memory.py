"""Where activations rest, and the budget that decides it."""

import gc
import os
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from embedded import DIGITS, RESNET, VIT
from masks.networks import evidence, linears
from timm.models.resnet import BasicBlock, ResNet

from snows_hf import prune
from snows_hf.adapters import build_chain
from snows_hf.errors import ConfigError, MemoryLimitError
from snows_hf.masks.choices import fit_criterion, in_smaller_batches
from snows_hf.masks.choose import choose
from snows_hf.masks.criteria import needs_labels
from snows_hf.method.cascade import prune_chain
from snows_hf.method.factors import factor_bytes
from snows_hf.method.fitting import OVERHEAD, bytes_per_image, fit_batches
from snows_hf.runtime.memory import PREFIX, Images, Shelf, available, room, saved_bytes
from snows_hf.runtime.run import Run


def files(shelf: Shelf) -> list[Path]:
    return list(shelf.folder.glob("*.pt")) if shelf.folder else []


def test_a_shelf_gives_back_what_it_got_from_memory_and_from_disk():
    shelf = Shelf(limit=100)
    states = [(torch.arange(20.0), torch.arange(3)), (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),)]
    kept = [shelf.keep(state) for state in states]
    assert len(files(shelf)) == 2
    for place, state in zip(kept, states, strict=True):
        for got, expected in zip(place.get(), state, strict=True):
            assert torch.equal(got, expected) and got.stride() == expected.stride()


def test_places_are_freed_with_their_last_holder():
    shelf = Shelf(limit=80)
    first, second = shelf.keep((torch.zeros(20),)), shelf.keep((torch.zeros(20),))
    assert shelf.used == 80 and len(files(shelf)) == 1
    alias = second
    del first, second
    gc.collect()
    assert shelf.used == 0 and len(files(shelf)) == 1
    del alias
    gc.collect()
    assert not files(shelf)


def test_folders_of_processes_that_were_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned, young, users, other = (
        tmp_path / f"{PREFIX}{name}" for name in ("abandoned", "young", "users", "other")
    )
    living = Shelf(limit=0)
    kept = living.keep((torch.zeros(3),))
    for folder, name in [(abandoned, "0.pt"), (young, "0.pt"), (users, "model.safetensors"), (other, "0.pt")]:
        folder.mkdir()
        (folder / name).write_bytes(b"x")
    for folder in (abandoned, young, users):
        (folder / "lock").touch()
    for folder in (abandoned, living.folder, users, other):
        os.utime(folder, (0, 0))
    Shelf(limit=0).keep((torch.zeros(3),))
    assert not abandoned.exists() and young.exists() and users.exists() and other.exists()
    assert torch.equal(kept.get()[0], torch.zeros(3))


def test_a_slice_is_written_without_the_rest():
    shelf = Shelf(limit=0)
    shelf.keep((torch.zeros(100_000)[:10],)), (kept := shelf.keep((torch.zeros(100_000)[:10],)))
    assert sum(path.stat().st_size for path in files(shelf)) < 10_000
    assert kept.get()[0].shape == (10,)


@pytest.mark.parametrize("limit", [0, 50, 1e9])
def test_images_are_sliced_like_a_tensor(limit):
    whole = torch.arange(30.0)[:, None]
    images = Images(Shelf(limit))
    for chunk in whole.split([7, 1, 12, 10]):
        images.append(chunk)
    assert len(images) == 30
    for start in range(30):
        for stop in range(start + 1, 31):
            assert torch.equal(images[start:stop], whole[start:stop])


@pytest.mark.parametrize("network", [tiny.transformers_vit, tiny.cifar_resnet])
def test_pruning_from_disk_gives_the_same_bits(network):
    run = tiny.prune(network(), batch_size=3, sweeps=2)
    model = network()
    model.load_state_dict(run.dense.state_dict())
    shelf = Shelf(limit=0)
    images = Images(shelf)
    images.append(run.images)
    prune_chain(build_chain(model), images, run.masks, run.config)
    assert shelf.files > 10 and len(files(shelf)) == 1  # the images' own
    for name, tensor in run.pruned.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_saved_bytes_of_a_known_graph():
    x, a = torch.ones(1000, requires_grad=True), torch.ones(1000)
    assert saved_bytes(lambda: x * a) == 4000  # a alone: x's own gradient needs nothing else
    assert saved_bytes(lambda: (x * a) * a) == 4000  # the same storage twice


def test_saved_bytes_leaves_nothing_behind():
    made = []

    def build():  # softmax keeps its own output, and the gradient's graph keeps the forward's
        x = torch.ones(8, requires_grad=True)
        made.append(weakref.ref(x))
        return torch.autograd.grad(x.softmax(0).square().sum(), x, create_graph=True)

    assert saved_bytes(build) > 0
    gc.collect()
    assert made[0]() is None


def test_bytes_per_image_do_not_depend_on_the_images_and_grow_with_k():
    model = tiny.cifar_resnet()
    run = tiny.prune(model)
    chain = build_chain(model)
    sizes = [sum(bytes_per_image(chain, tiny.images(2), run.masks, run.config.updated(k=k))) for k in (0, 2, 8)]
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_batches_shrink_to_the_budget():
    run, said = tiny.prune(tiny.cifar_resnet()), []
    chain, images = build_chain(run.dense), tiny.images(2)
    graph, targets = bytes_per_image(chain, images, run.masks, run.config)
    each = graph + targets

    def fitted(left: int, **changes: object) -> int:
        settings = run.config.updated(batch_size=250, **changes)
        return fit_batches(Run(left=left, on_stage=said.append), chain, images, run.masks, settings).batch_size

    left = 2 * int(OVERHEAD * each * 10) + 2
    assert fitted(left) == 10
    assert said == ["Batches of 10 images in place of 250, to fit into memory"]
    assert fitted(left, joint_steps=3) < 10
    assert fitted(left + 2 * factor_bytes(run.masks), preconditioner="gram") >= 10
    assert fitted(10**12) == 250
    assert fitted(left, curvature_size=4) == 4 + 6 * each // targets
    assert fitted(left, curvature_size=11) == 10
    with pytest.raises(ConfigError, match="One image needs"):
        fitted(each)


@pytest.mark.parametrize("mask", ["snip", "fts", "hp", "hp-kstep", "wanda"])
def test_criteria_fit_into_the_budget_and_choose_the_same(mask):
    """What expands the loss of the whole network does so in smaller batches; what is kept of the images on the way
    rests where they do."""
    given, said = evidence(linears(), "0.5", mask, batch_size=8), []
    images = Images(Shelf(limit=0))
    images.append(given.images)
    everything = dict(given.everything.masks)
    each = sum(bytes_per_image(given.network, given.images[:2], everything, given.config.updated(joint_steps=1)))
    run = Run(left=2 * int(OVERHEAD * each * 3) + 2, on_stage=said.append)
    fitted = fit_criterion(replace(given, images=images, run=run))
    assert (fitted.config.batch_size < 8) == needs_labels(mask) == bool(said)
    expected, found = choose(given).masks, choose(fitted).masks
    if mask != "hp":  # whose probes are drawn for each batch
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["magnitude", "wanda", "alps", "snip", "grasp"])
def test_criteria_that_run_out_of_memory_choose_the_same_in_smaller_batches(mask):
    expected = choose(evidence(linears(), "2:4", mask, batch_size=8)).masks
    given, said = evidence(linears(), "2:4", mask, batch_size=8), []
    tiny.hungry(given.network, given.network.operations[0].name, fits=3)
    found = in_smaller_batches(choose, replace(given, run=Run(on_stage=said.append))).masks
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    sizes = [] if mask == "magnitude" else [4, 2]
    assert said == [f"Mask criterion {mask}: out of memory; again in batches of {size} images" for size in sizes]


def test_a_criterion_that_cannot_have_one_image():
    given, said = evidence(linears(), "2:4", "wanda", batch_size=8), []
    tiny.hungry(given.network, given.network.operations[0].name, fits=0)
    with pytest.raises(MemoryLimitError, match="Mask criterion wanda: memory does not suffice for a single image"):
        in_smaller_batches(choose, replace(given, run=Run(on_stage=said.append)))
    assert len(said) == 3


def test_factors_shrink_before_batches_do():
    """Down to blocks that take half of what is there; a run with them still improves every layer."""
    masks = tiny.magnitude_masks(tiny.cifar_resnet())
    sizes = [factor_bytes(masks, entries) for entries in (2**28, 2**12, 2**10, 2**8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 10
    for entries in (2**12, 2**8):  # a row's last block may be padded
        assert all(
            factor_bytes({name: mask}, entries) <= 2 * 4 * max(entries, mask.sum()) for name, mask in masks.items()
        )
    run = tiny.prune(tiny.cifar_resnet(), 40, preconditioner="gram", factor_entries=2**8)
    assert {report.status for report in run.reports} == {"improved"}

    model = tiny.randomised(ResNet(BasicBlock, [1, 1, 1, 1], channels=(32, 32, 32, 32), num_classes=3), 0)
    masks, said = tiny.magnitude_masks(model), []
    chain, images = build_chain(model), tiny.images(2)
    settings = tiny.config(preconditioner="gram", joint_steps=2, batch_size=4)
    needed = factor_bytes(masks)
    found = fit_batches(Run(left=2 * needed, on_stage=said.append), chain, images, masks, settings)
    assert found.solver.factor_entries < settings.solver.factor_entries and found.batch_size == 4
    assert factor_bytes(masks, found.solver.factor_entries) <= needed / 2
    assert len(said) == 1 and said[0].startswith("Preconditioner in blocks of")


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_no_more_than_its_limit(tmp_path, version):
    """The limit may be that of any group above; what the system can drop from its cache is free."""
    groups = tmp_path / "groups"
    job = groups / ("memory" if version == 1 else "") / "slice" / "job"
    job.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("5:memory:/slice/job\n4:cpu:/elsewhere\n" if version == 1 else "0::/slice/job\n")
    limit, current = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    everything = available(tmp_path / "nowhere", own)
    (job / f"memory.{limit}").write_text("max\n")
    assert available(groups, own) == pytest.approx(everything, rel=0.2)
    statistics = f"anon 7\n{'total_' * (version == 1)}inactive_file 500000\nslab 9"
    for name, value in [(limit, "5000000"), (current, "3000000"), ("stat", statistics)]:
        (job.parent / f"memory.{name}").write_text(value)
    assert available(groups, own) == 2_500_000
    (job.parent / f"memory.{current}").write_text("9000000")
    assert available(groups, own) == 0


def test_a_budget_that_the_libraries_exceed_is_refused():
    with pytest.raises(ConfigError, match=r"memory = 0.01 GB.*Give --memory [\d.]+ or more"):
        room(0.01)
    assert room(None) is None
    assert room(1000.0) > 900e9


@pytest.mark.slow
@pytest.mark.parametrize("model", [VIT, RESNET])
def test_an_offloaded_model_gives_the_same_bits(model: Path):
    """On the CPU, where nothing has to move: by the same way. Other devices: benchmarks/other_device.py."""
    given = {
        "data": DIGITS,
        "eval_data": DIGITS,
        "samples": 12,
        "layer_steps": 1,
        "joint_steps": 1,
        "mask": "sparsegpt",
    }
    said: list[str] = []
    here, there = (prune(model, "2:4", on_stage=said.append, offload=which, **given) for which in (None, True))
    assert any("stay in main memory, and come to cpu operation by operation" in stage for stage in said)
    assert (here.report["offloaded"], there.report["offloaded"]) == (False, True)
    for part in ("dense", "masked", "pruned"):
        assert here.report[part] == there.report[part]
    weights = there.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in here.model.state_dict().items())
