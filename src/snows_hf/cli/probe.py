"""``snows-hf probe``"""

from typing import Annotated, Any

import typer

from ..data.names import data_folder
from ..jobs.request import check_probe
from .options import Device, EvalSplit, Json, Models, Quiet, checked
from .sink import Sink, open_sink
from .watch import Watch


def command(
    models: Models,
    data: Annotated[
        str,
        typer.Option(
            help="Labelled images of the classes to transfer to: Hub data set, image folder or parquet.",
            callback=checked(data_folder),
        ),
    ],
    train_split: Annotated[str, typer.Option(help="Split of --data that the probe is fitted on.")] = "train",
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Labelled images to measure on.", show_default="those of --data", callback=checked(data_folder)
        ),
    ] = None,
    test_split: EvalSplit = "test",
    samples: Annotated[int | None, typer.Option(help="Training images to draw. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, and of the split that chooses the regularisation.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a linear classifier on the frozen features of each model: what they transfer to other classes."""
    check_probe(data, train_split, eval_data, test_split, samples, seed)

    from ..jobs.probe import probe

    sink = open_sink(as_json, quiet)
    with Watch(sink) as watch:
        result = probe(
            models,
            data,
            train_split=train_split,
            eval_data=eval_data,
            test_split=test_split,
            samples=samples,
            seed=seed,
            device=device,
            **watch.told,
        )
    show(sink, result)
    sink.json(result)


def show(sink: Sink, result: dict[str, Any]) -> None:
    """The table for people; differences are to the first model, on the same images."""
    from ..data.names import distinct_names

    rows = []
    names = distinct_names([row["model"] for row in result["models"]])
    for name, row in zip(names, result["models"], strict=True):
        low, high = row["interval"]
        compared = ["", ""]
        if row["difference"] is not None:
            compared = [f"{row['difference']:+.2f}", "{:+.2f} … {:+.2f}".format(*row["difference_interval"])]
        rows.append([name, f"{row['top1']:.2f}", f"{low:.2f} … {high:.2f}", *compared])
    columns = ["", "top-1 (%)", "95 %"]
    if len(rows) > 1:
        columns += ["difference", "95 %"]
    sink.table(
        columns,
        [row[: len(columns)] for row in rows],
        title=f"Linear probe on {result['data']['name']}: {result['classes']} classes, {result['train_images']} "
        f"training and {result['test_images']} test images",
    )
