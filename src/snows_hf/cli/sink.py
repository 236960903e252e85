"""The one place that writes to the terminal: results on stdout, diagnostics on stderr."""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import wrapt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import SnowsError
from ..runtime.launch import launched_rank


Column = str | Callable[[Any], str]

CUSTOM = ", of widths that no configuration says: only this package loads it, by snows_hf.from_pretrained"
"""What is said behind the folder of such a model."""

EDGELESS = 10_000
"""Columns of what has no edge at which a table would have to fold."""

NAME = 16
"""Columns that a table leaves to names, at least, before it gives way to lines."""


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
        if not self.out.is_terminal:  # but a pipe or a file
            self.out.width = EDGELESS
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

    def table(
        self, columns: Mapping[str, Column], rows: Sequence[Mapping[str, Any]], title: str | None = None
    ) -> None:
        """A table of the result for people.

        On a narrow terminal names fold, and numbers never: where that does not do, each row becomes lines of titles
        and numbers.

        Args:
            columns: what each shows of a row, by its title: a format of the row's items, or a function. The first
                holds names, the others numbers. A cell stays empty where the row lacks the number, or has None.
            rows: of the table.
            title: of the table.
        """
        if self.quiet or self.as_json:
            return
        cells = [[cell(show, row) for show in columns.values()] for row in rows]
        # Names come from anywhere: as Text, brackets in them are no markup.
        table = Table(title=Text(title) if title else None, title_justify="left")
        first, *others = columns
        table.add_column(first, overflow="fold")
        for column in others:
            table.add_column(column, justify="right", no_wrap=True)
        for row in cells:
            table.add_row(*map(Text, row))
        longest = max(len(name) for name in (first, *(row[0] for row in cells)))
        natural = self.out.measure(table, options=self.out.options.update(max_width=EDGELESS)).maximum
        room = self.out.width - (natural - longest)
        if room >= min(NAME, longest):
            table.columns[0].max_width = room
            self.out.print(table)
            return
        if title:
            self.text(title)
        for name, *numbers in cells:
            self.text(name)
            for column, number in zip(others, numbers, strict=True):
                if number:
                    self.text(f"  {column}: {number}")

    def accuracies(self, found: Mapping[str, Mapping[str, Any]], pattern: str) -> None:
        """Accuracies side by side, of models by name."""
        rows = [{**accuracy, "name": name} for name, accuracy in found.items()]
        columns = {"": "{name}", "top-1 (%)": "{top1:.2f}", "top-5 (%)": "{top5:.2f}"}
        self.table(columns, rows, f"{pattern} on {rows[-1]['images']} images{by(rows[-1])}")

    def fidelity(self, found: Mapping[str, Mapping[str, Any]], title: str) -> None:
        """How near outputs are to the dense model's, of models by name; then what only classifiers have."""
        rows = [
            {"name": f"{name}: {output}", "error": 100 * figures["error"], "cosine": figures["cosine"]}
            for name, compared in found.items()
            for output, figures in compared["outputs"].items()
            if None not in figures.values()
        ]
        self.table({"": "{name}", "error (%)": "{error:.2f}", "cosine": "{cosine:.4f}"}, rows, title)
        for name, compared in found.items():
            if compared["agreement"] is not None:
                self.text(
                    f"{name}: {compared['agreement']:.2f} % of the images in the same class as by the dense model, "
                    f"divergence {compared['divergence'] or 0:.3g}"
                )

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


def by(accuracy: Mapping[str, Any]) -> str:
    """How an accuracy was measured, where not by the model's own classifier."""
    method = accuracy.get("method") or "classifier"
    return "" if method == "classifier" else f", {method}"


def speed_in_words(faster: Mapping[str, Any]) -> str:
    """What was measured of a model that was to be so many times as fast, for people."""
    return (
        f"{faster['measured']:.2f} times as fast as the dense model on {faster['hardware']}, with {faster['batch']} "
        f"image{'s' if faster['batch'] != 1 else ''} at a time in {faster['dtype']}; asked for: {faster['asked']:.4g}."
    )


def cell(show: Column, row: Mapping[str, Any]) -> str:
    if callable(show):
        return show(row)
    try:
        return show.format(**row)
    except (KeyError, TypeError):
        return ""


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
