"""``snows-hf demo``: the main job on a model and data that come with the package."""

import shlex
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from ..jobs.request import check_pruning
from ..runtime.files import check_output
from .options import Json, Output, Quiet
from .prune import show_report
from .sink import open_sink
from .watch import Watch


def command(
    model: Annotated[str, typer.Option(help="vit or resnet.")] = "vit",
    pattern: Annotated[str, typer.Option(help="As for prune.")] = "2:4",
    output: Output = Path("snows-demo"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a small model that comes with the package, on real scanned digits, with nothing to download."""
    if model not in ("vit", "resnet"):
        raise typer.BadParameter("expected vit or resnet", param_hint="--model")
    check_pruning(pattern, "default", {})
    check_output(output, size=0)

    import torch

    from ..jobs.prune import prune

    # Such small matrices gain nothing from a second thread, and where other programs use the processor threads that
    # wait for each other cost many times the work itself.
    torch.set_num_threads(1)
    sink = open_sink(as_json, quiet)
    with as_file(files("snows_hf") / "embedded") as embedded, Watch(sink) as watch:
        digits = str(embedded / "digits")
        result = prune(
            str(embedded / f"{model}_digits"),
            pattern,
            data=digits,
            eval_data=digits,
            output=output,
            **watch.told,
        )
    show_report(sink, result.report)
    sink.text("Try next:")
    for line in (
        f"snows-hf inspect {shlex.quote(str(output))}",
        f"snows-hf report {shlex.quote(str(output))}",
        "snows-hf prune google/vit-base-patch16-224 --pattern 2:4",
        "snows-hf prune timm/resnet50.a1_in1k --pattern 2:4 --samples 1000",
    ):
        sink.text(f"  {line}")
    sink.json(result.report)
