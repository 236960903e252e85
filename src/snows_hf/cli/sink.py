"""The one place that writes to the terminal: results on stdout, diagnostics on stderr."""

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import wrapt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import SnowsError
from ..runtime.launch import launched_rank


@dataclass
class Sink:
    """Output in one of three modes: for people, ``as_json`` (one object on stdout), or ``quiet`` (errors alone).

    Of several processes only the main one says more than its errors.
    """

    as_json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if launched_rank() > 0:
            self.as_json, self.quiet = False, True
        self.out = Console(highlight=False, soft_wrap=True)
        if not self.out.is_terminal:  # a pipe or a file has no edge at which a table would have to fold
            self.out.width = 10_000
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    @classmethod
    def from_arguments(cls, argv: Sequence[str]) -> "Sink":
        """The mode that a command line asks for, for errors raised before its options are parsed."""
        return cls("--json" in argv, "--quiet" in argv)

    def stage(self, text: str) -> None:
        """A line about what happens now, on stderr."""
        if not self.quiet:
            self.err.print(text, markup=False)

    def text(self, text: str) -> None:
        """A line of the result for people."""
        if not (self.quiet or self.as_json):
            self.out.print(text, markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """A table of the result for people; the first column is text, the others are numbers."""
        if self.quiet or self.as_json:
            return
        # Names come from anywhere: as Text, brackets in them are no markup.
        table = Table(title=Text(title) if title else None, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self.out.print(table)

    def json(self, result: dict[str, Any]) -> None:
        """The whole result as one JSON object on stdout, in JSON mode."""
        if self.as_json:
            print(json.dumps(result, indent=2, allow_nan=False, default=str))  # noqa: T201  the sink prints

    def error(self, error: SnowsError) -> None:
        """The message of an error on stderr, in every mode."""
        who = f"Process {launched_rank()}: " if launched_rank() > 0 else ""
        self.err.print(f"{who}Error: {error.message}", markup=False, style="bold red")
        if error.remedy:
            self.err.print(error.remedy, markup=False)


def shown(pattern: str) -> str:
    """A pattern for people: of a sparsity at most four decimals."""
    return f"{float(pattern):.4g}" if pattern.replace(".", "").isdigit() else pattern


def open_sink(as_json: bool, quiet: bool) -> Sink:
    """The sink of a command, with nothing else on the terminal."""
    calm_libraries()
    return Sink(as_json, quiet)


def calm_libraries() -> None:
    """Keeps the libraries' own bars, notices and warnings off the terminal, from when they are loaded."""

    @wrapt.when_imported("transformers.utils.logging")
    def _(transformers: Any) -> None:
        transformers.set_verbosity_error()
        transformers.disable_progress_bar()

    @wrapt.when_imported("datasets")
    def _(datasets: Any) -> None:
        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity_error()

    @wrapt.when_imported("huggingface_hub.utils.logging")
    def _(huggingface_hub: Any) -> None:
        huggingface_hub.set_verbosity_error()

    logging.getLogger("timm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
