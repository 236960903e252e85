"""Patterns side by side on one model: units chosen by several criteria, repaired or not, before and after SNOWS.

    python benchmarks/structured.py MODEL --data DATA --pattern mlp:0.5 [--samples 256] [--test 1000]
        [--cases ours obs ridge magnitude torch-pruning-fpgm ...] [--set NAME=VALUE ...] [--log LOG.jsonl]

Accuracy, agreement with the dense network and the divergence from it are those of the ``--test`` first images of the
test split, shuffled with seed 1; seconds are those of the processor. The cases of Torch-Pruning need
``pip install torch-pruning``.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import snows_hf
from snows_hf.adapters.outputs import outputs_of
from snows_hf.data.images import labelled_batches, open_images
from snows_hf.hub.load import load
from snows_hf.jobs.calibration import class_labels


CASES: dict[str, dict[str, Any]] = {
    "magnitude": {"units": "magnitude", "repair": False, "update": False},
    "taylor": {"units": "snip", "repair": False, "update": False},
    "ridge": {"units": "magnitude", "update": False},
    "obs": {"update": False},
    "ours": {},
}
"""What each is to :func:`snows_hf.prune`."""

PEER = "torch-pruning-"
PEERS = [f"{PEER}{criterion}" for criterion in ("magnitude", "lamp", "fpgm", "taylor")]
"""Torch-Pruning's criteria (torch_pruning_units.py)."""


@torch.no_grad()
def logits_of(model: Any, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([outputs_of(model, batch)["logits"] for batch in batches])


def measured(logits: Tensor, dense: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and agreement in per cent, and the divergence KL(dense ‖ pruned)."""
    p, q = dense.double().log_softmax(1), logits.double().log_softmax(1)
    return {
        "top1": 100 * float((logits.argmax(1) == labels).double().mean()),
        "agreement": 100 * float((logits.argmax(1) == dense.argmax(1)).double().mean()),
        "divergence": float(F.kl_div(q, p, log_target=True, reduction="batchmean")),
    }


@dataclass(frozen=True)
class Test:
    """Images that nothing was chosen on, what the dense network says of them, and their classes."""

    batches: Sequence[Tensor]
    dense: Tensor
    truth: Tensor

    @classmethod
    def of(cls, model: str, data: str, count: int) -> "Test":
        """The first so many images of the test split, shuffled with seed 1."""
        checkpoint, source = load(model), open_images(data, "test")
        rows = source.rows.shuffle(seed=1)
        source = replace(source, rows=rows.select(range(min(count, len(rows)))))
        batches, labels = zip(*labelled_batches(source, checkpoint.preprocess, purpose="measuring"), strict=True)
        dense = logits_of(checkpoint.model, batches)
        return cls(batches, dense, class_labels(torch.cat(labels), source, checkpoint, dense.shape[1]))

    def measured(self, model: Any) -> dict[str, float]:
        return measured(logits_of(model, self.batches), self.dense, self.truth)

    def dense_facts(self) -> dict[str, float]:
        return measured(self.dense, self.dense, self.truth)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the options of benchmarks that prune one model in several ways."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--log", type=Path)
    return parser


def changes_of(given: argparse.Namespace) -> dict[str, Any]:
    """What ``--set`` says, to :func:`snows_hf.prune`: settings, and other options of it."""
    return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in given.set)}


def tell(facts: dict[str, Any], log: Path | None) -> None:
    """Prints what was found, and appends it to the log where there is one."""
    line = json.dumps(facts, ensure_ascii=False)
    print(line, flush=True)
    if log:
        with log.open("a") as file:
            file.write(f"{line}\n")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--pattern", required=True)
    parser.add_argument("--cases", nargs="+", default=[*CASES, *PEERS], choices=[*CASES, *PEERS])
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()

    test = Test.of(given.model, given.data, given.test)
    said = {"pattern": given.pattern, "samples": given.samples, "set": changes_of(given)}
    tell({"case": "dense", **said, **test.dense_facts()}, given.log)
    for case in given.cases:
        started = time.process_time()
        model, parameters = pruned(case, given)
        seconds = time.process_time() - started
        facts = test.measured(model) | {"seconds": seconds, "parameters": parameters}
        tell({"case": case, **said, **facts}, given.log)


def pruned(case: str, given: argparse.Namespace) -> tuple[Any, int]:
    """What a case makes of the model, and how many parameters that has."""
    settings = {"samples": given.samples, **CASES.get(case, {}), **changes_of(given)}
    if case in PEERS:
        from torch_pruning_units import prune

        return prune(given.model, given.pattern, case.removeprefix(PEER), given.data, settings)
    say = print if given.verbose else lambda stage: None
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned"
        result = snows_hf.prune(given.model, given.pattern, data=given.data, output=output, on_stage=say, **settings)
    return result.model, result.report["parameters"]["total"]


if __name__ == "__main__":
    main()
