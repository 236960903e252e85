"""docs/coverage.md, made of the log of benchmarks/coverage.py."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


Record = dict[str, Any]
KINDS = {
    "timm": "Classes of timm",
    "transformers": "Image classifiers of transformers",
    "headless": "Models without a head, and backbones",
    "two towers": "Models of images and text: the image tower is pruned",
    "dense": "Segmentation, depth, detection, and other dense predictions",
}
INTRODUCTION = """\
# Which models can be pruned

Find your model's class: `type(model).__name__`, or, for a checkpoint of transformers, `architectures` in its
`config.json`. One model of each class was built with random weights, small where its configuration lets us (fewer
layers, smaller images), and went the whole way:

1. **traced**: cut into operations, of which some own weights that are pruned together (groups);
2. **equal**: the operations give the model's own outputs, in float64, for three images together and for one alone, up
   to 1e-9 of what the outputs differ by from image to image;
3. **pruned**: three groups, at its beginning, middle and end, to 2:4 with SNOWS, which must improve on the mask alone
   on the four random images that it learns from;
4. **stored**: saved by its own library and loaded again, with equal outputs.

*Operations* and *groups*: what the small model is cut into. *Tensors*: how many, at most, flow from one operation to
the next; memory grows with them. *Share*: of the weights of Linear and Conv2d layers that its outputs depend on, what
is in groups; *inner share*: without stems, embeddings, heads, which stay dense, and weights that are used repeatedly.

Made by `benchmarks/coverage.py`. Where the reason is that a class "took more than" some seconds, or was not measured
yet, nothing is known against it: `--again` measures it with more time.
"""


CHECKS = {"difference": "differ", "alone": "of one image alone differ", "stored": "differ when loaded"}
HEADER = "| class | example | names | operations | groups | tensors | share | inner share | |"


def fault(record: Record) -> str:
    """The first thing that a class fails at; empty for none."""
    if "error" in record:
        return str(record["error"])
    if not record["groups"]:
        return f"no weight can be pruned: {next(iter(record['left'].values()), 'there is none')}"
    for key, what in CHECKS.items():
        if not record[key] <= 1e-9:
            return f"outputs {what} by {record[key]:.1g} of their spread"
    worse = [name for name, (masked, pruned) in record["losses"].items() if not pruned < masked]
    return f"no better than the mask: {', '.join(worse)}" if worse else ""


def remark(record: Record) -> str:
    notes = []
    if record.get("others", 0) > 0.05:
        notes.append(f"{record['others']:.0%} of its weights are in neither Linear nor Conv2d layers")
    if not record.get("losses", True):
        notes.append("2:4 fits no layer")
    if record.get("left") and record.get("share_inner", 1) < 0.95:
        name, reason = next(iter(record["left"].items()))
        notes.append(f"`{name}`: {reason}")
    return "; ".join(notes)


def percent(value: float | None) -> str:
    return "" if value is None else f"{math.floor(100 * value)} %"


def row(record: Record) -> str:
    own = f"`{record['model']}`" if record["model"] != record["name"] else ""
    names = record["names"] if record["kind"] == "timm" else ""
    counts = [record.get(key, "") for key in ("operations", "groups", "widest")]
    cells = [record["name"], own, names, *counts, percent(record.get("share")), percent(record.get("share_inner"))]
    return f"| {' | '.join(map(str, cells))} | {remark(record)} |"


def total(kind: str, records: Sequence[Record]) -> str:
    good = [record for record in records if not fault(record)]
    high = sum(record["share_inner"] >= 0.95 for record in good)
    text = f"| {KINDS[kind]} | {len(good)} of {len(records)} | {high} |"
    names = sum(record["names"] for record in records)
    covered = sum(record["names"] for record in good)
    return f"{text} {covered} of {names} ({covered / names:.1%}) |" if kind == "timm" else f"{text} |"


def write(path: Path, records: Sequence[Record]) -> None:
    """The whole page."""
    kinds = {kind: [record for record in records if record["kind"] == kind] for kind in KINDS}
    lines = [
        INTRODUCTION,
        "| kind | classes that go the whole way | of these with an inner share ≥ 95 % | timm's names |",
    ]
    lines += ["|---|---|---|---|", *(total(kind, own) for kind, own in kinds.items() if own)]
    for kind, own in kinds.items():
        lines += [f"\n## {KINDS[kind]}\n", HEADER]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [row(record) for record in sorted(own, key=lambda r: r["name"].lower()) if not fault(record)]
        if failed := [record for record in own if fault(record)]:
            lines += ["\nNot, or not all the way:\n", "| class | example | names | reason |", "|---|---|---|---|"]
            lines += [
                f"| {r['name']} | `{r['model']}` | {r['names']} | {fault(r)} |".replace("\n", " ") for r in failed
            ]
    path.write_text("\n".join(lines) + "\n")
