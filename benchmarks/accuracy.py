"""Accuracy of pruned models over patterns and seeds, dense and mask alone beside it, as a table.

Each run is the main job itself, with its defaults; runs that the log already holds are not repeated.

    python benchmarks/accuracy.py MODEL --data FOLDER --pattern 2:4 1:4 --samples 500 [--seed 0 1 2] [--log FILE.jsonl]
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from log import once

from snows_hf import prune


def measured(model: str, pattern: str, data: str, given: dict[str, Any]) -> dict[str, Any]:
    report = prune(model, pattern, data=data, eval_data=data, **given).report
    return {part: report[part] for part in ("dense", "masked", "pruned", "seconds", "hardware", "layers")}


def row(found: list[dict[str, Any]]) -> str:
    """One line of the table from the runs of all seeds of one setting."""
    first = found[0]
    dense, masked = first["dense"]["top1"], first["masked"]["top1"]
    pruned = [run["pruned"]["top1"] for run in found]
    spread = f"{min(pruned):.2f}–{max(pruned):.2f}" if len(pruned) > 1 else "one seed"
    return (
        f"| {first['model']} | {first['pattern']} | {first['samples']} | {dense:.2f} | {masked:.2f} "
        f"| {mean(pruned):.2f} ({spread}) | {dense - mean(pruned):.2f} | {mean(r['seconds'] for r in found):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibrates by its train split, measures on its test split")
    parser.add_argument("--pattern", nargs="+", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    parser.add_argument("--log", type=Path, default=Path("accuracy.jsonl"))
    arguments = parser.parse_args()
    settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in arguments.set)}
    name = Path(arguments.model).name
    lines = []
    for pattern in arguments.pattern:
        found = []
        for seed in arguments.seed:
            key = {"model": name, "pattern": pattern, "samples": arguments.samples, "seed": seed, "settings": settings}
            given = {"samples": arguments.samples, "seed": seed, **settings}
            found.append(once(arguments.log, key, partial(measured, arguments.model, pattern, arguments.data, given)))
        lines.append(row(found))
        print(lines[-1], flush=True)
    print("\n| model | pattern | images | dense | mask alone | pruned: mean (range) | drop | seconds |")
    print("|---|---|---|---|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
