"""Which models can be pruned: every class of timm and of transformers' image models, small, with random weights.

    python benchmarks/coverage.py [--only GLOB] [--log coverage.jsonl] [--again] [--limit SECONDS] [--write]

Each class is measured in a process of its own, with a time limit, and logged; what is in the log is not measured again
(``--again``: but what has failed there). ``--write`` makes docs/coverage.md of the log. The first run takes minutes to
find the smallest model of each of timm's classes.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from coverage_models import Case, build, cases, image_of
from coverage_table import fault, write
from torch import Tensor, nn

from snows_hf.adapters import Chain, build_chain
from snows_hf.adapters.cut import HEAD, SHARED, STEM
from snows_hf.adapters.outputs import outputs_of
from snows_hf.errors import one_line
from snows_hf.hub.save import untied
from snows_hf.masks.choose import choose_masks
from snows_hf.method.cascade import prune_chain
from snows_hf.patterns import NM
from snows_hf.settings import PruneConfig


PATTERN = NM(2, 4)
ASIDE = (STEM, HEAD, SHARED)
SETTINGS = PruneConfig("2:4", k=2, batch_size=4, held_out=0.5)
SETTINGS = SETTINGS.updated(passes=2, cg_max_iter=2, preconditioner="none")
Facts = dict[str, Any]


def measure(case: Case) -> Iterator[Facts]:
    """Facts of a class, as they are found."""
    started = time.perf_counter()
    model, options = build(case)
    blank = image_of(model)
    images = torch.randn(4, *blank.shape[1:], dtype=blank.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = outputs_of(model, images[:3])
    yield {"image": list(blank.shape[2:]), "options": options, "traced": False}
    chain = build_chain(model, blank)
    yield {"traced": True, "operations": len(chain.operations), "groups": len(chain.groups()), "family": chain.family}
    with torch.no_grad():
        yield {"difference": distance(chain.results_of(images[:3]), expected)}
        alone = {name: value[1:2] for name, value in expected.items()}
        yield {"alone": distance(chain.results_of(images[1:2]), alone, expected), "widest": widest(chain, images[:1])}
    yield shares(chain, images[:2])
    yield {"losses": prune_three(chain, images)}
    yield {"stored": stored(case, model, options, images[:3])}
    yield {"seconds": round(time.perf_counter() - started)}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], among: dict[str, Tensor] | None = None) -> float:
    """The largest difference, in units of the outputs' spread between images."""
    worst = 0.0
    for name, value in expected.items():
        spread = (among or expected)[name].var(0).mean().sqrt()
        worst = max(worst, float((found[name] - value).abs().max() / spread))
    return worst if found.keys() == expected.keys() else float("nan")


def widest(chain: Chain, image: Tensor) -> int:
    return max(len(state) for _, _, state in chain.walk((image,)))


def shares(chain: Chain, images: Tensor) -> Facts:
    """Which share of the weights that the outputs depend on is in groups: of Linear's and Conv2d's all, those that are
    not set aside; and which share of all matrices and kernels is no Linear's or Conv2d's."""
    parameters = {name: p for name, p in chain.model.named_parameters() if p.dim() > 1}
    outputs = sum(value.sum() for value in chain.results_of(images).values())
    used = torch.autograd.grad(outputs, list(parameters.values()), allow_unused=True)
    sizes = {name: p.numel() for (name, p), g in zip(parameters.items(), used, strict=True) if g is not None}
    layers = {n: m for n, m in chain.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    own = {name: f"{name}.weight" for name in layers if f"{name}.weight" in sizes}
    grouped = {name for _, group in chain.groups() for name in group.parameters}

    def share(names: list[str]) -> float:
        return sum(sizes[name] for name in names if name in grouped) / max(sum(sizes[name] for name in names), 1)

    left = {name: reason for name, reason in chain.dense.items() if name in own and reason not in ASIDE}
    return {
        "share": share(list(own.values())),
        "share_inner": share([own[name] for name in own if chain.dense.get(name) not in ASIDE]),
        "others": 1 - sum(sizes[name] for name in own.values()) / sum(sizes.values()),
        "left": dict(sorted(left.items(), key=lambda item: -sizes[own[item[0]]])[:5]),
    }


def prune_three(chain: Chain, images: Tensor) -> dict[str, tuple[float | None, float]]:
    """Losses under the mask and after pruning of a group at the beginning, one in the middle and one at the end; on
    the images that they learn from, as there is nothing to learn about others from random ones."""
    fitting = [
        group
        for _, group in chain.groups()
        if all(PATTERN.fits(chain.weight(name).shape) for name in group.parameters)
    ]
    three = {len(fitting) * i // 6 for i in (1, 3, 5)}
    names = [name for i in sorted(three) if i < len(fitting) for name in fitting[i].parameters]
    masks = choose_masks({name: chain.weight(name) for name in names}, PATTERN, "magnitude") if names else {}
    reports = prune_chain(chain, images.repeat(2, 1, 1, 1), masks, SETTINGS) if masks else []
    return {report.name: (report.loss_masked, report.loss_pruned) for report in reports}


def stored(case: Case, model: nn.Module, options: Facts, images: Tensor) -> float:
    """How far a model is from itself after its library has saved it in float32, and loaded it."""
    with tempfile.TemporaryDirectory() as folder:
        model.float()
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder)
        else:
            with untied(model):
                timm.models.save_for_hf(model, folder, model_args=options, safe_serialization=True)
            again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with torch.no_grad():
        return distance(outputs_of(again.double().eval(), images), outputs_of(model.double(), images))


def child(case: Case, tell: Callable[[Facts], None], measuring: Callable[[Case], Iterator[Facts]]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        for facts in measuring(case):
            tell(facts)
    except Exception as error:  # of any library: it is what we want to know
        tell({"error": f"{type(error).__name__}: {one_line(error)}"[:400]})


def run(case: Case, limit: float) -> Facts:
    """All facts of a class that can be found in so many seconds, in a process of its own."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(case, send.send, measure))
    process.start()
    send.close()
    facts: Facts = {}
    end = time.monotonic() + limit
    try:
        while receive.poll(max(end - time.monotonic(), 0)):
            facts |= receive.recv()
        facts["error"] = f"took more than {limit:.0f} s"
    except EOFError:
        if "seconds" not in facts and "error" not in facts:
            facts["error"] = "its process was killed"
    process.kill()
    process.join()
    return facts


def read(log: Path) -> dict[tuple[str, str], Facts]:
    """The last record of each class."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {(record["kind"], record["name"]): record for record in map(json.loads, lines)}


def chosen(log: Path) -> list[Case]:
    """The cases, kept beside the log, as it takes long to choose them."""
    path = log.with_suffix(".cases.json")
    if not path.exists():
        path.write_text(json.dumps([asdict(case) for case in cases()]))
    return [Case(**each) for each in json.loads(path.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="classes whose name or kind matches")
    parser.add_argument("--log", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--again", action="store_true", help="measure again what has failed")
    parser.add_argument("--limit", type=float, default=300, help="seconds a class")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = read(given.log)
    for case in chosen(given.log):
        record = done.get((case.kind, case.name))
        matches = fnmatchcase(case.name, given.only) or fnmatchcase(case.kind, given.only)
        if not matches or (record and not (given.again and fault(record))):
            continue
        record = asdict(case) | run(case, given.limit)
        done[case.kind, case.name] = record
        with given.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{case.kind:12} {case.name:40} {record.get('seconds', ''):4} {fault(record) or 'good'}", flush=True)
    if given.write:
        missing = {"error": "not measured yet"}
        records = [done.get((case.kind, case.name), asdict(case) | missing) for case in chosen(given.log)]
        write(Path(__file__).parents[1] / "docs/coverage.md", records)


if __name__ == "__main__":
    main()
