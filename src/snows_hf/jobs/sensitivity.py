"""How sensitive each layer is to each pattern: the measurement behind ``--allocation sensitivity``, as a job."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..adapters import build_chain
from ..adapters.check import select_layers
from ..adapters.offload import place
from ..data.images import open_images
from ..data.names import Name, short_name
from ..errors import ConfigError, SaveError
from ..hub.load import load
from ..masks import Evidence, split_by_fit
from ..masks.allocation import IMAGES, Sensitivity
from ..masks.choices import measure_sensitivities
from ..patterns import Unstructured, parse_candidates
from ..reports.describe import describe_data, finite
from ..runtime.device import find_device
from ..settings import preset as preset_for
from .calibration import DEFAULT_DATA, first_pass, read_calibration
from .request import check_mask, find_dtype


DEFAULT_PATTERNS = "0.5,0.6,0.7,0.8,0.9,0.95"


def sensitivity(
    model: Name,
    patterns: str = DEFAULT_PATTERNS,
    *,
    data: Name | None = None,
    data_split: str = "train",
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    preset: str = "default",
    on_layer: Callable[[Sensitivity], None] = lambda sensitivity: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures what each layer costs the network under each pattern, with all other layers dense.

    Args:
        model: Hub id or folder, of transformers or timm.
        patterns: with commas: ``"1:4,2:4,4:8"``, ``"0.5,0.8"``.
        data: calibration images, as for :func:`snows_hf.prune`; :data:`~snows_hf.masks.allocation.IMAGES` of them are
            used unless ``samples`` says fewer.
        data_split: split of ``data``.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: in which things are computed.
        revision: of the model on the Hub.
        preset: ``default`` or ``paper``.
        on_layer: called with each measurement.
        on_stage: called with a line of text when a new stage begins.
        **settings: changes to the preset, by the names of PruneConfig and SolverConfig: ``mask``, ``repair_steps`` …

    Returns:
        ``layers`` in forward order, each with ``name``, ``parameters``, ``weights``, ``flops`` and ``candidates``: for
        each pattern that fits, ``pattern``, ``sparsity`` and ``loss``, the mean squared error of the logits over their
        variance on images that the repair did not see (None where it is not finite); and what it was measured with.

    Raises:
        SnowsError: bad settings, model or data; see snows_hf.errors.
    """
    started = time.perf_counter()
    settings = {"samples": IMAGES, **settings}
    asked = [candidate for candidate in parse_candidates(patterns) if candidate is not None]
    candidates = [replace(c, scope="layer") if isinstance(c, Unstructured) else c for c in asked]
    check_mask(preset_for(preset, "", patterns).updated(**settings).mask)
    solver_dtype = find_dtype(dtype)
    target_device = find_device(device)
    name = data or DEFAULT_DATA

    on_stage(f"Loading {model}")
    checkpoint = load(model, revision)
    chain = build_chain(checkpoint.model)
    config = preset_for(preset, chain.family, patterns).updated(**settings)
    if config.mask.endswith(".safetensors"):
        raise ConfigError("A mask file says one sparsity for each layer; a sensitivity needs a mask criterion.")
    layers = select_layers(chain, config.layers)
    weights = {name: chain.weight(name).detach() for group in layers for name in group.parameters}
    for candidate in candidates:
        split_by_fit(weights, candidate)

    on_stage(f"Reading {config.samples} images of {name}")
    source = open_images(name, data_split)
    images, labels, _ = read_calibration(source, config, checkpoint, solver_dtype)
    flops, labels = first_pass(chain, images, labels, source, checkpoint)
    chain.model.to(solver_dtype)
    chain = place(chain, images[:2], target_device, config.offload, on_stage)
    on_stage(f"Measuring {len(layers)} layers under {len(candidates)} patterns")
    on_device = {name: chain.weight(name).detach() for name in weights}
    evidence = Evidence(on_device, candidates[0], config, chain, images, labels)
    table = measure_sensitivities(evidence, candidates, flops, None, on_stage, on_layer)
    return finite(
        {
            "source": short_name(checkpoint.source),
            "architecture": type(checkpoint.model).__name__,
            "patterns": [str(candidate) for candidate in candidates],
            "layers": [described(list(rows)) for _, rows in groupby(table, key=lambda row: row.layer)],
            "samples": len(images),
            "data": describe_data(name, data_split),
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


def check_plot(path: Path) -> None:
    """Refuses, before anything is measured, a plot that could not be made.

    Raises:
        ConfigError: matplotlib is not installed, or it does not write such files.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ConfigError("Plots need matplotlib, which is not installed.", "pip install 'snows-hf[viz]'") from error
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ConfigError(f"Plot {path}: expected a name that ends in one of {', '.join(sorted(kinds))}.")


def plot_sensitivity(result: dict[str, Any], path: Path) -> None:
    """Draws the losses of :func:`sensitivity` over the layers, a line for each pattern.

    Raises:
        ConfigError: as :func:`check_plot`.
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
    try:
        figure.savefig(path)
    except OSError as error:
        raise SaveError(
            f"Plot {path} cannot be written: {error.strerror or error}.", "Choose another file."
        ) from error
