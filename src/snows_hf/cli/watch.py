"""Where a job is, on stderr: a bar on a terminal; elsewhere a line whenever nothing was said for half a minute."""

import threading
import time
from types import TracebackType
from typing import Any, Protocol

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .sink import Sink


QUIET = 30.0
"""Most seconds without a line, where there is no bar."""


class Where(Protocol):
    """What a job tells of a stage: snows_hf.runtime.run.Progress, which takes torch to import."""

    stage: str
    done: float
    total: int | None
    part: str
    detail: str


class Watch:
    """Shows what a job tells, for the time of a ``with`` block: ``prune(…, **watch.told)``."""

    def __init__(self, sink: Sink, quiet: float = QUIET) -> None:
        self.sink, self.interval = sink, quiet
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=sink.err, transient=True)
        self.task = self.bar.add_task("", total=None, visible=False)
        self.where: Where | None = None
        self.text, self.of = "Starting", ""  # what was said last; the stage that `began` is of
        self.began = self.spoke = time.monotonic()
        self.over = threading.Event()
        self.ticker = threading.Thread(target=self._tick, daemon=True)

    @property
    def told(self) -> dict[str, Any]:
        """What a job is given to tell it to."""
        return {"on_stage": self.stage, "on_progress": self.progress}

    def __enter__(self) -> "Watch":
        if not self.sink.quiet:
            self.bar.start() if self.sink.err.is_terminal else self.ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.bar.stop()

    def stage(self, text: str) -> None:
        """A line of text; how far what it is about has come is not known yet."""
        self.sink.stage(text)
        self.text, self.where, self.spoke = text, None, time.monotonic()
        self.bar.update(self.task, visible=False)

    def progress(self, where: Where) -> None:
        """Where a stage is."""
        if where.stage != self.of or where.done == 0:
            self.of, self.began = where.stage, time.monotonic()
            self.bar.reset(self.task, total=where.total)
        self.where = where
        over = where.total is not None and where.done >= where.total
        name = escape(self._name(where))
        self.bar.update(self.task, total=where.total, description=name, completed=where.done, visible=not over)

    def _tick(self) -> None:
        while not self.over.wait(min(1.0, self.interval)):
            if time.monotonic() - self.spoke >= self.interval:
                self.sink.stage(self._line())
                self.spoke = time.monotonic()

    def _line(self) -> str:
        where, passed = self.where, time.monotonic() - self.began
        if where is None:
            return f"{self.text}: still at it"
        line = f"{self._name(where)}: {where.detail}" if where.detail else self._name(where)
        if where.total is not None and 0 < where.done < where.total:
            return f"{line}, about {clock(passed * (where.total - where.done) / where.done)} left"
        return f"{line}, {clock(passed)} so far"

    @staticmethod
    def _name(where: Where) -> str:
        count = f"{int(where.done)}" if where.total is None else f"{int(where.done)}/{where.total}"
        return f"{where.stage} {count} {where.part}".strip()


def clock(seconds: float) -> str:
    """``75`` → ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
