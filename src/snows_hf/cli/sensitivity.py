"""``snows-hf sensitivity``"""

from pathlib import Path
from typing import Annotated

import typer

from .options import DataSplit, Device, Json, Model, Quiet, Revision, given
from .sink import open_sink, shown
from .watch import Watch


def command(
    model: Model,
    patterns: Annotated[
        str | None, typer.Option(help="With commas: 1:4,2:4,4:8, or 0.5,0.8. Default: sparsities from 0.5 to 0.95.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Images, as for prune. Default: timm/mini-imagenet.")] = None,
    data_split: DataSplit = "train",
    samples: Annotated[int | None, typer.Option(help="Images; a quarter repairs, the others judge.")] = None,
    mask: Annotated[str | None, typer.Option(help="Mask criterion, as for prune.")] = None,
    repair_steps: Annotated[
        int | None, typer.Option(help="Newton steps of a layer before it is judged; 0: the mask alone.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Measure only layers that match this wildcard; may be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the table to this file (.png, .svg, .pdf).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice of images.")] = None,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each layer costs the network under each pattern, all other layers dense."""
    from ..jobs.sensitivity import DEFAULT_PATTERNS, check_plot, plot_sensitivity, sensitivity

    sink = open_sink(as_json, quiet)
    if plot is not None:
        check_plot(plot)

    settings = given(samples=samples, mask=mask, repair_steps=repair_steps, seed=seed)
    settings |= given(layers=tuple(layers) if layers else None)
    patterns = patterns or DEFAULT_PATTERNS
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
