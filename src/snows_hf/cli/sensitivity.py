"""``snows-hf sensitivity``"""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.names import data_folder
from ..jobs.request import DEFAULT_DATA, DEFAULT_PATTERNS, check_plot, check_sensitivity
from ..settings import PruneConfig, preset as preset_for
from .options import DataSplit, Device, Json, Model, Quiet, Revision, Set, checked, setting, settings_from
from .sink import open_sink, shown
from .watch import Watch


def command(
    model: Model,
    patterns: Annotated[str, typer.Option(help="With commas: 1:4,2:4,4:8, or 0.5,0.8.")] = DEFAULT_PATTERNS,
    data: Annotated[str, typer.Option(help="Images, as for prune.", callback=checked(data_folder))] = DEFAULT_DATA,
    data_split: DataSplit = "train",
    samples: Annotated[
        int | None, typer.Option(help="Images; a quarter repairs, the others judge.", show_default="256")
    ] = None,
    mask: Annotated[str | None, setting(PruneConfig, "mask")] = None,
    repair_steps: Annotated[int | None, setting(PruneConfig, "repair_steps")] = None,
    layers: Annotated[list[str] | None, setting(PruneConfig, "layers")] = None,
    pairs: Set = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table to this file (.png, .svg, .pdf).")] = None,
    seed: Annotated[int | None, setting(PruneConfig, "seed")] = None,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each layer costs the network under each pattern, all other layers dense."""
    own: dict[str, Any] = {
        "samples": samples,
        "mask": mask,
        "repair_steps": repair_steps,
        "layers": layers or None,
        "seed": seed,
    }
    settings = settings_from(preset_for("default", "", patterns), pairs, **own)
    check_sensitivity(patterns, "default", settings)
    if plot is not None:
        check_plot(plot)

    from ..jobs.sensitivity import plot_sensitivity, sensitivity

    sink = open_sink(as_json, quiet)

    with Watch(sink) as watch:
        result = sensitivity(
            model,
            patterns,
            data=data,
            data_split=data_split,
            device=device,
            revision=revision,
            **watch.told,
            **settings,
        )
    losses = [{c["pattern"]: c["loss"] for c in layer["candidates"]} for layer in result["layers"]]
    sink.table(
        ["layer", "weights", *map(shown, result["patterns"])],
        [
            (layer["name"], f"{layer['weights']:,}", *(cell(found, pattern) for pattern in result["patterns"]))
            for layer, found in zip(result["layers"], losses, strict=True)
        ],
        title="Error of the logits over their variance, one layer sparse and all others dense",
    )
    if plot is not None:
        plot_sensitivity(result, plot)
        sink.text(f"Plot saved to {plot}")
    sink.json(result)


def cell(found: dict[str, float | None], pattern: str) -> str:
    """A loss for people: nothing where the pattern does not fit."""
    if pattern not in found:
        return ""
    loss = found[pattern]
    return "not finite" if loss is None else f"{loss:.2g}"
