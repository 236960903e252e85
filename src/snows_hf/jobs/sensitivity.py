"""How sensitive each layer is to each pattern: the measurement behind ``--allocation sensitivity``, as a job."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..adapters.offload import place
from ..data.images import open_images
from ..data.names import Name, short_name
from ..masks.allocation import IMAGES, Sensitivity
from ..masks.choices import measure_sensitivities
from ..masks.evidence import Evidence
from ..patterns import Unstructured, parse_candidates
from ..patterns.plan import Candidate
from ..reports.describe import describe_data, finite
from ..runtime.files import write_whole
from ..runtime.run import Progress, Run
from .calibration import calibrate, first_pass
from .measure import check_mask_labels
from .request import DEFAULT_DATA, DEFAULT_PATTERNS, check_plot, check_sensitivity, find_dtype
from .subject import load_subject


def sensitivity(
    model: Name,
    patterns: str = DEFAULT_PATTERNS,
    *,
    data: Name | None = None,
    data_split: str = "train",
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    effort: str = "standard",
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures what each layer costs the network under each pattern, with all other layers dense.

    Args:
        model: Hub id or folder, of transformers or timm.
        patterns: with commas: ``"1:4,2:4,4:8"``, ``"0.5,0.8"``.
        data: calibration images; :data:`~snows_hf.masks.allocation.IMAGES` of them are used unless ``samples`` says
            fewer.
        others: as for :func:`snows_hf.prune`.

    Returns:
        ``layers`` in forward order, each with ``name``, ``parameters``, ``weights``, ``flops`` and ``candidates``: for
        each pattern that fits, ``pattern``, ``sparsity`` and ``loss``, the mean squared error of the logits over their
        variance on images that the repair did not see (None where it is not finite); and what it was measured with.

    Raises:
        SnowsError: bad settings, model or data; see snows_hf.errors.
    """
    started = time.perf_counter()
    settings = {"samples": IMAGES, **settings}
    check_sensitivity(patterns, effort, settings)
    # A layer is measured by itself: a share of zeros is its own.
    candidates: list[Candidate] = [
        replace(candidate, scope="layer") if isinstance(candidate, Unstructured) else candidate
        for candidate in parse_candidates(patterns)
        if candidate is not None
    ]
    first = next(candidate for candidate in candidates if candidate is not None)
    run = Run.begin(device, dtype=find_dtype(dtype), on_stage=on_stage, on_progress=on_progress)
    data = data or DEFAULT_DATA

    subject = load_subject(run, model, revision, candidates, effort, patterns, settings)
    config = subject.config
    check_mask_labels(config, subject.checkpoint)
    calibration = calibrate(run, open_images(data, data_split), config, subject.checkpoint)
    subject = subject.for_images(calibration.images[:1])
    flops, labels = first_pass(subject.chain, calibration, subject.checkpoint)
    subject.network.to(run.dtype)
    chain = place(run, subject.chain, calibration.images[:2], config.offload)
    run.say(f"Measuring {len(subject.layers)} layers under {len(candidates)} patterns")
    on_device = {name: chain.weight(name).detach() for name in subject.weights}
    evidence = Evidence(on_device, first, config, chain, calibration.images, labels, run)
    table = measure_sensitivities(evidence, candidates, flops)
    return finite(
        {
            "source": short_name(subject.checkpoint.source),
            "architecture": type(subject.network).__name__,
            "patterns": [str(candidate) for candidate in candidates],
            "layers": [described(list(rows)) for _, rows in groupby(table, key=lambda row: row.layer)],
            "samples": len(calibration.images),
            "data": describe_data(data, data_split),
            "settings": config.to_dict(),
            "seconds": time.perf_counter() - started,
        }
    )


def described(rows: list[Sensitivity]) -> dict[str, Any]:
    """One layer of the report."""
    first = rows[0]
    return {
        "name": first.layer,
        "parameters": list(first.parameters),
        "weights": first.weights,
        "flops": first.flops,
        "candidates": [
            {"pattern": str(row.pattern), "sparsity": 1 - row.kept / row.weights, "loss": row.loss} for row in rows
        ],
    }


def plot_sensitivity(result: dict[str, Any], path: Path) -> None:
    """Draws the losses of :func:`sensitivity` over the layers, a line for each pattern.

    Raises:
        ConfigError: as :func:`~snows_hf.jobs.request.check_plot`.
        SaveError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    names = [layer["name"] for layer in result["layers"]]
    figure = Figure(figsize=(max(6.0, 0.3 * len(names)), 5.0), layout="constrained")
    axes = figure.subplots()
    for pattern in result["patterns"]:
        found = {
            i: candidate["loss"]
            for i, layer in enumerate(result["layers"])
            for candidate in layer["candidates"]
            if candidate["pattern"] == pattern and candidate["loss"]
        }
        axes.plot(list(found), list(found.values()), marker="o", label=pattern)
    if any(candidate["loss"] for layer in result["layers"] for candidate in layer["candidates"]):
        axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    axes.set_ylabel("error of the logits / their variance")
    axes.set_title(f"{result['source']}: one layer sparse, all others dense")
    axes.legend()
    write_whole(path, lambda partial: figure.savefig(partial, format=path.suffix.removeprefix(".")))
