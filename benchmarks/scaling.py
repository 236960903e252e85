"""A model of a ViT prune's time and I/O: fitted to runs here, checked on sizes it has not seen, and applied.

Work is counted in forward passes of the segment f^{l:l+K}: a Newton step costs a of them on its batch, besides its
products, each of which costs c; a step's judgement costs one on the held-out images. Both streams of activations then
pass through the operation once. Every run is a process of its own, on random weights and images.

    python benchmarks/scaling.py --log FILE.jsonl [--rate 200 --network 25 --disk 5]

``--rate``: TFLOP/s that one GPU achieves on forward passes; ``--network``: GB/s between GPUs; ``--disk``: GB/s of one
node of 8 GPUs. These three are assumptions about another machine; a and c are measured here.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from log import once
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from snows_hf.adapters import Chain, build_chain
from snows_hf.masks.choose import choose_masks
from snows_hf.method.cascade import prune_chain
from snows_hf.method.streams import split_images
from snows_hf.patterns import parse_pattern
from snows_hf.settings import PruneConfig, settings_for


# width, depth, images, most products per step
FITTED = [(128, 2, 300, 2), (128, 2, 300, 8), (192, 2, 300, 5), (192, 3, 300, 2), (256, 2, 300, 5)]
UNSEEN = [(320, 2, 300, 3), (192, 3, 900, 4)]
SIZE = 32
APPLIED = ["vit_large_patch16_224", "vit_huge_patch14_224", "vit_giant_patch14_224"]


def config_of(images: int, **changes: Any) -> PruneConfig:
    """Of the model: every product is of a whole batch."""
    config = settings_for("standard", "vit", "2:4").updated(
        batch_size=128, curvature_size=0, targets="dense", biases=False
    )
    return config.updated(samples=images, passes=2, layer_steps=8, **({"cg_max_iter": 5} | changes))


def settings(images: int, products: int) -> PruneConfig:
    return config_of(images, cg_max_iter=products, patience=1000, min_gain=0.0, cg_rtol=0.0)


def network(width: int, depth: int) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=10
    ).eval()


@dataclass(frozen=True)
class Work:
    """One layer: floating-point operations of one image in its segment, and its active weights."""

    segment: float
    active: int


@torch.no_grad()
def operations_of(chain: Chain, size: int, device: str = "cpu") -> tuple[list[float], list[int]]:
    """Floating-point operations of one image in every operation of the chain, and bytes of the state after it."""
    state = (torch.zeros(1, 3, size, size, device=device),)
    flops, states = [], []
    for operation in chain.operations:
        counter: Any = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            state = operation.run(state)
        flops.append(float(counter.get_total_flops()))
        states.append(sum(tensor.nbytes for tensor in state))
    return flops, states


def works(chain: Chain, flops: list[float], k: int) -> list[Work]:
    made = []
    for index, group in chain.groups():
        active = sum(chain.weight(name).numel() for name in group.parameters) // 2
        made.append(Work(sum(flops[index : index + k + 1]), active))
    return made


def measure(width: int, depth: int, images: int, products: int) -> None:
    """One run, in this process; prints what it cost."""
    torch.set_num_threads(1)
    config, chain = settings(images, products), build_chain(network(width, depth))
    flops, _ = operations_of(chain, SIZE)
    weights = {name: chain.weight(name).detach() for _, group in chain.groups() for name in group.parameters}
    masks = choose_masks(weights, parse_pattern(config.pattern), config.mask)
    x = torch.randn(images, 3, SIZE, SIZE)
    started = time.process_time()
    with torch.no_grad():
        for part in x.split(128):
            chain((part,))
    forward = (time.process_time() - started) / (images * sum(flops))
    batches = split_images(images, config.batch_size, config.held_out)
    *learners, judge = (part.stop - part.start for part in batches)
    started = time.process_time()
    reports = prune_chain(chain, x, masks, config)
    seconds = time.process_time() - started
    batch = sum(learners) / len(learners)
    pairs = list(zip(reports, works(chain, flops, config.k), strict=True))
    counts = {
        "seconds": seconds,
        "forward": forward,
        "steps": batch * sum(r.steps * w.segment for r, w in pairs),
        "products": batch * sum(r.cg_iterations * w.segment for r, w in pairs),
        "judged": judge * sum((r.steps + 1) * w.segment for r, w in pairs),
        "streams": 2 * images * sum(flops),
    }
    print(json.dumps(counts))


def run(case: tuple[int, int, int, int]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--log", "-", "--measure", *map(str, case)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def passes(found: dict[str, Any]) -> list[float]:
    """What multiplies a and c, in seconds of forward passes on this machine."""
    return [found["forward"] * found[part] for part in ("steps", "products")]


def rest(found: dict[str, Any]) -> float:
    """Seconds of the passes that cost one forward each."""
    return float(found["forward"] * (found["judged"] + found["streams"]))


def applied(
    name: str, chain: Chain, images: int, gpus: int, a: float, c: float, rates: argparse.Namespace
) -> list[str]:
    config = config_of(images)
    flops, states = operations_of(chain, 224, "meta")
    layers = works(chain, flops, config.k)
    batch, steps, products = config.batch_size, config.layer_steps, config.solver.cg_max_iter
    held_out = split_images(images, batch, config.held_out)[-1]
    judge = held_out.stop - held_out.start
    rate = rates.rate * 1e12 * gpus
    solving = sum(w.segment * steps * (batch * (a + c * products) + judge) for w in layers) / rate
    streams = 2 * images * sum(flops) / rate
    vectors = 2 * products + 2  # the gradient, products, and what the preconditioner makes of each
    sent = sum(4 * w.active * steps * vectors for w in layers) * 2 * (gpus - 1) / gpus
    nodes = -(-gpus // 8)
    moved = 2 * 2 * images * sum(states)  # both streams, written and read
    largest = 2 * images * max(states)
    hours = (solving + streams + sent / (rates.network * 1e9)) / 3600
    return [
        name.split("_")[1] + "/" + name.split("patch")[1][:2],
        f"{images:,}",
        str(gpus),
        f"{hours * 60:.1f}",
        f"{sent / 1e9:.1f}",
        f"{largest / 1e12 / nodes:.2f}",
        f"{moved / nodes / (rates.disk * 1e9) / 3600:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", required=True, help="runs that it holds are not repeated")
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--network", type=float, default=25.0)
    parser.add_argument("--disk", type=float, default=5.0)
    parser.add_argument("--measure", type=int, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    found = {case: once(Path(arguments.log), {"case": list(case)}, partial(run, case)) for case in FITTED + UNSEEN}
    # Relative errors count alike: every equation is divided by what was measured.
    rows = torch.tensor([[v / found[case]["seconds"] for v in passes(found[case])] for case in FITTED])
    left = torch.tensor([[1 - rest(found[case]) / found[case]["seconds"]] for case in FITTED])
    a, c = torch.linalg.lstsq(rows, left).solution[:, 0].tolist()
    print(f"A step costs {a:.1f} forward passes of its batch, a product {c:.2f}\n")
    print("| width, depth, images, products | | seconds | predicted | error (%) |\n|---|---|---|---|---|")
    for case, it in found.items():
        predicted = a * passes(it)[0] + c * passes(it)[1] + rest(it)
        kind, error = "fitted" if case in FITTED else "unseen", 100 * (predicted / it["seconds"] - 1)
        print(f"| {', '.join(map(str, case))} | {kind} | {it['seconds']:.0f} | {predicted:.0f} | {error:+.0f} |")
    print(
        "\n| model | images | GPUs | computing (minutes) | sent (GB) | activations per node (TB) | their I/O (hours) |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in APPLIED:
        with torch.device("meta"):
            chain = build_chain(timm.create_model(name).eval())
        for images, gpus in ((20_000, 1), (20_000, 8), (200_000, 8), (1_000_000, 8), (1_000_000, 64)):
            print(f"| {' | '.join(applied(name, chain, images, gpus, a, c, arguments))} |")


if __name__ == "__main__":
    main()
