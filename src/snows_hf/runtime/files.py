"""Files and folders that are on the disk in whole, or not there at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from ..errors import ConfigError, SaveError, one_line


PLACING = "placing"
"""A file of the work folder, from when the result begins to move to its place: what is there then is ours."""


def check_output(output: Path, size: int) -> None:
    """Refuses, before any work is done, an output folder that could not take ``size`` bytes at the end.

    Raises:
        SaveError: it exists and is not empty, its parent cannot be written, or the disk has no room.
    """
    work = work_folder(output)
    try:
        if output.exists() and not output.is_dir():
            raise SaveError(f"Output {output} exists and is a file.", "Choose another --output.")
        entries = {path.name for path in output.iterdir()} if output.exists() else set()
        if entries - {work.name} and not (work / PLACING).exists():
            raise SaveError(f"Output {output} exists and is not empty.", "Choose another --output, or remove it.")
        place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        raise unwritable(output, error) from error
    if free < size:
        fault = f"Output {output} needs {size / 1e6:.1f} MB, and its disk has {free / 1e6:.1f} MB left."
        raise SaveError(fault, "Free some space, or choose another --output.")


def unwritable(output: Path, error: OSError) -> SaveError:
    return SaveError(f"Output {output} cannot be written: {error.strerror or error}.", "Choose another --output.")


@contextmanager
def whole_folder(output: Path, work: Path | None = None) -> Iterator[Path]:
    """A fresh folder whose files are in ``output``, and on the disk, when the block ends well, and gone when it does
    not.

    An ``output`` that exists already, empty, stays the folder that it is (a mount point, say) and is filled. Until
    then the fresh folder is in ``work``; without one it is hidden, beside ``output`` or in it.

    Raises:
        SaveError: the disk is full or refuses.
    """
    output = output.resolve()
    hidden = (output if output.exists() else output.parent) / f".{output.name}.partial-{uuid4().hex[:8]}"
    partial = hidden if work is None else work / "result"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    try:
        partial.mkdir(parents=True)
        yield partial
        mode = partial.stat().st_mode & 0o666  # what the umask allows; safetensors would keep its file to the owner
        for path in filter(Path.is_file, partial.rglob("*")):
            path.chmod(mode)
            sync(path)
        sync(partial)
        if work is not None:
            (work / PLACING).touch()
            sync(work)
        if output.exists():
            for path in partial.iterdir():
                path.rename(output / path.name)
            sync(output)
        else:
            partial.rename(output)
            sync(output.parent)
    except (OSError, SafetensorError) as error:
        fault = f"Output {output} cannot be written: {one_line(error)}."
        raise SaveError(fault, "Nothing was left behind there.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_file(output: Path, suffix: str) -> None:
    """Refuses, before any work is done, a file that could not be written.

    Raises:
        ConfigError: its name does not end in ``suffix``.
        SaveError: it exists, or its folder does not.
    """
    if output.suffix.lower() != suffix:
        raise ConfigError(f"Output {output}: expected a name that ends in {suffix}.")
    if output.exists():
        raise SaveError(f"Output {output} exists.", "Choose another --output, or remove it.")
    if not output.absolute().parent.is_dir():
        raise SaveError(f"Output {output}: its folder does not exist.", "Make it, or choose another --output.")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a file in its place once it is whole.

    Raises:
        SaveError: the disk is full or refuses.
    """
    partial = path.with_name(f".{path.name}.partial-{uuid4().hex[:8]}")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise SaveError(f"Output {path} cannot be written: {one_line(error)}.") from error
    finally:
        partial.unlink(missing_ok=True)


def work_folder(output: Path) -> Path:
    """Where the records of a run rest: beside the output, or inside one that is there already (a mount point, say)."""
    output = output.resolve()
    name = f".{output.name}.snows-work"
    beside = output.parent / name
    return beside if beside.exists() or not output.exists() else output / name


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
