"""Draws the pictures of the documentation, of the figures in docs/results.md.

python docs/pictures.py [NAME ...]     # into docs/pictures, all of them or those named

Colours are of a middle lightness on no ground, so that one file is read on a light page and on a dark one.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from figures import Table, kept, number, numbers, tables
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


PLACE = Path(__file__).parent / "pictures"
GREY, ORANGE, BLUE, GREEN, VIOLET, PINK = "#7d7d7d", "#d9730d", "#3b82f6", "#16a079", "#a855f7", "#ec4899"
DENSE, ALONE, OURS, PAPER = GREY, ORANGE, BLUE, GREEN
DASHED: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2, "marker": ""}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "snows-hf",
    "font.family": ["sans-serif"],
    "font.size": 9,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "lines.marker": "o",
    "legend.frameon": False,
    "legend.labelcolor": "linecolor",
}

PICTURES: dict[str, Callable[[], Figure]] = {}


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Draws docs/pictures/NAME.svg, named like the function."""
    PICTURES[draw.__name__.replace("_", "-")] = draw
    return draw


def panels(rows: int, columns: int, width: float = 8.4, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, list(axes.flat)


def categories(axes: Axes, names: Sequence[str], axis: str = "x") -> None:
    """Equal steps along an axis, one for each name."""
    getattr(axes, f"set_{axis}ticks")(range(len(names)), names)


def dumbbells(axes: Axes, names: Sequence[str], alone: Sequence[float], ours: Sequence[float]) -> None:
    """A line for each name, from the mask alone to SNOWS, the first at the top."""
    for place, (a, b) in enumerate(zip(alone, ours, strict=True)):
        axes.plot([a, b], [place, place], color=GREY, alpha=0.45, linewidth=2.4, marker="", zorder=1)
    axes.scatter(alone, range(len(names)), color=ALONE, s=34, zorder=2, label="mask alone")
    axes.scatter(ours, range(len(names)), color=OURS, s=34, zorder=3, label="SNOWS")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def before(cell: str) -> float:
    """The dense network's accuracy, of a cell such as ``91.53 (−0.20)``."""
    after, change = numbers(cell)
    return after - change


def over_sparsity(axes: Axes) -> None:
    """ResNet-20 from 50 to 90 % zeros, in per cent of each one's own dense network."""
    table = tables("Unstructured sparsity (Table 4")[0]
    shares = [number(cell) for cell in table.column("sparsity")]
    ours = table.column("ours, masks that thin out")
    dense = before(ours[0])
    axes.plot(shares, [100] * len(shares), "--", color=DENSE, label="dense", marker="")
    for name, colour, cells in (
        ("SNOWS, this package", OURS, ours),
        ("SNOWS, the paper", PAPER, table.column("the paper's SNOWS")),
        ("FALCON", VIOLET, table.column("FALCON")),
        ("CHITA", PINK, table.column("CHITA")),
    ):
        axes.plot(shares, [100 * number(cell) / before(cell) for cell in cells], color=colour, label=name)
    alone = table.column("mask alone")
    axes.plot(shares, [100 * number(cell) / dense for cell in alone], color=ALONE, label="mask alone")
    axes.set(xlabel="zeros (%)", ylim=(0, 106), xticks=shares, title="ResNet-20: accuracy kept (%)")
    axes.legend(loc="lower left", fontsize=8.5)


@picture
def accuracy_kept() -> Figure:
    figure, (left, right) = panels(1, 2, height=3.3)
    rows = kept()
    names = [f"{row.model}, {row.pattern.strip('`')}".replace(" of six layers", "") for row in rows]
    dumbbells(left, names, [row.share("alone") for row in rows], [row.share("ours") for row in rows])
    left.axvline(100, color=DENSE, **DASHED)
    lowest = min(min(row.share("alone"), row.share("ours")) for row in rows)
    left.set(xlim=(10 * (lowest // 10) - 10, 103), title="Accuracy kept, in % of the dense model's")
    left.legend(loc="upper left", fontsize=8.5)
    over_sparsity(right)
    return figure


@picture
def retraining() -> Figure:
    table = tables("Retraining with the zeros held (Table 5)")[0]
    figure, (axes,) = panels(1, 1, width=6.4, height=2.9)
    places = np.arange(len(table.rows))
    i = 0
    for name, colour, column in (("SNOWS", OURS, "SNOWS"), ("the paper's SNOWS", PAPER, "the paper: SNOWS")):
        first = table.place(column)  # after it: retrained, epochs in ours, and the drop of what was retrained
        solved, retrained = ([number(row[first + step]) for row in table.rows] for step in (0, 1))
        drops = [number(row[table.head.index("drop", first)]) for row in table.rows]
        at_first = [drop + after - alone for drop, after, alone in zip(drops, retrained, solved, strict=True)]
        for what, alpha, lost in ((name, 0.5, at_first), ("… retrained", 1, drops)):
            drawn = axes.bar(places + 0.2 * (i - 1.5), lost, 0.18, color=colour, alpha=alpha, label=what)
            axes.bar_label(drawn, fmt="%.2f", fontsize=7.5, color=GREY)
            i += 1
    categories(axes, table.column("sparsity"))
    axes.set(title="ResNet-20: points lost, before and after retraining")
    axes.grid(axis="x", visible=False)
    axes.legend(labelcolor=GREY, fontsize=8.5)
    return figure


@picture
def over_k() -> Figure:
    figure, axes = panels(1, 2, height=3)
    titles = "ResNet-20: top-1 (%) by K", "ViT of six layers: top-1 (%) by K"
    for ax, table, title in zip(axes, tables("Accuracy over K (Figure 1)"), titles, strict=True):
        ks = [number(head.replace("K = ", "")) for head in table.head[1:]]
        for name, row, colour in (("equal images", 0, BLUE), ("equal time", table.index("equal time"), ORANGE)):
            ax.plot(range(len(ks)), [number(cell) for cell in table.rows[row][1:]], color=colour, label=name)
        categories(ax, [f"{k:g}" for k in ks])
        ax.set(title=title, xlabel="K")
        ax.legend(fontsize=8.5)
    return figure


@picture
def cost_of_k() -> Figure:
    table = tables("Time and memory over K (Table 3)")[0]
    ks = [head.split()[0] for head in ("0", *table.head[2:])]
    figure, axes = panels(1, 2, height=2.9)
    for ax, what, offset in ((axes[0], "time, that of K = 0 being 1", 0), (axes[1], "peak of memory (GB)", 1)):
        for name, row, colour in (("ResNet-20", 0, BLUE), ("the paper's ResNet-20", 2, GREEN), ("ViT", 4, ORANGE)):
            ax.plot(ks, [number(cell) for cell in table.rows[row + offset][1:]], color=colour, label=name)
        ax.set(title=f"A prune to 1:4: {what}", xlabel="K (ViT: the last one is 20)", ylim=(0, None))
    axes[0].legend(fontsize=8.5)
    return figure


@picture
def one_layer() -> Figure:
    table = tables("Newton, SGD and the Fisher matrix")[0]
    figure, axes = panels(2, 3, height=4.4)
    methods = ("ours", BLUE), ("Newton as", GREEN), ("Fisher", VIOLET), ("SGD", ORANGE)
    model = ""
    for ax, row in zip(axes, table.rows, strict=True):
        *first, layer = row[0].split(", ")
        model = first[0] if first else model
        for name, colour in methods:
            losses = [1.0, *numbers(row[table.place(name)])[:2]]
            ax.plot([0, 5, 20], losses, color=colour, label="Newton, the paper's" if "as" in name else name)
        ax.set(
            title=f"{model.removesuffix(' of six layers')}: {layer}", yscale="log", xticks=[0, 5, 20], ylim=(0.01, 1.4)
        )
    for ax in axes[3:]:
        ax.set_xlabel("processor seconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    figure.suptitle("Held-out loss over the mask's", color=GREY, fontsize=10, x=0.01, ha="left")
    return figure


@picture
def conjugate_gradients() -> Figure:
    table = tables("How many iterations of conjugate gradients")[0]
    figure, axes = panels(1, 4, height=2.8)
    most = [number(head) for head in table.head[2:]]
    for i, ax in enumerate(axes):
        for row, name, colour in ((2 * i, "the paper's", GREEN), (2 * i + 1, "ours", BLUE)):
            losses = [numbers(cell)[1] for cell in table.rows[row][2:]]
            ax.plot(most, losses, color=colour, label=name)
        ax.set(title=table.rows[2 * i][0].split(", ")[-1], xscale="log", yscale="log", ylim=(0.025, 1.3))
        ax.set_xticks(most[::2], [f"{each:g}" for each in most[::2]])
        ax.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5)
    figure.suptitle(
        "Held-out loss over the mask's after 10 s, by the most products of a system", color=GREY, fontsize=10, x=0.01,
        ha="left",
    )  # fmt: skip
    return figure


@picture
def probes() -> Figure:
    table = tables("Linear probes (Figure 5)")[0]
    rows = [row for row in table.rows if "earlier" not in row[0]]
    figure, (axes,) = panels(1, 1, width=6.4, height=2.6)
    for name, colour, shift in (("mask alone", ALONE, -0.12), ("SNOWS", OURS, 0.12)):
        for place, row in enumerate(rows):
            middle, low, high = numbers(row[table.place(name)])
            label = name if place == 0 else None
            axes.plot([low, high], [place + shift] * 2, color=colour, marker="|", linewidth=1.4)
            axes.plot([middle], [place + shift], color=colour, label=label, linestyle="")
    axes.axvline(0, color=DENSE, **DASHED)
    axes.set_yticks(range(len(rows)), [f"{row[0]}, {row[1]}" for row in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), title="Linear probes on CIFAR-100: points above the dense backbone")
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8.5, loc="lower left")
    return figure


@picture
def criteria() -> Figure:
    table = next(table for table in tables("Mask criteria") if table.head[0] == "criterion")
    titles = ["ResNet-20 2:4", "1:4", "70 %", "90 %", "ViT 2:4", "1:4"]
    figure, axes = panels(1, len(titles), width=8.6, height=4.6)
    for i, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        pairs = [numbers(row[i + 1]) for row in table.rows]
        names = table.column("criterion") if i == 0 else [""] * len(pairs)
        dumbbells(ax, names, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
        ax.axvline(91.73 if i < 4 else 74.46, color=DENSE, **DASHED)
        ax.set(title=title, xlim=(0, 100), xticks=[0, 50, 100])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5)
    figure.suptitle("Top-1 (%) of each criterion, dashed: dense", color=GREY, fontsize=10, x=0.01, ha="left")
    return figure


@picture
def efforts() -> Figure:
    figure, axes = panels(1, 2, width=9.5, height=3)
    ours, others, small = (
        table for table in tables("Efforts on a network") if any(cell.startswith("time") for cell in table.head)
    )
    by_time(axes[0], ours, OURS, ", ALPS", (5, 4), (5, 4), (5, 4), (-10, -14), (6, -3))
    by_time(axes[0], others, GREY, ", SparseGPT's masks", (-25, 10), (8, -4))
    by_time(axes[1], small, OURS, "", (2, 7))
    axes[0].set(title="DINOv2-S, 2:4, 256 images: divergence by time")
    axes[1].set(title="ViT of six layers, 2:4, 128 images")
    for ax in axes:
        ax.set(xscale="log", xlabel="time, SparseGPT alone being 1")
        ax.xaxis.set_major_formatter("{x:g}")
    axes[0].set(xlim=(0.8, 100), ylim=(0, None))
    axes[1].set(xlim=(0.8, 400), yscale="log", ylim=(0.0004, 1))
    axes[1].yaxis.set_major_formatter("{x:g}")
    return figure


def by_time(ax: Axes, table: Table, colour: str, masks: str, *places: tuple[int, int]) -> None:
    """Divergence over time of each row that has one, named at the places in turn."""
    place = cycle(places)
    for row in table.rows:
        if numbers(row[table.place("time")]):
            time, value = (number(row[table.place(name)]) for name in ("time", "divergence"))
            alone = row[0].endswith("alone")
            ax.plot([time], [value], color=ALONE if alone else colour)
            name = row[0].split(" (")[0].replace("`", "") + ("" if alone else masks)
            ax.annotate(
                name, (time, value), (8, -3) if alone else next(place), textcoords="offset points", fontsize=8.5
            )


@picture
def smaller() -> Figure:
    figure, (ax,) = panels(1, 1, width=6.4, height=3.2)
    table = next(table for table in tables("Speed with stock libraries") if table.head[0] == "DINOv2-S")
    faster = [number(cell) for cell in table.column("eight images")]
    drops = [number(cell) for cell in table.column("drop")]
    ax.scatter(faster, drops, color=OURS, s=34, label="SNOWS")
    for i, (x, y, name) in enumerate(sorted(zip(faster, drops, table.column("DINOv2-S"), strict=True))):
        ax.annotate(name.strip("`"), (x, y), (3, (6, -13, -23)[i % 3]), textcoords="offset points", fontsize=8)
    others = [(x, number(cell)) for x, cell in zip(faster, table.column("magnitude"), strict=True) if cell]
    ax.scatter(*zip(*others, strict=True), color=ALONE, s=34, label="magnitude, repaired by least squares")
    ax.set(title="DINOv2-S without units: drop (points) over speed", xlabel="times as fast, eight images on a CPU")
    ax.set(xlim=(1, 2.5), ylim=(45, -6))
    ax.legend(loc="lower left", fontsize=8.5)
    return figure


@contextmanager
def drawn(name: str) -> Iterator[Figure]:
    """One of the pictures, for the time of the block."""
    with mpl.rc_context(STYLE):
        figure = PICTURES[name]()
        try:
            yield figure
        finally:
            plt.close(figure)


def digest(figure: Figure) -> str:
    """Of the figures that a picture shows: it stands in the file, and tells a picture that is out of date."""
    shown = hashlib.sha256()
    for axes in figure.axes:
        points = [line.get_xydata() for line in axes.lines]
        points += [dots.get_offsets() for dots in axes.collections]
        points += [[[bar.get_x(), bar.get_height()]] for bar in axes.patches]
        for part in points:
            shown.update(np.round(np.asarray(part, float), 6).tobytes())
    return f"Figures {shown.hexdigest()[:16]} of docs/results.md"


def draw(names: Iterable[str]) -> None:
    PLACE.mkdir(exist_ok=True)
    for name in names:
        with drawn(name) as figure:
            about = {"Date": None, "Description": digest(figure)}
            figure.savefig(PLACE / f"{name}.svg", transparent=True, metadata=about)


if __name__ == "__main__":
    mpl.use("svg")
    draw(sys.argv[1:] or PICTURES)
