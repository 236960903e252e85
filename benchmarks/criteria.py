"""Mask criteria alone and under SNOWS, as one table: rows criteria, columns models and patterns.

A cell is top-1 of the criterion alone (with its own update where it has one) → with SNOWS, and the seconds that each
of the two took. Each is one run of the main job; runs that the log already holds are not repeated.

    python benchmarks/criteria.py resnet20:2:4 resnet20:0.9 vit:1:4 --data FOLDER --samples 500 [--log FILE.jsonl]
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from log import once

from snows_hf import prune
from snows_hf.masks.criteria import CRITERIA


def measured(model: str, pattern: str, data: str, given: dict[str, Any]) -> dict[str, Any]:
    report = prune(model, pattern, data=data, eval_data=data, **given).report
    kept = {part: report[part] for part in ("dense", "masked", "pruned", "sparsity", "criterion", "hardware")}
    return kept | {"seconds": sum(layer["seconds"] for layer in report["layers"])}


def cell(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    alone, snows = run["masked"]["top1"], run["pruned"]["top1"]
    worse = " **worse**" if snows < alone else ""
    return f"{alone:.2f} → {snows:.2f}{worse} ({run['criterion']['seconds']:.0f} s, {run['seconds']:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("columns", nargs="+", metavar="MODEL:PATTERN")
    parser.add_argument("--data", required=True, help="calibrates by its train split, measures on its test split")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--criteria", nargs="+", default=sorted(CRITERIA))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    parser.add_argument("--log", type=Path, default=Path("criteria.jsonl"))
    arguments = parser.parse_args()
    settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in arguments.set)}
    columns = [column.partition(":")[::2] for column in arguments.columns]
    rows, dense = [], {}
    for mask in arguments.criteria:
        cells = []
        for model, pattern in columns:
            key = {"model": Path(model).name, "pattern": pattern, "mask": mask}
            key |= {"samples": arguments.samples, "seed": arguments.seed, "settings": settings}
            given = {"samples": arguments.samples, "seed": arguments.seed, "mask": mask, **settings}
            found = once(arguments.log, key, partial(measured, model, pattern, arguments.data, given))
            cells.append(cell(found))
            dense[model, pattern] = found["dense"]["top1"]
        rows.append(f"| {mask} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    heads = [f"{Path(model).name} {pattern} (dense {dense[model, pattern]:.2f})" for model, pattern in columns]
    print(f"\n| criterion | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|", *rows, sep="\n")


if __name__ == "__main__":
    main()
