"""Where activations rest, and how many images fit: what keeps the peak of memory below a budget."""

import ctypes
import math
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import ConfigError, MemoryLimitError, SaveError, one_line


T = TypeVar("T")
Tensors = tuple[Tensor, ...]

PREFIX = "snows-hf-activations-"  # of temporary folders

MEMORY_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of control groups, version 2 and 1, by their controllers in /proc/self/cgroup: the files of limit and use, and what
of the latter the system can drop, in memory.stat."""


class Shelf:
    """Keeps tuples of CPU tensors: in memory up to ``limit`` bytes together, in files of a temporary folder beyond.

    What nobody holds a :class:`Kept` of any more frees its place at once.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit, self.used, self.files = limit, 0, 0
        self.folder: Path | None = None

    def keep(self, tensors: Tensors) -> "Kept":
        """Raises :class:`SaveError` where the temporary folder takes no more."""
        size = sum(tensor.nbytes for tensor in tensors)
        if self.used + size <= self.limit:
            self.used += size
            kept = Kept(tensors)
            weakref.finalize(kept, self._give_back, size)
            return kept
        if self.folder is None:
            remove_abandoned()
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            self.lock = FileLock(self.folder / "lock")
            self.lock.acquire()
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        path = self.folder / f"{self.files}.pt"
        self.files += 1
        try:
            # Cloned: a slice would be written with all that it is a slice of.
            torch.save(tuple(tensor.clone() for tensor in tensors), path)
        except (OSError, RuntimeError) as error:
            fault = f"Activations of {size / 1e9:.2f} GB do not fit into {path.parent}: {one_line(error)}"
            remedy = "Give more --memory, fewer --samples, or point TMPDIR at a disk with more room."
            raise SaveError(fault, remedy) from error
        kept = Kept(path)
        weakref.finalize(kept, path.unlink, missing_ok=True)
        return kept

    def _give_back(self, size: int) -> None:
        self.used -= size


@dataclass(frozen=True, eq=False)
class Kept:
    """A place on a :class:`Shelf`."""

    content: Tensors | Path

    def get(self) -> Tensors:
        if isinstance(self.content, Path):
            return tuple(torch.load(self.content, weights_only=True))
        return self.content


class Images:
    """Images (n, 3, h, w) on a shelf, appended in chunks and read by slices, as a tensor would be."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self._chunks: list[tuple[int, Kept]] = []

    def append(self, chunk: Tensor) -> None:
        self._chunks.append((len(chunk), self.shelf.keep((chunk,))))

    def __len__(self) -> int:
        return sum(size for size, _ in self._chunks)

    def first(self, count: int) -> "Images":
        """The first ones alone, on the same shelf; nothing is copied."""
        found, left = Images(self.shelf), count
        for size, kept in self._chunks:
            if left > 0:
                found._chunks.append((min(size, left), kept))
            left -= size
        return found

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in order, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(len(self))
        parts, offset = [], 0
        for size, kept in self._chunks:
            if offset < stop and start < offset + size:
                parts.append(kept.get()[0][max(start - offset, 0) : stop - offset])
            offset += size
        return torch.cat(parts)


def remove_abandoned() -> None:
    """Removes the temporary folders of processes that were killed: those that hold no more than what a shelf puts
    there, whose lock is free, and that are old enough to have taken it."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            names = {path.name for path in folder.iterdir()}
            ours = "lock" in names and all(re.fullmatch(r"lock|\d+\.pt", name) for name in names)
            if ours and time.time() - folder.stat().st_mtime > 60:
                with FileLock(folder / "lock", timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            pass  # in use, or somebody else's


def available(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of main memory that are free: on this machine, or, where that is less, to the container or batch job that
    this process belongs to (control groups of Linux), beyond which it would be killed."""
    free = psutil.virtual_memory().available
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux
        return free
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in MEMORY_FILES:
            group = groups / controllers / path.strip("/")
            free = min(free, *(left_of(folder, *MEMORY_FILES[controllers]) for folder in (group, *group.parents)))
    return max(int(free), 0)


def left_of(group: Path, limit: str, used: str, cache: str) -> float:
    """Bytes below the limit of one control group; infinite where it has none."""
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        most, now = (int((group / file).read_text()) for file in (limit, used))  # ValueError: "max"
        return most - now + int(statistics[cache])
    except (OSError, ValueError, KeyError):
        return math.inf


def room(memory: float | None) -> int | None:
    """Bytes of main memory that are left of a budget of ``memory`` GB for this process; None without a budget.

    Raises:
        ConfigError: nothing is left.
    """
    if memory is None:
        return None
    # Blocks of more than 1 MB that are freed go back to the system at once. GNU's C library otherwise takes what has
    # been freed for a sign that it is needed again, and holes in what it keeps add up; others may not know the call.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD of its malloc.h
    used = psutil.Process().memory_info().rss
    left = int(memory * 1e9) - used
    if left <= 0:
        fault = f"Setting memory = {memory} GB: the libraries and the model alone take {used / 1e9:.2f} GB."
        raise ConfigError(fault, f"Give --memory {math.ceil(used / 1e8 + 5) / 10} or more.")
    return left


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, main or a device's, did not suffice."""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def until_it_fits(run: Callable[[], T], shrink: Callable[[], None]) -> T:
    """``run()``; where memory does not suffice, again after ``shrink()``, which raises once there is no less."""
    while True:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Out of the block, which holds the graphs of what failed.
        clear_device_cache(garbage_collection=True)
        shrink()


def halves(batch: slice) -> list[slice]:
    """A batch as two, the first no smaller; as itself where it has one image."""
    middle = batch.start + (batch.stop - batch.start + 1) // 2
    return [slice(batch.start, middle), slice(middle, batch.stop)] if middle < batch.stop else [batch]


def in_parts(run: Callable[[Tensors], Tensors], state: Tensors) -> Tensors:
    """``run(state)``, in halves where memory does not suffice: every image is computed by itself.

    Raises:
        MemoryLimitError: a single image is too much.
    """
    try:
        return run(state)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(state[0]) == 1:
            raise MemoryLimitError("Memory does not suffice for a single image.", "Give --device cpu.") from error
    parts = [in_parts(run, tuple(t[half] for t in state)) for half in halves(slice(0, len(state[0])))]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def saved_bytes(build: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd keeps for the graphs that ``build`` makes, each storage once."""
    storages: dict[int, int] = {}
    held = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # freed storages would lend their address to others
        return tensor.detach()  # a node that keeps its own output would otherwise hold itself

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        build()
    held.clear()  # graph, hook and list hold each other, and no collector sees a graph's part in it
    return sum(storages.values())
