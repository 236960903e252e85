"""What models and data are called."""

from collections.abc import Sequence
from os import PathLike, fspath
from os.path import expanduser  # unlike Path's, it leaves a ~name that is nobody's as it is
from pathlib import Path

from ..errors import DataError, LoadError


Name = str | PathLike[str]
"""What a user calls a model or data by: a folder, or an id on the Hub."""


def split_revision(name: Name) -> tuple[str, str | None]:
    """``USER/NAME@REVISION`` → ``(USER/NAME, REVISION)``; a folder may have an @ in its name."""
    name = fspath(name)
    if Path(expanduser(name)).exists():
        return name, None
    repository, _, revision = name.partition("@")
    return repository, revision or None


def local_folder(source: Name) -> Path | None:
    """The folder that a model's name means, whether or not it exists; None for a repository on the Hub."""
    source = fspath(source)
    folder = Path(expanduser(source.removeprefix("local-dir:")))
    if source.startswith("hf-hub:"):
        return None
    return folder if folder.exists() or source.startswith(("local-dir:", ".", "/", "~")) else None


def model_folder(source: Name) -> Path | None:
    """What :func:`local_folder` gives; a :class:`LoadError` where there is no such folder."""
    local = local_folder(source)
    if local is not None and not local.is_dir():
        fault = "is a file" if local.exists() else "does not exist"
        raise LoadError(f"Model folder {local} {fault}.", "Give a folder with config.json and *.safetensors.")
    return local


def data_folder(name: Name) -> Path | None:
    """The folder that a data set's name means; None for one on the Hub. A :class:`DataError` where it is neither."""
    name = fspath(name)
    local = Path(expanduser(name))
    if local.is_file():
        raise DataError(f"Data {name} is a file.", "Give the folder that holds it, or a Hub dataset as USER/NAME.")
    if local.exists():
        return local
    if name.startswith((".", "/", "~")) or split_revision(name)[0].count("/") != 1:
        raise DataError(f"Data folder {name} does not exist.", "Give a folder, or a Hub dataset as USER/NAME.")
    return None


def short_name(source: Name) -> str:
    """A Hub id as it is; of a folder only the last part, so that what is published names no path of the machine."""
    folder = local_folder(source)
    return fspath(source).removeprefix("hf-hub:") if folder is None else folder.resolve().name


def distinct_names(sources: Sequence[str]) -> list[str]:
    """Short names to tell several models apart by, or what was asked for, where two would have the same."""
    names = [short_name(source) for source in sources]
    return names if len({*names}) == len({*sources}) else list(sources)
