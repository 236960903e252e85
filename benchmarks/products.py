"""What one curvature product costs, in forward passes of the same segment.

Full-size ViT-B/16 (K = 3) and ResNet-50 (K = 30), random weights and images, on whatever device is named; medians of
products and forwards that alternate.

    python benchmarks/products.py [--images 2] [--repeats 5] [--device cpu]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import timm
import torch
from torch import Tensor

from snows_hf.adapters import build_chain, frozen
from snows_hf.masks.choose import choose_masks
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment
from snows_hf.patterns import NM
from snows_hf.settings import PruneConfig


MODELS = {"vit_base_patch16_224": (3, (0, 1, 2, 3)), "resnet50": (30, (0, 20, 40))}
"""timm name → K, and which groups are timed."""


def seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def cost(objective: KStepObjective, w: Tensor, repeats: int, device: torch.device) -> tuple[float, float]:
    """Median seconds of a forward pass, and of a product, timed in turns after one of each."""
    product, p = objective.expand(w).product, torch.randn_like(w)
    runs = (partial(objective.value, w), partial(product, p))
    times = [[seconds(run, device) for run in runs] for _ in range(repeats + 1)][1:]
    forward, one_product = (median(column) for column in zip(*times, strict=True))
    return forward, one_product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    ratios: dict[str, list[float]] = {"gauss-newton": [], "hessian": []}
    print(f"{arguments.images} images, {torch.get_num_threads()} threads, {device}")
    print("| model | layer | forward (ms) | Gauss-Newton / forward | Hessian / forward |\n|---|---|---|---|---|")
    for name, (k, places) in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(device)
        chain = build_chain(model)
        images = torch.randn(arguments.images, 3, 224, 224, device=device)
        with frozen(model):
            for place in places:
                index, group = chain.groups()[place]
                state, segment = (images.contiguous(memory_format=torch.channels_last),), Segment.cut(chain, index, k)
                weights = {p: chain.weight(p).detach() for p in group.parameters}
                active = ActiveWeights(choose_masks(weights, NM(2, 4), "magnitude"))
                with torch.no_grad():
                    for operation in chain.operations[:index]:
                        state = operation.run(state)
                cells = []
                for curvature, found in ratios.items():
                    objective = KStepObjective(
                        segment, active, state, PruneConfig("2:4").updated(curvature=curvature, preconditioner="none")
                    )
                    forward, product = cost(objective, active.gather(weights), arguments.repeats, device)
                    found.append(product / forward)
                    cells.append(f"{product / forward:.2f}")
                print(f"| {name} | {group.name} | {1e3 * forward:.0f} | {' | '.join(cells)} |", flush=True)
    for curvature, found in ratios.items():
        print(f"{curvature}: median {median(found):.2f}, largest {max(found):.2f}")


if __name__ == "__main__":
    main()
