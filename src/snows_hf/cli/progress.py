"""Progress of a cascade on stderr: layer n of N, CG iterations, loss before → after, time left."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .sink import Sink


if TYPE_CHECKING:
    from ..jobs.prune import Progress as CascadeProgress


class LayerProgress:
    """A bar while the cascade runs, and a line for each finished layer."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.bar = Progress(
            TextColumn("layer"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=sink.err,
            transient=True,
        )
        self.shown = sink.err.is_terminal and not sink.quiet
        self.task: TaskID | None = None

    def __enter__(self) -> LayerProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.task is not None:
            self.bar.stop()

    def update(self, progress: CascadeProgress) -> None:
        if self.shown and self.task is None:
            self.bar.start()
            self.task = self.bar.add_task("", total=progress.total)
        report = progress.report
        if progress.note:
            self.sink.stage(progress.note)
        if report is not None:
            self._describe(report.name, completed=progress.index + 1)
            self.sink.stage(
                f"{progress.index + 1:3d}/{progress.total} {report.name}: loss {report.loss_masked:.4g} → "
                f"{report.loss_pruned:.4g}, {report.cg_iterations} CG iterations, {report.seconds:.1f} s"
                + ("" if report.status == "improved" else f" [{report.status}]")
            )
            if progress.index + 1 == progress.total:
                self._stop()
        elif progress.loss is not None:
            self._describe(
                f"{progress.name}: {progress.cg_iterations} CG iterations, loss "
                f"{progress.loss_masked:.4g} → {progress.loss:.4g}"
            )
        else:
            self._describe(progress.name)

    def _describe(self, text: str, completed: int | None = None) -> None:
        if self.task is not None:
            self.bar.update(self.task, description=escape(text), completed=completed)
