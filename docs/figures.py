"""Figures of docs/results.md for other pages: README's table is made of them, and the pictures.

python docs/figures.py     # writes README's table anew
"""

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- made by docs/figures.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Table:
    """A table of docs/results.md: cells of its head, and of each row."""

    head: list[str]
    rows: list[list[str]]

    def index(self, row: str, before: int | None = None) -> int:
        """Of the last row (above row ``before``, where that is given) whose first cell begins so, by ``re.match``."""
        found = [i for i, cells in enumerate(self.rows[:before]) if re.match(row, cells[0])]
        if not found:
            raise LookupError(f"docs/results.md has no row {row!r} in the table {self.head}")
        return found[-1]

    def column(self, name: str) -> list[str]:
        return [cells[self.place(name)] for cells in self.rows]

    def place(self, name: str) -> int:
        """Of the first column whose head begins so."""
        found = [i for i, head in enumerate(self.head) if head.startswith(name)]
        if not found:
            raise LookupError(f"docs/results.md has no column {name!r} in the table {self.head}")
        return found[0]


def tables(heading: str) -> list[Table]:
    """The tables between a heading that begins so, of any level, and the next heading."""
    text = RESULTS.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}.*?\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise LookupError(f"docs/results.md has no section {heading!r}")
    blocks = re.findall(r"(?:^\|.*\n)+", found[1], re.MULTILINE)
    parsed = [[cells_of(line) for line in block.splitlines()] for block in blocks]
    return [Table(lines[0], lines[2:]) for lines in parsed]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def digits(cell: str) -> list[str]:
    """The numbers of a cell as they stand there, in their order: ``**91.79 (+0.06)**`` has two."""
    plain = cell.replace("−", "-").replace(",", "")
    return re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", plain)


def numbers(cell: str) -> list[float]:
    return [float(found) for found in digits(cell)]


def number(cell: str) -> float:
    """The first of a cell; not a number where there is none."""
    return numbers(cell)[0] if numbers(cell) else float("nan")


@dataclass(frozen=True)
class Kept:
    """Top-1 of a dense model, of the mask alone, and of SNOWS, as they stand in docs/results.md."""

    model: str
    pattern: str
    dense: str
    alone: str
    ours: str

    @property
    def drop(self) -> str:
        """Dense less ours, in points."""
        places = len(self.ours.partition(".")[2])
        return f"{float(self.dense) - float(self.ours):.{places}f}".replace("-", "−")

    def share(self, part: str) -> float:
        """Of the dense model's top-1, in per cent."""
        return 100 * float(getattr(self, part)) / float(self.dense)


def stacked(model: str, pattern: str, table: Table, dense: str, alone: str, ours: str) -> Kept:
    """From a table with a row for each; of equal rows the ones right above ours."""
    column, last = table.place("top-1"), table.index(ours)
    rows = table.index(dense, last), table.index(alone, last), last
    return Kept(model, pattern, *(digits(table.rows[row][column])[0] for row in rows))


def in_a_row(model: str, pattern: str, row: str) -> Kept:
    """From the first table of the page, which has a row for all three: that of the defaults, or else the first."""
    table = tables("Results")[0]
    found = [cells for cells in table.rows if cells[0].split(", `")[0] == row]
    if not found:
        raise LookupError(f"docs/results.md has no row {row!r} in its first table")
    cells = min(found, key=lambda cells: cells[0] != row)
    return Kept(model, pattern, *(cells[table.place(name)] for name in ("dense", "mask alone", "SNOWS")))


def kept() -> list[Kept]:
    """The rows of README's table, real models first."""
    efforts = tables("Efforts on a network")[0]
    share = next(table for table in tables("Efforts on a network") if table.head[0].startswith("70 %"))
    efficientnet = tables("EfficientNet-Lite0 on ImageNet")[0]
    units, channels = (
        next(table for table in tables("Structured pruning") if table.head[0].startswith(model))
        for model in ("DINOv2-S", "EfficientNet-Lite0")
    )
    return [
        stacked("DINOv2-S", "`2:4`", efforts, "dense", "SparseGPT alone", "`standard`"),
        stacked("DINOv2-S", "`0.7`", share, "dense", "SparseGPT alone", "`standard`"),
        stacked("DINOv2-S", "`mlp:0.5`", units, "dense", "group OBS with its repair", r"….*`standard`"),
        stacked("EfficientNet-Lite0", "`2:4`", efficientnet, "dense", ".*lower ρ", ".*24 joint"),
        stacked("EfficientNet-Lite0", "`channels:0.25`", channels, "dense", "magnitude with the", ".*counting oper"),
        in_a_row("ResNet-20", "`2:4`", "ResNet-20, 2:4"),
        in_a_row("ResNet-20", "`1:4`", "ResNet-20, 1:4"),
        in_a_row("ResNet-20", "`0.8`", "ResNet-20, 80 %"),
        in_a_row("ViT of six layers", "`2:4`", "ViT, 2:4"),
    ]


def readme_table() -> str:
    lines = ["| model | `--pattern` | dense | mask alone | SNOWS | drop |", "|---|---|---|---|---|---|"]
    lines += [f"| {k.model} | {k.pattern} | {k.dense} | {k.alone} | **{k.ours}** | {k.drop} |" for k in kept()]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """README with the table of today's docs/results.md."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise LookupError("README.md has no place for the table")
    return before + BEGIN + readme_table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
