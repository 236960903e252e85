"""``snows-hf pack`` and ``snows-hf unpack``"""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.files import check_output
from .options import Json, Model, Quiet, Revision
from .sink import Sink, open_sink


Output = Annotated[Path, typer.Argument(help="Folder for the result, absent or empty.")]


def pack_command(
    model: Model, output: Output, revision: Revision = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Store a sparse checkpoint without its zeros, losslessly; stock libraries need it unpacked again."""
    check_output(output, size=0)

    from ..hub.repack import pack

    sink = open_sink(as_json, quiet)
    _show(sink, model, pack(model, output, revision))


def unpack_command(
    model: Model, output: Output, revision: Revision = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Turn a packed checkpoint into an ordinary one: every weight bit for bit, in one file."""
    check_output(output, size=0)

    from ..hub.repack import unpack

    sink = open_sink(as_json, quiet)
    _show(sink, model, unpack(model, output, revision))


def _show(sink: Sink, model: str, result: dict[str, Any]) -> None:
    before, after = result["bytes_before"] / 1e6, result["bytes_after"] / 1e6
    sink.text(f"Weights: {before:.2f} MB in {model}, {after:.2f} MB in {result['output']} ({after / before:.3f}).")
    sink.json(result)
