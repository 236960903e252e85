"""Table 6: how many times fewer floating-point operations an N:M model needs, end to end.

    python examples/paper/table6.py

Full-size architectures from their configuration alone, with random weights: operations depend on shapes and zeros, not
on values. Counted are matrix products and convolutions, a multiply-add as two, on one image; those with a zero weight
are left out. Three counts: all layers that this package prunes, of all operations; the same without products between
activations (attention), which belong to no layer and which counters by layer miss; and with the convolutions on
shortcuts left dense. Seconds.
"""

import timm
import torch
from common import number, table
from torch import nn

import snows_hf  # noqa: F401  registers the CIFAR ResNets with timm
from snows_hf.adapters import build_chain
from snows_hf.adapters.flops import count_flops
from snows_hf.patterns import parse_pattern


ROWS = [
    ("ViT-B/16", "vit_base_patch16_224", 224, "2:4", 1.97),
    ("ResNet-50, ImageNet", "resnet50", 224, "1:4", 2.99),
    ("ResNet-50, ImageNet", "resnet50", 224, "2:4", 1.79),
    ("ResNet-20, CIFAR-10", "resnet20_cifar", 32, "1:4", 3.80),
    ("ResNet-20, CIFAR-10", "resnet20_cifar", 32, "2:4", 1.97),
]


def reductions(model: nn.Module, size: int, pattern: str) -> list[float]:
    """The three counts, as dense over pruned."""
    chain = build_chain(model.eval())
    flops = count_flops(chain, torch.zeros(1, 3, size, size))
    of_layers = sum(
        flops.get(name, 0) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    )
    names = [name for _, group in chain.groups() for name in group.parameters]
    zeros = {name: float((~parse_pattern(pattern).mask(chain.weight(name).detach().abs())).double().mean())
             for name in names}  # fmt: skip

    def spared(which: list[str]) -> float:
        return sum(zeros[name] * flops[name.removesuffix(".weight")] for name in which)

    every = spared(names)
    direct = spared([name for name in names if "downsample" not in name])
    return [flops[""] / (flops[""] - every), of_layers / (of_layers - every), flops[""] / (flops[""] - direct)]


def main() -> None:
    rows = []
    for title, architecture, size, pattern, theirs in ROWS:
        ours = reductions(timm.create_model(architecture), size, pattern)
        shown = [f"{number(r)}× ({100 * (r / theirs - 1):+.1f} %)" for r in ours]
        rows.append((title, pattern, f"{number(theirs)}×", *shown))
    table(
        "Table 6",
        ["model", "pattern", "paper", "all operations", "of layers alone", "all, shortcut convolutions dense"],
        rows,
        "random weights (the counts do not depend on them). In brackets the difference from the paper's figure.",
    )


if __name__ == "__main__":
    main()
