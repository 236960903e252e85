"""Finished work that outlives its process: records in a hidden folder beside the output, until the result is whole.

A record is a safetensors file named by its own SHA-256, too. It is written under another name, synced and renamed, so
that it is there in whole or not at all; one whose checksum is wrong is made again.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError, SaveError, one_line
from .distributed import from_main
from .files import checksum, sync, unwritable, work_folder


RUN = "run"

TOLD = {r"layer-\d+": "{} layers finished", r".+-layer-\d+": "masks of {} layers", r".+-loss-\d+": "{} sensitivities"}
"""What is said of records, by their names, where a run goes on with them."""


@dataclass(frozen=True)
class Record:
    """What was kept under one name: tensors, and whatever JSON holds."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Journal:
    """Records by name in ``folder``; with None it forgets everything. Only the main process reads and writes."""

    folder: Path | None = None

    def get(self, name: str) -> Record | None:
        """The record of this name, on the CPU; None where there is none, or none that is whole."""
        return from_main(lambda: self._read(name))

    def put(self, name: str, tensors: Mapping[str, Tensor] | None = None, **facts: Any) -> None:
        """Keeps a record in the place of the one that has its name; it is on the disk when this returns.

        Raises:
            SaveError: the disk is full or refuses.
        """
        from_main(lambda: self._write(name, tensors or {}, facts))

    def once(self, name: str, make: Callable[[], Record]) -> Record:
        """The record of this name; where there is none, what ``make`` gives on the main process is kept and given."""
        record = self.get(name)
        if record is None:
            record = from_main(make)
            self.put(name, record.tensors, **record.facts)
        return record

    def names(self) -> list[str]:
        """Names of the records, whole or not, in alphabetical order."""
        return from_main(self._names)

    def put_next(self, series: str, number: int, tensors: Mapping[str, Tensor], **facts: Any) -> None:
        """Keeps a number of a series, and the one before it, should this one turn out damaged."""
        self.put(f"{series}-step-{number:06d}", tensors, **facts)
        self.drop(f"{series}-step-{number - 2:06d}")

    def latest(self, series: str) -> Record | None:
        """The last record of a series that is whole."""
        names = [name for name in self.names() if name.startswith(f"{series}-step-")]
        return next((record for name in reversed(names) if (record := self.get(name))), None)

    def drop(self, prefix: str) -> None:
        """Removes all records whose names begin so."""

        def remove() -> None:
            for path in self._paths(f"{prefix}*"):
                path.unlink()

        from_main(remove)

    def _paths(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob(f"{pattern}.*.safetensors")) if self.folder else []

    def _names(self) -> list[str]:
        return sorted({path.name.partition(".")[0] for path in self._paths("*")})

    def _read(self, name: str) -> Record | None:
        for path in self._paths(name):
            try:
                if checksum(path) == path.name.split(".")[1]:
                    with safe_open(path, "pt") as file:
                        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no dictionary
                        return Record(tensors, json.loads(file.metadata()["facts"]))
            except (OSError, SafetensorError, ValueError, TypeError, KeyError):
                pass  # it is removed, and made again
            path.unlink(missing_ok=True)
        return None

    def _write(self, name: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        if self.folder is None:
            return
        temporary = self.folder / f"{name}.tmp"
        try:
            # Cloned: safetensors takes no tensors that share memory, as tied weights do, or a best and a mean.
            cloned = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
            save_file(cloned, temporary, {"facts": json.dumps(facts)})
            sync(temporary)
            path = self.folder / f"{name}.{checksum(temporary)}.safetensors"
            older = [other for other in self._paths(name) if other != path]
            temporary.rename(path)
            sync(self.folder)
            for other in older:
                other.unlink()
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            fault = f"Finished work cannot be kept in {self.folder}: {one_line(error)}."
            remedy = "What was finished before is kept: make room, and repeat the command to go on from there."
            raise SaveError(fault, remedy) from error


@contextmanager
def open_journal(
    output: Path | None, run: dict[str, Any], restart: bool = False, say: Callable[[str], None] = lambda text: None
) -> Iterator[Journal]:
    """The journal of a run whose result goes to the folder ``output``; None keeps no journal. ``say`` is told of work
    that is kept.

    It is gone after a block that ends well, and after one that fails with nothing finished.

    Args:
        run: everything that decides what the records hold, as JSON would give it back.
        restart: forget what an earlier run has left.

    Raises:
        SaveError: the folder cannot be made, or another run has it.
        ConfigError: the earlier run was another one.
    """
    if output is None:
        yield Journal()
        return
    folder = work_folder(output)
    lock, journal = FileLock(folder / "lock"), Journal(folder)

    def enter() -> None:
        _take(lock, output)
        if restart:
            journal.drop("")
        _check_same(journal, run, output)
        journal._write(RUN, {}, run)

    begun = whole = False
    try:
        from_main(enter)
        begun = True
        if found := [name for name in journal.names() if name != RUN]:
            counts = {words: sum(bool(re.fullmatch(names, name)) for name in found) for names, words in TOLD.items()}
            told = " and ".join(words.format(count) for words, count in counts.items() if count)
            say(f"Going on where an earlier run was broken off{f', with {told}' if told else ''}")
        yield journal
        whole = True
    finally:
        if lock.is_locked:
            if whole or not {*journal._names()} - {RUN, "batches"}:
                shutil.rmtree(folder, ignore_errors=True)  # while the lock is held: nobody else can be in there
            elif begun:
                say(f"What is finished is kept in {folder}: the same command goes on from there")
            lock.release()


def _take(lock: FileLock, output: Path) -> None:
    try:
        lock.acquire(timeout=0)  # and makes the folder
    except Timeout:
        remedy = "Wait until it has ended, or choose another --output."
        raise SaveError(f"Output {output} is being made by another run.", remedy) from None
    except OSError as error:
        raise unwritable(output, error) from error


def _check_same(journal: Journal, run: dict[str, Any], output: Path) -> None:
    found, run = journal.get(RUN), json.loads(json.dumps(run))
    if found is None:
        journal.drop("")  # records of nobody knows what
    if found is None or found.facts == run:
        return
    old, new = _flat(found.facts), _flat(run)
    values = ((key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()))
    changed = [f"{key} was {_brief(was)} and is {_brief(now)}" for key, was, now in values if was != now]
    raise ConfigError(
        f"An earlier run into {output} was broken off, and this is another one: {'; '.join(changed)}.",
        "Repeat that run's command to finish it, choose another --output, or give --restart to begin anew.",
    )


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _brief(value: Any) -> str:
    # Digests: the beginning tells them apart.
    return f"{value[:8]} …" if isinstance(value, str) and len(value) == 64 else repr(value)


class Digest:
    """SHA-256 of tensors, one after the other: types, shapes and bits."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, tensor: Tensor, name: str = "") -> None:
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        self._hash.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def text(self) -> str:
        return self._hash.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors."""
    digest = Digest()
    for name, tensor in tensors.items():
        digest.add(tensor, name)
    return digest.text()
