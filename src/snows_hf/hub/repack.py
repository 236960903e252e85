"""A checkpoint's folder packed and unpacked again: the format of the file is in packed.py.

Every tensor comes back bit for bit, and so does every file without weights. The weights come back in one
model.safetensors as safetensors writes it: the file that went in, byte for byte, if safetensors wrote that one with at
most one key of metadata, as transformers, timm and ``prune`` do.
"""

import re
import shutil
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Template
from safetensors.torch import save_file
from torch import Tensor

from ..data.names import Name
from ..errors import LoadError, one_line
from ..runtime.files import check_output, whole_folder, write_json
from .card import PLACEHOLDER
from .folder import find_folder, is_custom, leads_out, read_json
from .packed import PACKED_FILE, check_packed, opened, read_packed, write_packed


DENSE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Put into config.json and README.md as text, so that taking them out again restores every byte.
_CONFIG_OPENING = '{\n  "quantization_config": {"quant_method": "snows"},'
# What the card says of loading holds for the unpacked copy alone: until then it is a comment.
_LOADING = re.compile("\n## How to load it\n.*?(?=\n## |\\Z)", re.DOTALL)
_PACKED_CARD = re.compile("\n<!-- packed -->\n.*?\n<!-- unpacked:\n(.*?)\nend of unpacked -->\n", re.DOTALL)


def pack(source: Name, output: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Makes a packed copy of a checkpoint; everything but weights, config.json and card is copied as it is.

    Args:
        output: folder for the copy, absent or empty.

    Returns:
        ``output``, and the bytes of weights ``bytes_before`` and ``bytes_after``.

    Raises:
        LoadError: no such checkpoint, no safetensors weights, packed or quantised already, or a link to elsewhere.
        SaveError: the output cannot be written.
    """
    return _copied(pack_into, source, Path(output), revision)


def unpack(source: Name, output: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Makes an ordinary copy of a packed checkpoint, which stock transformers and timm load: :func:`pack` undone.

    Its weights are in one model.safetensors, also where they came from shards.

    Raises:
        LoadError: no such checkpoint, not packed, damaged, or with a link to elsewhere.
        SaveError: the output cannot be written.
    """
    return _copied(unpack_into, source, Path(output), revision)


def _copied(into: Callable[[Path, Path], None], source: Name, output: Path, revision: str | None) -> dict[str, Any]:
    check_output(output, size=0)
    original = find_folder(source, revision)
    with whole_folder(output) as folder:
        into(original, folder)
        before, after = (sum(p.stat().st_size for p in each.glob("*.safetensors")) for each in (original, folder))
    return {"output": str(output), "bytes_before": before, "bytes_after": after}


def pack_into(source: Path, folder: Path) -> None:
    """Like :func:`pack`, into an existing folder."""
    if (source / PACKED_FILE).exists():
        raise LoadError(f"{source} is packed already.", "`snows-hf unpack` makes an ordinary checkpoint of it.")
    weights, tensors, metadata = weight_files(source), dict[str, Tensor](), dict[str, str]()
    for name in sorted(weights - {INDEX_FILE}):
        with opened(source / name) as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
            metadata |= file.metadata() or {}
    path = source / "config.json"
    text = _read_text(path)
    config = read_json(path, text=text)
    if "quantization_config" in config:
        raise LoadError(f"{source} is quantised.", "Only checkpoints of plain weights can be packed.")
    packed_text = text.replace("{", _CONFIG_OPENING, 1)
    read_json(path, text=packed_text)
    _copy(source, folder, {*weights, INDEX_FILE}, partial(_packed_card, custom=is_custom(config)))
    write_packed(folder / PACKED_FILE, tensors, metadata or None)
    (folder / "config.json").write_bytes(packed_text.encode())


def unpack_into(source: Path, folder: Path) -> None:
    """Like :func:`unpack`, into an existing folder."""
    path = source / PACKED_FILE
    if not path.is_file():
        raise LoadError(f"{source} has no {PACKED_FILE}.", "Give what `snows-hf pack` made.")
    check_packed(path)
    restored = _read_text(source / "config.json").replace(_CONFIG_OPENING, "{", 1)
    config = read_json(source / "config.json", text=restored)
    _copy(source, folder, {PACKED_FILE}, lambda card: _PACKED_CARD.sub(r"\1", card, count=1))
    tensors, metadata = read_packed(path)
    save_file(tensors, folder / DENSE_FILE, metadata)
    (folder / "config.json").write_bytes(restored.encode())
    if config.pop("quantization_config", None) is not None:  # somebody wrote config.json anew
        write_json(folder / "config.json", config)


def _packed_card(text: str, custom: bool) -> str:
    found = _LOADING.search(text)
    start, end = found.span() if found else (len(text), len(text))
    template = files("snows_hf.hub").joinpath("packed_card_template.md").read_text(encoding="utf-8")
    values = {"here": PLACEHOLDER, "packed_file": PACKED_FILE, "custom": custom, "unpacked": text[start:end]}
    return text[:start] + Template(template, keep_trailing_newline=True).render(values) + text[end:]


def weight_files(folder: Path) -> set[str]:
    """Names of the files that a loader reads a folder's weights from: packed, one file, or the shards of an index.

    Raises:
        LoadError: there are none, or the index names other things than files beside it.
    """
    for name in (PACKED_FILE, DENSE_FILE):
        if (folder / name).is_file():
            return {name}
    index = folder / INDEX_FILE
    if not index.is_file():
        raise LoadError(f"{folder} has no {DENSE_FILE}.", "Expected a safetensors checkpoint of transformers or timm.")
    shards = read_json(index, text=_read_text(index)).get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    if not names or any(Path(name).name != name or not (folder / name).is_file() for name in names):
        raise LoadError(f"{index} names shards that are not beside it.", "Download or copy it again.")
    return names | {INDEX_FILE}


def _copy(source: Path, folder: Path, weights: set[str], card: Callable[[str], str]) -> None:
    """Copies what is no weights, with a card that is changed so, and leaves out config.json."""

    def copy(path: str | Path, to: str | Path) -> None:
        check_own(Path(path), source)
        shutil.copyfile(path, to)

    for path in sorted(source.iterdir()):
        if path.name == "README.md" and path.is_file():
            (folder / path.name).write_bytes(card(_read_text(path)).encode())
        elif path.is_file() and path.name not in weights | {"config.json"}:
            copy(path, folder / path.name)
        elif path.is_dir() and not path.name.startswith("."):
            shutil.copytree(path, folder / path.name, copy_function=copy)


def check_own(path: Path, folder: Path) -> None:
    """Refuses, with a :class:`LoadError`, to copy what a link puts into a checkpoint's folder from elsewhere."""
    if leads_out(path, folder):
        fault = f"{path} is a link to {path.resolve()}, which is no part of the checkpoint, and is not copied."
        raise LoadError(fault, "Put the file itself in its place, or remove it.")


def _read_text(path: Path) -> str:
    check_own(path, path.parent)
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {one_line(error)}") from error
