"""``snows-hf pack`` and ``snows-hf unpack``"""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Quiet
from .sink import Sink, calm_libraries


Source = Annotated[Path, typer.Argument(help="Folder of a transformers or timm checkpoint.")]
Output = Annotated[Path, typer.Argument(help="Folder for the result, absent or empty.")]


def pack_command(source: Source, output: Output, as_json: Json = False, quiet: Quiet = False) -> None:
    """Store a sparse checkpoint without its zeros, losslessly; stock libraries need it unpacked again."""
    from ..hub.repack import pack

    calm_libraries()
    pack(source, output)
    _show(Sink(as_json, quiet), source, output)


def unpack_command(source: Source, output: Output, as_json: Json = False, quiet: Quiet = False) -> None:
    """Turn a packed checkpoint into an ordinary one, bit for bit."""
    from ..hub.repack import unpack

    calm_libraries()
    unpack(source, output)
    _show(Sink(as_json, quiet), source, output)


def _show(sink: Sink, source: Path, output: Path) -> None:
    before, after = (sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, output))
    sink.text(f"Weights: {before / 1e6:.2f} MB in {source}, {after / 1e6:.2f} MB in {output} ({after / before:.3f}).")
    sink.json({"output": str(output), "bytes_before": before, "bytes_after": after})
