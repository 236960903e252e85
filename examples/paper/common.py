"""What the scripts of this folder share: their arguments, runs that a log keeps, tables.

Every script takes the folders that hold the checkpoints (``--models``: resnet20_cifar10 and vit_cifar10_timm) and the
images (``--data``: cifar10 and cifar100, each with train.parquet and test.parquet), and prints one Markdown table for
each model. What a script has measured stands in its log (JSON lines); a run that was cut off goes on from there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import snows_hf
from snows_hf.adapters import frozen
from snows_hf.hub.save import read_report
from snows_hf.method.newton import Expansion, newton
from snows_hf.method.objective import KStepObjective
from snows_hf.method.streams import masked_operations
from snows_hf.settings import SolverConfig


sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from log import once
from solver import Setting


MODELS = {"resnet20": "resnet20_cifar10", "vit": "vit_cifar10_timm"}

Record = dict[str, Any]

ONE_PASS: Record = {"joint_steps": 0, "layer_steps": 0, "passes": 1, "patience": 10**9, "min_gain": 0.0}
"""Algorithms 2 and 3 as the paper has them: each layer takes one step on every batch, and nothing comes after."""


AS_IN_THE_PAPER: Record = {"mask": "magnitude", "permute": False}
"""Masks of the paper where a table names no others, whatever this package's defaults are."""


def arguments(doc: str, images: int, more: Sequence[tuple[str, Record]] = ()) -> argparse.Namespace:
    """The command line, by a script's docstring and its default number of calibration images.

    Args:
        doc: docstring.
        images: default of ``--images``.
        more: further options, with what argparse is to know of them.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--data", type=Path, required=True, help="folder of the images")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="models; default: all")
    parser.add_argument("--images", type=int, default=images, help="calibration images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", nargs="+", default=[], help="prune only layers that match these wildcards")
    parser.add_argument("--threads", type=int, help="of the processor; default: all")
    parser.add_argument("--log", type=Path, default=Path("paper.jsonl"), help="measured figures, kept from run to run")
    for name, known in more:
        parser.add_argument(name, **known)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(f"{torch.get_num_threads()} CPU threads", file=sys.stderr)
    return given


def model_folder(given: argparse.Namespace, name: str) -> str:
    return str(given.models / MODELS[name])


def pruned(given: argparse.Namespace, name: str, pattern: str, output: Path | None = None, **settings: Any) -> Record:
    """One run of the main job on CIFAR-10, or what the log has of it: accuracies, losses, seconds.

    Args:
        given: command line.
        name: of the model, in :data:`MODELS`.
        pattern: as for ``snows-hf prune``.
        output: folder to save to, which then is the log: what is there already is not made again.
        settings: of ``snows_hf.jobs.prune``, beyond images, seed and layers.
    """
    images = {"samples": given.images, "seed": given.seed, "layers": tuple(given.layers)}
    settings = images | AS_IN_THE_PAPER | settings
    data = str(given.data / "cifar10")
    key = json.loads(json.dumps({"model": MODELS[name], "pattern": pattern, "settings": settings}))

    def run() -> Record:
        marks: list[tuple[str, float]] = []

        def mark(stage: str) -> None:
            marks.append((stage, time.process_time()))
            print(f"  {stage}", file=sys.stderr)

        result = snows_hf.prune(
            model_folder(given, name), pattern, data=data, eval_data=data, output=output, on_stage=mark, **settings
        )
        mark("Done")
        return figures(result.report, marks)

    print(f"{MODELS[name]}, {pattern}, {settings}", file=sys.stderr)
    if output is None:
        return once(given.log, key, run)
    if not output.exists():
        return run()
    report = read_report(output)
    wanted = images | {"layers": list(given.layers)}
    if report["pattern"] != pattern or any(report["settings"][part] != value for part, value in wanted.items()):
        sys.exit(f"{output} holds another run: remove it, or give another --work.")
    return figures(report, [])


def figures(report: Record, marks: Sequence[tuple[str, float]]) -> Record:
    """What the tables need of a report, and the processor seconds of the cascade by the marks of its stages."""
    kept = {key: report[key] for key in ("samples", "sparsity", "hardware", "seconds", "layers", "later_sweeps")}
    kept |= {key: report[key]["top1"] for key in ("dense", "masked", "pruned")}
    # Processor time of the cascade alone: on a machine with other work, clocks say little.
    begin = next((i for i, (stage, _) in enumerate(marks) if stage.startswith("Pruning ")), None)
    return kept | {"cascade_cpu_seconds": marks[begin + 1][1] - marks[begin][1] if begin is not None else 0.0}


def logged(given: argparse.Namespace, key: Record, run: Callable[[], Record]) -> Record:
    """What the log has of ``key``, or else what ``run`` measures."""
    print(", ".join(f"{name} {value}" for name, value in key.items()), file=sys.stderr)
    return once(given.log, key | {"seed": given.seed}, run)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], differs: str) -> None:
    """A Markdown table, and below it what is not as in the paper."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    print(f"\nOther than in the paper: {differs}", flush=True)


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# ---- one layer of the dense network, by itself


def layer_setting(given: argparse.Namespace, name: str, pattern: str, k: int) -> Setting:
    """Chain, images, magnitude masks and K, by which ``Setting.objectives`` makes the problem of any layer."""
    data = str(given.data / "cifar10")
    return Setting.of(model_folder(given, name), data, given.images, given.seed, pattern, k)


def layer_arguments(doc: str, seconds: float) -> argparse.Namespace:
    """The command line of a figure on single layers, by its default of processor time for each run."""
    more = [
        ("--places", {"type": int, "nargs": "+", "help": "layers by number from 0; -1 for all"}),
        ("--seconds", {"type": float, "default": seconds, "help": "processor time of each run on each layer"}),
        ("--k", {"type": int, "default": 10}),
    ]
    return arguments(doc, 512, more)


def chosen_layers(given: argparse.Namespace, setting: Setting) -> list[int]:
    """Indices of operations: of the layers at ``--places`` among all; the first, middle and last where not given."""
    every = masked_operations(setting.chain, setting.masks)
    places = given.places or [0, len(every) // 2, len(every) - 1]
    return every if places == [-1] else [every[place] for place in places]


def each_layer(
    given: argparse.Namespace, name: str, figure: str
) -> Iterator[tuple[Setting, int, str, Callable[[Record, Callable[[], Record]], Record]]]:
    """The chosen layers of one model, as figures measure them: setting, index, name of the layer, and what the log has
    of a run on it, by what tells the run from others."""
    setting = layer_setting(given, name, "2:4", given.k)
    shared = {"figure": figure, "model": name, "seconds": given.seconds, "images": given.images, "k": given.k}
    with frozen(setting.chain.model):
        for index in chosen_layers(given, setting):
            layer = setting.chain.operations[index].name

            def find(key: Record, run: Callable[[], Record], layer: str = layer) -> Record:
                return logged(given, shared | {"layer": layer} | key, run)

            yield setting, index, layer, find


class OutOfTimeError(Exception):
    """A run has used up its processor time."""


@dataclass
class Clock:
    """Processor seconds since the start, and the held-out losses by the time they were found at."""

    limit: float
    trace: list[tuple[float, float]]
    started: float

    @classmethod
    def start(cls, limit: float) -> "Clock":
        return cls(limit, [], time.process_time())

    def now(self) -> float:
        return time.process_time() - self.started

    def check(self) -> None:
        if self.now() > self.limit:
            raise OutOfTimeError

    def best(self, share: float = 1.0) -> float:
        """Lowest loss found within a share of the time."""
        return min(loss for at, loss in self.trace if at <= share * self.limit or (at, loss) == self.trace[0])


@dataclass(frozen=True)
class Judge:
    """The held-out objective, which notes on the clock what it is asked."""

    objective: KStepObjective
    clock: Clock

    def value(self, w: Tensor) -> float:
        loss = self.objective.value(w)
        self.clock.trace.append((self.clock.now(), loss))
        return loss

    def expand(self, w: Tensor) -> Expansion:
        return self.objective.expand(w)


@dataclass(frozen=True)
class Timed:
    """A batch whose products end the run when its time is over, in the middle of a system too."""

    objective: KStepObjective
    clock: Clock

    def value(self, w: Tensor) -> float:
        self.clock.check()
        return self.objective.value(w)

    def expand(self, w: Tensor) -> Expansion:
        self.clock.check()
        made = self.objective.expand(w)

        def product(p: Tensor) -> Tensor:
            self.clock.check()
            return made.product(p)

        return replace(made, product=product)


def timed_newton(
    setting: Setting,
    index: int,
    solver: SolverConfig,
    limit: float,
    batch_size: int,
    preconditioner: str,
    curvature: str,
) -> Clock:
    """Algorithm 2 on one layer, over its batches again and again, until the time is over."""
    *batches, judge = setting.objectives(index, batch_size)
    for objective in (*batches, judge):
        objective.preconditioner, objective.curvature = preconditioner, curvature
    clock = Clock.start(limit)

    def endless() -> Iterator[Timed]:
        return (Timed(batch, clock) for batch in cycle(batches))

    try:
        solver = replace(solver, passes=1, patience=10**9)
        newton(endless(), Judge(judge, clock), judge.active.within(setting.chain), solver)
    except OutOfTimeError:
        pass
    return clock
