"""``snows-hf pack`` and ``snows-hf unpack``"""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Quiet
from .sink import Sink, open_sink


Source = Annotated[Path, typer.Argument(help="Folder of a transformers or timm checkpoint.")]
Output = Annotated[Path, typer.Argument(help="Folder for the result, absent or empty.")]


def pack_command(source: Source, output: Output, as_json: Json = False, quiet: Quiet = False) -> None:
    """Store a sparse checkpoint without its zeros, losslessly; stock libraries need it unpacked again."""
    from ..hub.repack import pack

    sink = open_sink(as_json, quiet)
    pack(source, output)
    _show(sink, source, output)


def unpack_command(source: Source, output: Output, as_json: Json = False, quiet: Quiet = False) -> None:
    """Turn a packed checkpoint into an ordinary one, bit for bit."""
    from ..hub.repack import unpack

    sink = open_sink(as_json, quiet)
    unpack(source, output)
    _show(sink, source, output)


def _show(sink: Sink, source: Path, output: Path) -> None:
    before, after = (sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, output))
    sink.text(f"Weights: {before / 1e6:.2f} MB in {source}, {after / 1e6:.2f} MB in {output} ({after / before:.3f}).")
    sink.json({"output": str(output), "bytes_before": before, "bytes_after": after})
