"""``snows-hf push``"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, Private, Quiet
from .sink import Sink, open_sink


def command(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved checkpoint.")],
    repository: Annotated[str, typer.Argument(help="Where to on the Hub, as USER/NAME.")],
    private: Private = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a saved checkpoint on the Hub, in one commit; a push that failed can be repeated."""
    sink = open_sink(as_json, quiet)
    sink.json(push_and_show(sink, folder, repository, private))


def push_and_show(sink: Sink, folder: Path, repository: str, private: bool) -> dict[str, Any]:
    """Pushes, tells people about it, and returns what a program may want to know."""
    from ..hub.push import push

    sink.stage(f"Pushing {folder} to {repository}")
    pushed = push(folder, repository, private)
    for name in pushed.left_out:
        sink.text(f"Not pushed, since it is no part of a checkpoint: {name}")
    for name in pushed.deleted:
        sink.text(f"Deleted there, since it would be read in place of the new weights: {name}")
    sink.text(f"Pushed to {pushed.url} (commit {pushed.revision[:8]})")
    return asdict(pushed)
