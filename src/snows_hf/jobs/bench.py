"""Latency and throughput: of a 2:4 model with dense and with sparse kernels, of a smaller model and the dense one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from ..adapters.outputs import outputs_of
from ..data.names import Name
from ..runtime.device import describe_hardware
from ..runtime.memory import out_of_memory
from ..runtime.run import Progress, Run
from .accelerate import accelerate, device_obstacle, linear_layers, obstacle
from .request import check_bench
from .subject import load_told


SECONDS = 0.5
"""A figure is the median of four runs or more, in this time or up to four times as much where they are uneven; those
that warm up do not count."""

ROUNDS = 7
"""Times that two models take turns: what else the machine does meets both."""

NOTHING: dict[str, Any] = {"batches": [], "layers_batch": None, "layers": [], "difference": None}


def bench(
    source: Name,
    batch_sizes: Sequence[int] = (1, 4, 16, 64, 256),
    dtype: str = "float16",
    device: str = "auto",
    revision: str | None = None,
    dense: Name | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Measures a checkpoint's forward pass on random images, dense and after :func:`snows_hf.accelerate`; with a
    ``dense`` model that a smaller one was made of, see :func:`bench_smaller`.

    Returns:
        ``supported``, and ``reason`` where it is False (nothing is timed then); ``sparse_layers`` (that qualify by
        type, shape and pattern), ``dense_layers`` with reasons; ``batches`` with milliseconds, images per second and
        ``ratio`` (dense over sparse time: above 1 sparse is faster), or ``failed`` where memory does not suffice;
        ``layers`` with the same for each sparse layer at ``layers_batch``, the largest for which there is memory;
        ``difference``, the largest between dense and sparse outputs over the largest of each output.

    Raises:
        SnowsError: bad settings, or no such checkpoint.
    """
    if dense is not None:
        return bench_smaller(source, dense, batch_sizes, dtype, device, revision, on_stage, on_progress)
    check_bench(batch_sizes, dtype)
    run = Run.begin(device, on_stage=on_stage, on_progress=on_progress)
    checkpoint = load_told(run, source, revision)
    model = checkpoint.model.to(run.device, getattr(torch, dtype)).requires_grad_(False)
    reasons = {name: obstacle(layer.weight) for name, layer in linear_layers(model).items()}
    able = [name for name, reason in reasons.items() if reason is None]
    missing = None if able else "no Linear layer of this model can run sparse"
    result: dict[str, Any] = {
        "source": checkpoint.source,
        "device": describe_hardware(run.device),
        "dtype": dtype,
        "supported": False,
        "reason": device_obstacle(run.device) or missing,
        "sparse_layers": able,
        "dense_layers": {name: reason for name, reason in reasons.items() if reason is not None},
        **NOTHING,
    }
    if result["reason"] is not None:
        return result
    sparse = deepcopy(model)
    done = accelerate(sparse)
    result |= {"sparse_layers": list(done.sparse), "dense_layers": done.dense}
    if not done.sparse:
        return result | {"reason": "torch refuses every layer: see dense_layers"}
    _, *size = checkpoint.preprocess([PIL.Image.new("RGB", (64, 64))]).shape
    return result | {"supported": True} | compare(run, model, sparse, done.sparse, size, batch_sizes)


@torch.inference_mode()
def bench_smaller(
    source: Name,
    dense: Name,
    batch_sizes: Sequence[int] = (1, 8),
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Measures the forward passes of a smaller checkpoint and of the dense one that it was made of, by their
    libraries' own code, in turns, on random images.

    Returns:
        ``device``, ``dtype``, ``threads``, ``parameters`` of both, and ``batches`` with the medians in milliseconds
        and ``ratio``, the median over the turns of dense over smaller time, beside its ``least`` and ``most``.

    Raises:
        SnowsError: bad settings, or no such checkpoint.
    """
    check_bench(batch_sizes, dtype, smaller=True)
    run = Run.begin(device, on_stage=on_stage, on_progress=on_progress)
    checkpoints = {"dense": load_told(run, dense), "smaller": load_told(run, source, revision)}
    models = {n: c.model.to(run.device, getattr(torch, dtype)).requires_grad_(False) for n, c in checkpoints.items()}
    _, *size = checkpoints["dense"].image().shape
    rows = []
    for count in run.track(batch_sizes, "Timing batches", len(batch_sizes), "of {}".format):
        images = torch.randn(count, *size, generator=torch.Generator().manual_seed(0))
        images = images.to(run.device, getattr(torch, dtype))
        rows.append({"batch": count, **in_turns({name: partial(model, images) for name, model in models.items()})})
    return {
        "source": checkpoints["smaller"].source,
        "dense": checkpoints["dense"].source,
        "device": describe_hardware(run.device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "batches": rows,
    }


def in_turns(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of a ``dense`` and a ``smaller`` run that take turns, the median ``ratio`` of a turn, and
    the ``least`` and the ``most`` that one had, which lie apart where other programs run at the same time."""
    times = [{name: time_ms(each, SECONDS / 2) for name, each in runs.items()} for _ in range(ROUNDS)]
    ratios = [turn["dense"] / turn["smaller"] for turn in times]
    found = {f"{name}_ms": median(turn[name] for turn in times) for name in runs}
    return found | {"ratio": median(ratios), "least": min(ratios), "most": max(ratios)}


@torch.inference_mode()
def compare(
    run: Run,
    dense: nn.Module,
    sparse: nn.Module,
    layers: Sequence[str],
    size: Sequence[int],
    batch_sizes: Sequence[int],
) -> dict[str, Any]:
    """Times a network and the same one with other kernels on images of a ``size`` (3, height, width): as a whole at
    each batch size, and the Linear ``layers`` that differ at the largest that fits."""

    def random_images(count: int) -> Tensor:
        return torch.randn(count, *size, generator=torch.Generator().manual_seed(0)).to(next(dense.parameters()))

    found: dict[str, Any] = NOTHING | {"batches": []}
    for count in run.track(batch_sizes, "Timing batches", len(batch_sizes), "of {}".format):
        times = if_it_fits(lambda n: versus(dense, sparse, random_images(n)), count) or {"failed": "out of memory"}
        for which in ("dense", "sparse") if "failed" not in times else ():
            times[f"{which}_images_per_s"] = 1000 * count / times[f"{which}_ms"]
        found["batches"].append({"batch": count, **times})
    run.say("Timing single layers")
    # They may need more memory than the whole: the inputs of all of them are kept.
    for count in sorted((row["batch"] for row in found["batches"] if "failed" not in row), reverse=True):
        each = if_it_fits(lambda n: compare_layers(dense, sparse, layers, random_images(n)), count)
        if each is not None:
            return found | {"layers_batch": count, **each}
    return found


def compare_layers(dense: nn.Module, sparse: nn.Module, layers: Sequence[str], images: Tensor) -> dict[str, Any]:
    """Times of the named layers on what they get of the images, and the difference of the outputs."""
    inputs: dict[str, Tensor] = {}
    pairs: dict[str, tuple[Any, Any]] = {
        name: (dense.get_submodule(name), sparse.get_submodule(name)) for name in layers
    }
    with ExitStack() as hooks:
        for name, (layer, _) in pairs.items():
            note = partial(lambda name, _, given: inputs.update({name: given[0]}), name)
            hooks.enter_context(layer.register_forward_pre_hook(note))
        expected = outputs_of(dense, images)
    found = outputs_of(sparse, images)
    difference = max(
        float((found[name].float() - own.float()).abs().max() / own.abs().max()) for name, own in expected.items()
    )
    rows = [
        {"name": name, "shape": list(pairs[name][0].weight.shape), **versus(*pairs[name], x)}
        for name, x in inputs.items()
    ]
    return {"layers": rows, "difference": difference}


def if_it_fits(run: Callable[[int], dict[str, Any]], count: int) -> dict[str, Any] | None:
    """What a run with this number of images returns; None where memory does not suffice."""
    try:
        return run(count)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None


def versus(dense: nn.Module, sparse: nn.Module, x: Tensor) -> dict[str, Any]:
    """Times of both on one input, and dense over sparse."""
    dense_ms, sparse_ms = (time_ms(partial(module, x)) for module in (dense, sparse))
    return {"dense_ms": dense_ms, "sparse_ms": sparse_ms, "ratio": dense_ms / sparse_ms}


def time_ms(run: Callable[[], Any], seconds: float = SECONDS) -> float:
    """Median time of a run in milliseconds, the device's work included."""
    from torch.utils.benchmark import Timer  # loads what looks for compilers, and warns of them

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1000 * timer.adaptive_autorange(min_run_time=seconds, max_run_time=4 * seconds).median
