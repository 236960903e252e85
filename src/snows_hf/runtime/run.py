"""What every job carries: where it computes, how much memory it may take, what is finished, and who is told."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from .device import find_device, make_reproducible
from .journal import Journal, open_journal
from .memory import room


T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """Where a stage is.

    Attributes:
        stage: what is being done, ``Choosing masks`` for example.
        done: how many parts are; a part may be done in part.
        total: how many there are; None where nobody knows.
        part: the one at hand, a layer's name for example.
        detail: what is known of it.
        over: share of the stage's time that is over, where it was foretold what each part takes.
    """

    stage: str
    done: float
    total: int | None
    part: str = ""
    detail: str = ""
    over: float | None = None

    @property
    def share(self) -> float | None:
        """How much of the stage is over: of its time where that was foretold, else of its parts, if counted."""
        return self.over if self.over is not None or self.total is None else self.done / max(self.total, 1)


@dataclass(frozen=True)
class Run:
    """One run of a job. By default it computes on the CPU, keeps nothing and tells nobody.

    Attributes:
        device: where the model computes.
        dtype: in which the solver does.
        memory: budget of main memory, in GB; None: what is free.
        left: bytes of the budget that are left for images, activations and graphs; None without a budget.
        journal: what is finished, and outlives this process.
        on_stage: told, in a line of text, when a stage begins and what people should know.
        on_progress: told where a stage is.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    memory: float | None = None
    left: int | None = None
    journal: Journal = field(default_factory=Journal)
    on_stage: Callable[[str], None] = lambda stage: None
    on_progress: Callable[[Progress], None] = lambda progress: None

    @classmethod
    def begin(cls, device: str, *, reproducible: bool = False, **others: Any) -> Self:
        """A run on a device by name, see :func:`~snows_hf.runtime.device.find_device`; ``reproducible`` for a job that
        makes weights."""
        found = find_device(device)
        if reproducible:
            make_reproducible(found)
        return cls(found, **others)

    def with_room(self) -> Self:
        """The same run, knowing what libraries and model have left of its budget: see
        :func:`~snows_hf.runtime.memory.room`."""
        return replace(self, left=room(self.memory))

    @contextmanager
    def recorded(self, output: Path | None, description: dict[str, Any], restart: bool = False) -> Iterator[Self]:
        """The same run with a journal beside ``output``: see :func:`~snows_hf.runtime.journal.open_journal`."""
        with open_journal(output, description, restart, self.say) as journal:
            yield replace(self, journal=journal)

    def say(self, text: str) -> None:
        """A line of text about what begins, or what people should know."""
        self.on_stage(text)

    def tell(
        self, stage: str, done: float, total: int | None, part: str = "", detail: str = "", over: float | None = None
    ) -> None:
        """Where a stage is."""
        self.on_progress(Progress(stage, done, total, part, detail, over))

    def track(
        self,
        items: Iterable[T],
        stage: str,
        total: int | None = None,
        part: Callable[[T], str] = lambda item: "",
        seconds: Mapping[str, float] | None = None,
    ) -> Iterator[T]:
        """The items, one after the other, told as the parts of a stage; ``seconds`` that parts are thought to take, by
        their names, say how much of it is over."""
        seconds = seconds or {}
        done, passed, whole = 0, 0.0, sum(seconds.values())
        for done, item in enumerate(items, 1):
            name = part(item)
            self.tell(stage, done - 1, total, name, over=passed / whole if whole else None)
            yield item
            passed += seconds.get(name, 0.0)
        self.tell(stage, done, total)
