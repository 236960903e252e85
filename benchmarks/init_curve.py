"""The curve of pruning at initialisation: accuracy over sparsity, a line for each criterion, with and without warm-up.

Each point is one training (snows_hf.train); those that the log already holds are not repeated. Collapsed layers are
counted in brackets, a network whose logits no longer depend on the images is marked with †.

    python benchmarks/init_curve.py resnet20_cifar --data FOLDER --epochs 30 --criteria random magnitude snip synflow
        --sparsity 0.9 0.98 --warm-up 0 8 [--seed 0 1] [--plot FILE.png] [--log FILE.jsonl]
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from log import once

from snows_hf import train


def measured(source: str, data: str, pattern: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    report = train(source, data, pattern, eval_data=data, **settings).report
    return {part: report[part] for part in ("accuracy", "collapse", "losses", "images", "seconds", "hardware")}


def cell(runs: list[dict[str, Any]]) -> str:
    collapsed = max(len(run["collapse"]["layers"]) for run in runs)
    cut = any(not run["collapse"]["connected"] for run in runs)
    return f"{mean(run['accuracy']['top1'] for run in runs):.2f}{f' [{collapsed}]' if collapsed else ''}{'†' * cut}"


def plot(lines: dict[tuple[str, int], dict[float, float]], dense: float, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    masks = list(dict.fromkeys(mask for mask, _ in lines))
    for (mask, warm_up), points in lines.items():
        label = f"{mask}, {f'warm-up on {warm_up} batches' if warm_up else 'no warm-up'}"
        style = {"color": f"C{masks.index(mask)}", "linestyle": "-" if warm_up else "--", "marker": "o"}
        axes.plot(list(points), list(points.values()), label=label, **style)
    axes.axhline(dense, color="grey", linestyle=":", label="dense")
    axes.set(xlabel="sparsity", ylabel="top-1 (%)", title=title)
    axes.legend(fontsize="small")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a name that timm knows, or a folder with a configuration")
    parser.add_argument("--data", required=True, help="trains on its train split, measures on its test split")
    parser.add_argument("--criteria", nargs="+", default=["random", "magnitude", "snip", "synflow", "fp", "hp"])
    parser.add_argument("--sparsity", nargs="+", default=["0.8", "0.9", "0.95", "0.98"])
    parser.add_argument("--warm-up", nargs="+", type=int, default=[0, 8], metavar="BATCHES")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--log", type=Path, default=Path("init_curve.jsonl"))
    arguments = parser.parse_args()
    settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in arguments.set)}
    settings["epochs"] = arguments.epochs

    def runs(pattern: str | None, **chosen: Any) -> list[dict[str, Any]]:
        found = []
        for seed in arguments.seed:
            key = {"source": Path(arguments.source).name, "data": Path(arguments.data).name, "pattern": pattern}
            key |= {"seed": seed, "settings": settings} | chosen
            given = settings | chosen | {"seed": seed}
            found.append(once(arguments.log, key, partial(measured, arguments.source, arguments.data, pattern, given)))
        return found

    dense = mean(run["accuracy"]["top1"] for run in runs(None))
    head = f"{Path(arguments.source).name}, {arguments.epochs} epochs, dense {dense:.2f} %"
    print(f"{head}\n\n| criterion | warm-up | {' | '.join(arguments.sparsity)} |", flush=True)
    print("|---" * (2 + len(arguments.sparsity)) + "|", flush=True)
    lines: dict[tuple[str, int], dict[float, float]] = {}
    for mask in arguments.criteria:
        for warm_up in arguments.warm_up:
            cells = []
            for sparsity in arguments.sparsity:
                found = runs(sparsity, mask=mask, warm_up_bn=warm_up)
                cells.append(cell(found))
                points = lines.setdefault((mask, warm_up), {})
                points[float(sparsity)] = mean(run["accuracy"]["top1"] for run in found)
            print(f"| {mask} | {warm_up or 'no'} | {' | '.join(cells)} |", flush=True)
    if arguments.plot:
        plot(lines, dense, head, arguments.plot)


if __name__ == "__main__":
    main()
