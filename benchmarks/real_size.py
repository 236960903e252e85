"""Efforts side by side on a model of a real size: accuracy, wall time against the mask alone, and where the time goes.

    python benchmarks/real_size.py MODEL --data DATA [--pattern 2:4] [--samples 256] [--test 1000]
        [--cases mask quick standard best paper] [--seeds 0] [--set NAME=VALUE ...] [--log LOG.jsonl]

``mask`` is the mask alone. Every case is one call of ``snows_hf.prune``, from loading to saving: ``wall`` seconds, and
``processor`` seconds, which other programs hardly change. A stage's seconds do not hold those of stages within it;
``other`` is what no stage has. Accuracy, agreement with the dense network and the divergence from it are those of the
first images of the test split, shuffled with seed 1.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from structured import Test, changes_of, parser_of, tell

import snows_hf
from snows_hf.jobs import prune as job
from snows_hf.masks.evidence import Evidence
from snows_hf.method import layers, objective
from snows_hf.method.factors import IteratedRows, RowBlocks, SharedRows
from snows_hf.method.objective import KStepObjective
from snows_hf.method.streams import Batches, Streams


STAGES: dict[str, list[tuple[Any, str]]] = {
    "loading": [(job, "load_subject")],
    "reading images": [(job, "calibrate")],
    "choosing masks": [(job, "choose")],
    "Gram matrices of masks": [(Evidence, "_grams")],
    "estimate": [(job, "tell_estimate")],
    "batches that fit": [(job, "find_batches")],
    "streams": [(Streams, "advance")],
    "targets": [(Batches, "targets")],
    "values": [(KStepObjective, "value")],
    "gradients and graphs": [(KStepObjective, "expand")],
    "Gram matrices of steps": [(objective, "mean_grams")],
    "preconditioners": [(objective, "row_preconditioner")],
    "M⁻¹": [(kind, "solve") for kind in (IteratedRows, RowBlocks, SharedRows)],
    "products": [(layers, "newton")],
    "saving": [(job, "save")],
}
"""By stage, the calls that are timed. Of Algorithm 2 by itself nothing but products takes time."""


class Clock:
    """Seconds by stage, each without those of stages within it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.within: list[float] = []

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            self.within.append(0.0)
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                self.seconds[stage] += took - self.within.pop()
                if self.within:
                    self.within[-1] += took

        return inner

    @contextmanager
    def running(self) -> Iterator[None]:
        before = [(owner, name, getattr(owner, name)) for calls in STAGES.values() for owner, name in calls]
        for stage, calls in STAGES.items():
            for owner, name in calls:
                setattr(owner, name, self.timed(stage, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, call in before:
                setattr(owner, name, call)


def run(given: argparse.Namespace, case: str, seed: int, changes: dict[str, Any], test: Test) -> dict[str, Any]:
    clock, said, started, processor = Clock(), list[str](), time.perf_counter(), time.process_time()
    effort = {"update": False} if case == "mask" else {"effort": case}
    with tempfile.TemporaryDirectory() as folder, clock.running():
        settings = {"samples": given.samples, "seed": seed, **effort, **changes}
        output = Path(folder) / "pruned"
        result = snows_hf.prune(
            given.model, given.pattern, data=given.data, output=output, on_stage=said.append, **settings
        )
    wall, processor = time.perf_counter() - started, time.process_time() - processor
    estimate = next((found[1] for line in said if (found := re.search(r"will take about (.*) on this", line))), None)
    layer_seconds = sum(layer["seconds"] for layer in result.report["layers"] if "seconds" in layer)
    shares = {stage: round(seconds / wall, 3) for stage, seconds in clock.seconds.most_common()}
    shares["other"] = round(1 - clock.seconds.total() / wall, 3)
    facts = {"case": case, "pattern": given.pattern, "samples": given.samples, "seed": seed, "set": changes}
    facts |= {"threads": torch.get_num_threads(), "estimate": estimate, "layer_seconds": round(layer_seconds)}
    return (
        facts
        | test.measured(result.model)
        | {"wall": round(wall, 1), "processor": round(processor, 1), "shares": shares}
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--cases", nargs="+", default=["mask", "quick", "standard", "best"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    given = parser.parse_args()
    changes = changes_of(given)
    test = Test.of(given.model, given.data, given.test)
    print("dense", test.dense_facts(), flush=True)
    alone: float | None = None
    for seed in given.seeds:
        for case in given.cases:
            facts = run(given, case, seed, changes, test)
            alone = facts["wall"] if case == "mask" else alone
            facts |= {"times the mask": round(facts["wall"] / alone, 2) if alone else None}
            tell(facts, given.log)


if __name__ == "__main__":
    main()
