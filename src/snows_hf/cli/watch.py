"""Where a job is, on stderr: a bar on a terminal; elsewhere a line whenever nothing was said for half a minute."""

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .sink import Sink


if TYPE_CHECKING:
    from ..runtime.run import Progress as Where  # which takes torch to import

QUIET = 30.0
"""Most seconds without a line, where there is no bar."""


class Watch:
    """Shows what a job tells, for the time of a ``with`` block: ``prune(…, on_stage=watch.stage,
    on_progress=watch.progress)``."""

    def __init__(self, sink: Sink, quiet: float = QUIET) -> None:
        self.sink, self.interval = sink, quiet
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=sink.err, transient=True)
        self.task = self.bar.add_task("", total=None, visible=False)
        self.where: Where | None = None
        self.text = "Starting"  # what was said last
        self.of, self.first = "", 0.0  # the stage that `began` is of, and what was done of it then
        self.began = self.spoke = time.monotonic()
        self.over = threading.Event()
        self.ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Watch":
        if not self.sink.quiet:
            self.bar.start() if self.sink.err.is_interactive else self.ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        if self.ticker.is_alive():
            self.ticker.join()
        if self.bar.live.is_started:
            self.bar.stop()

    def stage(self, text: str) -> None:
        """A line of text; how far what it is about has come is not known yet."""
        self.sink.stage(text)
        self.text, self.where, self.spoke = text, None, time.monotonic()
        self.bar.update(self.task, visible=False)

    def progress(self, where: "Where") -> None:
        """Where a stage is."""
        share, total = where.share, None if where.share is None else 1.0
        if where.stage != self.of or where.done == 0:
            self.of, self.first, self.began = where.stage, share or 0.0, time.monotonic()
            self.bar.reset(self.task, total=total)
        self.where = where
        name, going = escape(self._name(where)), share is None or share < 1
        self.bar.update(self.task, total=total, description=name, completed=share or 0.0, visible=going)

    def _tick(self) -> None:
        while not self.over.wait(self.spoke + self.interval - time.monotonic()):
            if time.monotonic() - self.spoke >= self.interval:
                self.sink.stage(self._line())
                self.spoke = time.monotonic()

    def _line(self) -> str:
        where, passed = self.where, time.monotonic() - self.began
        if where is None:
            return f"{self.text}: still at it"
        line = f"{self._name(where)}: {where.detail}" if where.detail else self._name(where)
        if where.share is not None and self.first < where.share < 1:
            left = passed * (1 - where.share) / (where.share - self.first)
            return f"{line}, about {timedelta(seconds=round(left))} left"
        return f"{line}, {timedelta(seconds=round(passed))} so far"

    @staticmethod
    def _name(where: "Where") -> str:
        count = f"{int(where.done)}" if where.total is None else f"{int(where.done)}/{where.total}"
        return f"{where.stage} {count} {where.part}".strip()
