"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer


Model = Annotated[str, typer.Argument(help="Hub id or folder of a transformers or timm image classifier.")]
Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Hub ids or folders; the first is what others are compared with."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and the object of --json).")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew, where the last run of this was broken off.")]
DataSplit = Annotated[str, typer.Option(help="Split of --data.")]
Labelled = Annotated[str, typer.Option(help="Labelled images: Hub data set, image folder or parquet.")]
EvalData = Annotated[str | None, typer.Option(help="Labelled images to measure accuracy on.")]
EvalSplit = Annotated[str, typer.Option(help="Split of --eval-data.")]
Output = Annotated[Path, typer.Option(help="Folder for the result.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the Hub private.")]


def given(**settings: Any) -> dict[str, Any]:
    """Those that the user gave; the others keep the defaults of the job."""
    return {name: value for name, value in settings.items() if value is not None}
