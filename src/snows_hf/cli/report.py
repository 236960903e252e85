"""``snows-hf report`` and ``snows-hf compare``"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.names import data_folder, model_folder
from ..jobs.request import check_report
from ..runtime.files import check_file
from .options import DataSplit, Device, Json, Quiet, Revision, checked
from .sink import Sink, open_sink


Pruned = Annotated[
    str,
    typer.Argument(help="Folder (or Hub id) of what `snows-hf prune` wrote.", callback=checked(model_folder)),
]


def command(
    model: Pruned,
    output: Annotated[Path | None, typer.Option(help="Folder for the two files. Default: MODEL.")] = None,
    dense: Annotated[str | None, typer.Option(help="The dense model, for its attention maps.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images for attention maps: Hub data set, image folder or parquet.", callback=checked(data_folder)
        ),
    ] = None,
    split: DataSplit = "test",
    images: Annotated[int, typer.Option(help="Images to draw.")] = 4,
    revision: Revision = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page about a pruned checkpoint: what was lost, where, what is saved."""
    check_report(model, output, images)

    from ..jobs.report import report

    sink = open_sink(as_json, quiet)
    result = report(
        model,
        output=output,
        dense=dense,
        data=data,
        split=split,
        images=images,
        revision=revision,
        device=device,
        on_stage=sink.stage,
    )
    sink.text(f"Report: {result['html']}")
    sink.json(result)


def compare_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folders (or Hub ids) of what `snows-hf prune` wrote.",
            callback=checked(model_folder),
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="HTML file to write besides.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set several pruned checkpoints side by side: accuracy, loss, size, operations, time."""
    if output is not None:
        check_file(output, ".html")

    from ..jobs.report import compare

    sink = open_sink(as_json, quiet)
    result = compare(models, output=output, on_stage=sink.stage)
    show(sink, result["models"])
    if output is not None:
        sink.text(f"Saved to {output}")
    sink.json(result)


def show(sink: Sink, rows: list[dict[str, Any]]) -> None:
    """The figures for people."""
    sink.table(
        ["", "pattern", "dense", "mask alone", "pruned", "drop", "measured on", "loss left (%)"],
        [
            (
                row["name"],
                row["pattern"],
                figure(row, "dense"),
                figure(row, "masked"),
                figure(row, "pruned") + (" (retrained)" if row["retrained"] else ""),
                figure(row, "drop"),
                "{name} ({split})".format(**row["eval_data"]) if row["eval_data"] else "",
                "" if row["loss_left"] is None else f"{100 * row['loss_left']:.1f}",
            )
            for row in rows
        ],
        title="Top-1 in per cent; share of the K-step loss at the start that is left",
    )
    sink.table(
        ["", "images", "products", "seconds", "MB, packed", "operations"],
        [
            (
                row["name"],
                str(row["samples"]),
                str(row["products"]),
                f"{row['seconds']:.0f}",
                f"{row['size']['packed'] / 1e6:.2f} of {row['size']['dense'] / 1e6:.2f}",
                f"1/{row['flops']['reduction']:.2f}",
            )
            for row in rows
        ],
        title="What it took, and what is saved",
    )


def figure(row: Mapping[str, Any], key: str) -> str:
    return "" if row[key] is None else f"{row[key]:.2f}"
