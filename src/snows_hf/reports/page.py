"""What report.html and compare.html draw, besides what stands in the reports themselves."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any

import jinja2

from ..hub.save import alone_of, retrainings


LISTED = 20
"""Most classes that are drawn as a matrix, and most changes that a list of classes or of confusions shows."""


def class_changes(
    dense: Mapping[str, Any] | None, pruned: Mapping[str, Any] | None, names: Sequence[str] | None
) -> dict[str, Any] | None:
    """Which classes lost and gained between two evaluations on the same images, by :class:`Accuracy`'s confusions.

    Returns:
        ``classes``, each with ``name``, ``images``, and how many of them ``dense`` and ``pruned`` got right;
        ``confusions``, those whose count changed, with the classes' places ``true`` and ``predicted`` in ``classes``
        (other than each other), and the counts, largest change first. None where not measured.
    """
    if not dense or not pruned or not dense.get("confusion") or not pruned.get("confusion"):
        return None
    before, after = (
        Counter({tuple(map(int, pair.split())): int(count) for pair, count in measured["confusion"].items()})
        for measured in (dense, pruned)
    )
    pairs = sorted({*before, *after})
    numbers = sorted({number for pair in pairs for number in pair})
    classes = [
        {
            "name": names[number] if names and number < len(names) else f"class {number}",
            "images": sum(count for (true, _), count in before.items() if true == number),
            "dense": before[number, number],
            "pruned": after[number, number],
        }
        for number in numbers
    ]
    place = {number: i for i, number in enumerate(numbers)}
    confusions = [
        {"true": place[pair[0]], "predicted": place[pair[1]], "dense": before[pair], "pruned": after[pair]}
        for pair in pairs
        if pair[0] != pair[1] and before[pair] != after[pair]
    ]
    return {"classes": classes, "confusions": sorted(confusions, key=lambda c: -abs(c["pruned"] - c["dense"]))}


def summary_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """One result's row of a comparison: see :func:`compare`."""
    solved = [layer for layer in found["layers"] if layer.get("loss_start") and layer.get("loss_pruned")]
    ratios = [math.log(layer["loss_pruned"] / layer["loss_start"]) for layer in solved]
    retrained = retrainings(found)
    measured = retrained[-1] if retrained else found
    accuracies = found["dense"], found["masked"], measured["after" if retrained else "pruned"]
    dense, masked, pruned = (accuracy and accuracy["top1"] for accuracy in accuracies)
    comparable = None not in (dense, pruned) and measured["eval_data"] == found["eval_data"]
    as_reported = "name", "source", "pattern", "update", "samples", "sparsity", "size", "flops", "seconds"
    return {key: found[key] for key in as_reported} | {
        "mask": found["settings"]["mask"],
        "retrained": bool(retrained),
        "k": found["settings"]["k"],
        "dense": dense,
        "masked": masked,
        "pruned": pruned,
        "drop": dense - pruned if comparable else None,
        "eval_data": measured["eval_data"],
        "loss_left": math.exp(sum(ratios) / len(ratios)) if ratios else None,
        "products": sum(layer.get("cg_iterations", 0) for layer in all_layers(found)),
    }


def all_layers(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reports of the layers in the first sweep, in later ones, and of the joint solve."""
    return [*found["layers"], *found.get("later_sweeps", [])]


def view_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What report.html draws besides the report itself: bars, axes, lines, in per cent of the width."""
    alone = alone_of(found)
    steps = [("dense", "dense", "dense"), (alone, "masked", "masked")]
    if found["update"]:
        steps.append(("SNOWS", "pruned", "pruned"))
    solved = [layer for layer in all_layers(found) if "loss_start" in layer]
    bars = ("loss_start", "masked"), ("loss_pruned", "pruned")
    axis = LogAxis([layer[key] for layer in solved for key, _ in bars if layer[key]])
    return {
        "accuracy": [(what, kind, found[key]) for what, key, kind in steps if found[key]],
        "fidelity": [(what, found["fidelity"][key]) for what, key, _ in steps[1:]] if found.get("fidelity") else [],
        "summary": summary_of(found),
        "ticks": axis.ticks(),
        "solved": [
            layer
            | {
                "bars": [(kind, axis.place(layer[key])) for key, kind in bars],
                "line": polyline(layer["loss_start"], layer.get("losses") or []),
            }
            for layer in solved
        ],
        "strips": [layer | {"cells": strip(found["rows"][layer["name"]])} for layer in found["layers"]],
        "classes": shown_classes(found["class_changes"]),
        "retrainings": retrainings(found),
    }


def strip(shares: Sequence[float]) -> list[tuple[float, float, float]]:
    """Cells of a strip as start and width in per cent, and share; equal neighbours are one cell, without a seam."""
    runs = [(share, len(list(run))) for share, run in groupby(shares)]
    starts = accumulate((length for _, length in runs), initial=0)
    scale = 100 / len(shares)
    return [(scale * start, scale * length, share) for start, (share, length) in zip(starts, runs, strict=False)]


class LogAxis:
    """A logarithmic axis over whole decades that hold all ``values`` (positive)."""

    def __init__(self, values: Sequence[float]) -> None:
        self.low = math.floor(math.log10(min(values))) if values else 0
        self.high = max(math.ceil(math.log10(max(values))), self.low + 1) if values else 1

    def place(self, value: float | None) -> float | None:
        """In per cent of the axis; None for a value that it does not hold."""
        if not value or value < 0:
            return None
        return 100 * (math.log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, int]]:
        """Places and powers of ten, six at most."""
        every = math.ceil((self.high - self.low) / 5)
        powers = range(self.low, self.high + 1, every)
        return [(100 * (power - self.low) / (self.high - self.low), power) for power in powers]


def polyline(start: float | None, losses: Sequence[float | None]) -> str | None:
    """Points of a line through a layer's held-out losses by step, on log scale, in a box of 100 × 20."""
    values = [math.log10(value) for value in (start, *losses) if value and value > 0]
    if len(values) < 2:
        return None
    low, spread = min(values), max(values) - min(values)
    return " ".join(
        f"{100 * i / (len(values) - 1):.1f},{19 - 18 * ((value - low) / spread if spread else 0):.1f}"
        for i, value in enumerate(values)
    )


def shown_classes(changes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows by change, the matrix where there are few classes, else the largest confusions."""
    if changes is None:
        return None
    classes, confusions = changes["classes"], changes["confusions"]
    rows = [row | {"share": 100 * (row["pruned"] - row["dense"]) / max(row["images"], 1)} for row in classes]
    rows.sort(key=lambda row: row["share"])
    if len(rows) > LISTED:
        rows = [*rows[: LISTED // 2], *rows[-LISTED // 2 :]]
    widest = max(abs(row["share"]) for row in rows) or 1.0
    matrix = None
    if len(classes) <= LISTED:
        right = [{"true": i, "predicted": i} | row for i, row in enumerate(classes)]
        cells = {(c["true"], c["predicted"]): c["pruned"] - c["dense"] for c in (*right, *confusions)}
        strongest = max(1, *map(abs, cells.values()))
        places = range(len(classes))
        changed = [[cells.get((i, j), 0) for j in places] for i in places]
        matrix = [[(cell, round(80 * abs(cell) / strongest)) for cell in row] for row in changed]
    named = [c | {key: classes[c[key]]["name"] for key in ("true", "predicted")} for c in confusions[:LISTED]]
    return {
        "rows": [row | {"bar": 50 * abs(row["share"]) / widest} for row in rows],
        "total": len(classes),
        "names": [row["name"] for row in classes],
        "matrix": matrix,
        "confusions": named,
    }


def render(template: str, **context: Any) -> str:
    """A page from a template in templates/. Whatever stands in reports is text: escaped, never markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("snows_hf.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)
