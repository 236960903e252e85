"""What report.html and compare.html draw, besides what stands in the reports themselves."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jinja2

from ..hub.save import alone_of, retrainings, takes_steps


LISTED = 20
"""Most classes that are drawn as a matrix, and most changes that a list of classes or of confusions shows."""

MARGIN = 6.0
"""Per cent of a picture that are left free at each side."""

FLOOR = 100 - MARGIN


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
    kept = (masked, pruned) if comparable and dense else (None, None)
    as_reported = "name", "source", "pattern", "update", "samples", "sparsity", "size", "flops", "seconds"
    return {key: found[key] for key in as_reported} | {
        "mask": found["settings"]["mask"],
        "retrained": bool(retrained),
        "k": found["settings"]["k"] if takes_steps(found) else None,
        "dense": dense,
        "masked": masked,
        "pruned": pruned,
        "drop": dense - pruned if comparable else None,
        "kept_masked": kept[0] and 100 * kept[0] / dense,
        "kept": kept[1] and 100 * kept[1] / dense,
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
    steps = [("dense", "dense"), (alone, "masked"), *([("SNOWS", "pruned")] if found["update"] else [])]
    solved = [layer for layer in all_layers(found) if "loss_start" in layer]
    bars = ("loss_start", "masked"), ("loss_pruned", "pruned")
    axis = LogAxis([layer[key] for layer in solved for key, _ in bars if layer[key]])
    fidelity = found.get("fidelity")
    return {
        "alone": alone,
        "steps": takes_steps(found),
        "accuracy": [(what, key, found[key]) for what, key in steps if found[key]],
        "fidelity": [(what, key, fidelity[key]) for what, key in steps[1:]] if fidelity else [],
        "cosine": min(figures["cosine"] for figures in fidelity["pruned"]["outputs"].values()) if fidelity else None,
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
        "units": [{"name": name} | counted for name, counted in (found.get("units") or {}).items()],
        "zeros": [layer | inputs_view(found["inputs"][layer["name"]]) for layer in found["layers"]]
        if found["sparsity"]
        else [],
        "reasons": by_reason(found.get("never_pruned", {})),
        "classes": shown_classes(found["class_changes"]),
        "retrainings": retrainings(found),
    }


def inputs_view(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's inputs with the curve of their shares of zeros, from the least to the greatest, in a box of 100 × 20,
    filled down to its floor."""
    shares = inputs["shares"] if len(inputs["shares"]) > 1 else 2 * inputs["shares"]
    curve = " ".join(f"{100 * i / (len(shares) - 1):.1f},{20 - 20 * share:.1f}" for i, share in enumerate(shares))
    return {"inputs": inputs["count"], "unread": inputs["unread"], "curve": f"0,20 {curve} 100,20"}


def by_reason(never_pruned: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Layers that no pruning reaches, by the reason."""
    reasons = dict.fromkeys(never_pruned.values())
    return [(reason, [name for name, own in never_pruned.items() if own == reason]) for reason in reasons]


def pareto_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The picture of compare.html: accuracy that is kept over operations that are left, both in per cent of the dense
    model's, as places in per cent of width and height. None where fewer than two models have accuracies.

    Returns:
        ``points`` with ``number`` (the model's place in ``rows``, from 1), ``x``, ``y``, ``masked`` (the y of the mask
        alone, the floor where it lies below; None where there is none) and ``best`` (no other keeps as much with as
        few operations); ``front``, pairs of neighbouring ``best`` points; ``across`` and ``up``, the axes' ticks with
        what they say; ``floor``.
    """
    measured = [(i, row) for i, row in enumerate(rows, 1) if None not in (row["kept"], row["kept_masked"])]
    found = [(i, 100 / row["flops"]["reduction"], row) for i, row in measured]
    if len(found) < 2:
        return None
    kept = [row["kept"] for _, _, row in found]
    across = LinearAxis(min(left for _, left, _ in found), 100.0)
    up = LinearAxis(min(95.0, *kept), max(100.0, *kept))
    points = [
        {
            "number": i,
            "name": row["name"],
            "x": across.place(left),
            "y": 100 - up.place(row["kept"]),
            "masked": min(100 - up.place(row["kept_masked"]), FLOOR) if row["update"] else None,
            "best": not any(
                other <= left and one["kept"] >= row["kept"] and (other, one["kept"]) != (left, row["kept"])
                for _, other, one in found
            ),
        }
        for i, left, row in found
    ]
    best = sorted((point for point in points if point["best"]), key=lambda point: point["x"])
    return {
        "points": points,
        "front": list(pairwise(best)),
        "across": across.ticks(),
        "up": [(100 - place, value) for place, value in up.ticks()],
        "floor": FLOOR,
    }


class LinearAxis:
    """An axis from a whole step of 1, 2, 5, 10 or 20 on, inside of the margins."""

    def __init__(self, low: float, high: float) -> None:
        self.step = next((step for step in (1, 2, 5, 10) if high - low <= 6 * step), 20)
        self.low = self.step * math.floor(low / self.step)
        self.high = max(high, self.low + self.step)

    def place(self, value: float) -> float:
        """In per cent of the axis."""
        return MARGIN + (100 - 2 * MARGIN) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, int]]:
        return [(self.place(value), value) for value in range(self.low, math.floor(self.high) + 1, self.step)]


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
    rows = [row | class_bar(row) for row in classes]
    rows.sort(key=lambda row: row["change"])
    if len(rows) > LISTED:
        rows = [*rows[: LISTED // 2], *rows[-LISTED // 2 :]]
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
        "rows": rows,
        "total": len(classes),
        "names": [row["name"] for row in classes],
        "matrix": matrix,
        "confusions": named,
    }


def class_bar(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a class's images, in per cent: those that both models got right, and the change."""
    share = 100 / max(row["images"], 1)
    both = min(row["dense"], row["pruned"])
    return {"both": share * both, "change": share * (row["pruned"] - row["dense"])}


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
