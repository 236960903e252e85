"""Patterns side by side on one model: units chosen by several criteria, repaired or not, before and after SNOWS.

    python benchmarks/structured.py MODEL --data DATA --pattern mlp:0.5 [--samples 256] [--test 1000]
        [--cases ours obs ridge magnitude ...] [--set NAME=VALUE ...] [--log LOG.jsonl]

Accuracy, agreement with the dense network and the divergence from it are those of the ``--test`` first images of the
test split, shuffled with seed 1.
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
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    changes = changes_of(given)

    test = Test.of(given.model, given.data, given.test)
    print("dense", test.dense_facts(), flush=True)
    for case in given.cases:
        started = time.perf_counter()
        settings = {"samples": given.samples, **CASES[case], **changes}
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "pruned"
            say = print if given.verbose else lambda stage: None
            result = snows_hf.prune(
                given.model, given.pattern, data=given.data, output=output, on_stage=say, **settings
            )
        facts = {"case": case, "pattern": given.pattern, "samples": given.samples, "set": changes}
        facts |= test.measured(result.model)
        facts |= {"seconds": time.perf_counter() - started, "parameters": result.report["parameters"]["total"]}
        tell(facts, given.log)


if __name__ == "__main__":
    main()
