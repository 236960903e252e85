"""Full-size ViTs pruned whole on one GPU: minutes, memory, products, and how busy the matrix units are.

Random weights and random images: times and memory do not depend on either, accuracy is no question here. The matrix
rate is that of one Gauss-Newton product of the first layer's objective, its operations as torch counts them, over the
rate of a large matrix product on the same device in the same precision.

    python benchmarks/gpu.py [--models B/16 L/16] [--images 1024 5000] [--pattern 2:4] [--tf32] [--autocast]

Whether it runs at all a processor shows, too: --device cpu --models Ti/16 --images 2 --batch-size 1
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from full_size import VIT_L, smooth_images
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from snows_hf.adapters import Chain, build_chain, frozen
from snows_hf.masks.choose import choose
from snows_hf.masks.evidence import Evidence
from snows_hf.method.cascade import prune_chain
from snows_hf.method.fitting import fit_batches
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment
from snows_hf.patterns import Masks, parse_pattern
from snows_hf.runtime.device import describe_hardware, find_device
from snows_hf.runtime.run import Run
from snows_hf.settings import PruneConfig, settings_for


VIT_TI = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}

MODELS = {"Ti/16": VIT_TI, "B/16": {}, "L/16": VIT_L}


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of one run, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def matrix_rate(device: torch.device, size: int, autocast: bool) -> float:
    """Operations a second of a square matrix product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if autocast else torch.float32)
    return 2 * size**3 / seconds(lambda: a @ a, device)


def product_rate(chain: Chain, masks: Masks, config: PruneConfig, device: torch.device) -> float:
    """Operations a second of one curvature product of the first layer, on one batch."""
    images = (smooth_images(config.batch_size).to(device),)
    index, group = chain.groups()[0]
    segment = Segment.cut(chain, index, config.k)
    active = ActiveWeights.of(group, masks, device)
    with torch.no_grad():
        for operation in chain.operations[:index]:
            images = operation.run(images)
    w, config = active.within(chain), config.updated(preconditioner="none", gradual=0.0)
    expansion = KStepObjective(segment, active, images, config, autocast=config.autocast).expand(w)
    p = torch.randn_like(w)
    with FlopCounterMode(display=False) as counter:
        expansion.product(p)
    return counter.get_total_flops() / seconds(lambda: expansion.product(p), device)


def run(name: str, n: int, pattern: str, device: torch.device, **settings: float) -> list[str]:
    """One row of the table: a model of that size pruned on ``n`` images."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000, **MODELS[name])).eval().to(device)
    chain = build_chain(model)
    weights = {p: chain.weight(p).detach() for _, group in chain.groups() for p in group.parameters}
    config = settings_for("standard", chain.family, pattern).updated(samples=n, **settings)
    images = smooth_images(n)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    choice = choose(Evidence(weights, parse_pattern(pattern), config, chain, images))
    chosen = time.perf_counter()
    masks = choice.masks
    config = fit_batches(Run(device, on_stage=print), chain, images[:2], masks, config)
    reports = prune_chain(chain, images, masks, config, start=choice.weights)
    ended = time.perf_counter()
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else ""
    with frozen(model):
        share = product_rate(chain, masks, config, device) / matrix_rate(
            device, 8192 if device.type == "cuda" else 1024, config.autocast
        )
    products = sum(report.cg_iterations for report in reports)
    return [
        name,
        pattern,
        str(n),
        str(config.batch_size),
        str(products),
        f"{(chosen - started) / 60:.1f}",
        f"{(ended - started) / 60:.1f}",
        memory,
        f"{100 * share:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["B/16", "L/16"])
    parser.add_argument("--images", type=int, nargs="+", default=[1024, 5000])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--tf32", action="store_true", help="matrix products of float32 in TF32")
    parser.add_argument("--autocast", action="store_true", help="steps in bfloat16")
    arguments = parser.parse_args()
    settings = {"batch_size": arguments.batch_size, "autocast": arguments.autocast}
    device = find_device(arguments.device)
    torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")
    precision = "bfloat16" if arguments.autocast else "TF32" if arguments.tf32 else "float32"
    print(f"{describe_hardware(device)}, {precision}, random weights and images")
    columns = [
        "ViT",
        "pattern",
        "images",
        "batch",
        "products",
        "minutes for the masks",
        "minutes in all",
        "peak memory (GB)",
        "matrix rate (% of peak)",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name in arguments.models:
        for n in arguments.images:
            row = run(name, n, arguments.pattern, device, **settings)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
