"""``snows-hf inspect``, ``report`` and ``compare``"""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import PatternError, shortened
from ..jobs.request import check_report
from ..runtime.files import check_file
from .command import Call, with_options
from .options import DataSplit, Device, Drawn, Model, Revision, images_option, model_argument
from .sink import Sink, shown, speed_in_words


@with_options()
def inspect(
    call: Call,
    model: Model,
    operations: Annotated[bool, typer.Option(help="List the operations that K counts (Eq. 3).")] = False,
    revision: Revision = None,
) -> None:
    """Show a checkpoint's prunable layers, and prove its sparsity pattern on the weights; exit with 1 where it is not
    held."""
    from ..jobs.inspect import inspect as job

    result = call.run(job, source=model)
    verdict = {True: "yes", False: "NO", None: "dense"}
    call.sink.table(
        {
            "layer": "{name}",
            "shape": lambda layer: "x".join(map(str, layer["shape"])),
            "zeros (%)": lambda layer: f"{100 * layer['sparsity']:.1f}",
            "pattern": lambda layer: shown(layer["pattern"] or ""),
            "held": lambda layer: verdict[layer["pattern_ok"]],
        },
        result["layers"],
    )
    if operations:
        call.sink.table(
            {"operation": "{name}", "index": "{index}", "solves for": lambda operation: operation["group"] or ""},
            result["operations"],
            "Operations: K counts the ones after a layer's own",
        )
    pattern = f"pattern {result['pattern']}" if result["pattern"] else "no pattern"
    call.sink.text(
        f"{result['architecture']} ({result['library']}): {pattern}, {100 * result['sparsity']:.1f} % of the prunable "
        f"weights are zero."
    )
    if result["faster"]:
        call.sink.text(f"It says of itself: {speed_in_words(result['faster'])} `snows-hf bench` measures it.")
    for reason in dict.fromkeys(result["never_pruned"].values()):
        names = [name for name, own in result["never_pruned"].items() if own == reason]
        call.sink.text(f"Never pruned, since {reason}: {shortened(names)}.")
    call.sink.json(result)
    if result["pattern"] is not None and not result["pattern_ok"]:
        broken = [layer["name"] for layer in result["layers"] if layer["pattern_ok"] is False]
        raise PatternError(
            f"{model} does not hold the pattern {result['pattern']} that it claims: {shortened(broken)}.",
            "These layers have weights where the pattern has zeros: prune it again.",
        )


@with_options()
def report(
    call: Call,
    model: Annotated[str, model_argument("Folder (or Hub id) of what `snows-hf prune` wrote.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the two files. Default: MODEL.")] = None,
    dense: Annotated[str | None, typer.Option(help="The dense model, for its attention maps.")] = None,
    data: Annotated[
        str | None, images_option("Images for attention maps: Hub data set, image folder or parquet.")
    ] = None,
    split: DataSplit = "test",
    images: Drawn = 4,
    revision: Revision = None,
    device: Device = "auto",
) -> None:
    """Write a page about a pruned checkpoint: what was lost, where, what is saved."""
    check_report(model, output, images)

    from ..jobs.report import report as job

    result = call.run(job)
    call.sink.text(f"Report: {result['html']}")
    call.sink.json(result)


@with_options()
def compare(
    call: Call,
    models: Annotated[list[str], model_argument("Folders (or Hub ids) of what `snows-hf prune` wrote.", "MODEL...")],
    output: Annotated[Path | None, typer.Option(help="HTML file to write besides.")] = None,
) -> None:
    """Set several pruned checkpoints side by side: accuracy, loss, size, operations, time."""
    if output is not None:
        check_file(output, ".html")

    from ..jobs.report import compare as job

    result = call.run(job)
    show_models(call.sink, result["models"])
    if output is not None:
        call.sink.text(f"Saved to {output}")
    call.sink.json(result)


def show_models(sink: Sink, rows: list[dict[str, Any]]) -> None:
    """The figures for people."""
    rows = [row | {"retrained": " (retrained)" if row["retrained"] else ""} for row in rows]
    sink.table(
        {
            "": "{name}",
            "pattern": "{pattern}",
            "dense": "{dense:.2f}",
            "mask alone": "{masked:.2f}",
            "pruned": "{pruned:.2f}{retrained}",
            "drop": "{drop:.2f}",
            "measured on": "{eval_data[name]} ({eval_data[split]})",
            "loss left (%)": lambda row: "" if row["loss_left"] is None else f"{100 * row['loss_left']:.1f}",
        },
        rows,
        "Top-1 in per cent; share of the K-step loss at the start that is left",
    )
    sink.table(
        {
            "": "{name}",
            "images": "{samples}",
            "products": "{products}",
            "seconds": "{seconds:.0f}",
            "MB, packed": lambda row: f"{row['size']['packed'] / 1e6:.2f} of {row['size']['dense'] / 1e6:.2f}",
            "operations": "1/{flops[reduction]:.2f}",
        },
        rows,
        "What it took, and what is saved",
    )
