"""``snows-hf pack``, ``unpack`` and ``push``"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.files import check_output
from .command import Call, with_options
from .options import Model, Private, Revision
from .sink import Sink


Output = Annotated[Path, typer.Argument(help="Folder for the result, absent or empty.")]


@with_options()
def pack(call: Call, model: Model, output: Output, revision: Revision = None) -> None:
    """Store a sparse checkpoint without its zeros, losslessly; stock libraries need it unpacked again."""
    check_output(output, size=0)

    from ..hub.repack import pack as job

    repack(call, job)


@with_options()
def unpack(call: Call, model: Model, output: Output, revision: Revision = None) -> None:
    """Turn a packed checkpoint into an ordinary one: every weight bit for bit, in one file."""
    check_output(output, size=0)

    from ..hub.repack import unpack as job

    repack(call, job)


def repack(call: Call, job: Callable[..., dict[str, Any]]) -> None:
    model = call.options["model"]
    result = call.run(job, source=model)
    before, after = result["bytes_before"] / 1e6, result["bytes_after"] / 1e6
    call.sink.text(
        f"Weights: {before:.2f} MB in {model}, {after:.2f} MB in {result['output']} ({after / before:.3f})."
    )
    call.sink.json(result)


@with_options()
def push(
    call: Call,
    folder: Annotated[Path, typer.Argument(help="Folder of a saved checkpoint.")],
    repository: Annotated[str, typer.Argument(help="Where to on the Hub, as USER/NAME.")],
    private: Private = False,
) -> None:
    """Publish a saved checkpoint on the Hub, in one commit; a push that failed can be repeated."""
    call.sink.json(push_and_show(call.sink, folder, repository, private))


def push_and_show(sink: Sink, folder: Path, repository: str, private: bool) -> dict[str, Any]:
    """Pushes, tells people about it, and returns what a program may want to know."""
    from ..hub.push import push as job

    sink.stage(f"Pushing {folder} to {repository}")
    pushed = job(folder, repository, private)
    for name in pushed.left_out:
        sink.text(f"Not pushed, since it is no part of a checkpoint: {name}")
    for name in pushed.deleted:
        sink.text(f"Deleted there, since it would be read in place of the new weights: {name}")
    sink.text(f"Pushed to {pushed.url} (commit {pushed.revision[:8]})")
    return asdict(pushed)
