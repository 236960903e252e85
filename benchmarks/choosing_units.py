"""How long group OBS takes to choose the units of a vision transformer's layers and to repair what reads them, the
images' forward passes aside: layers of a model's shapes, with random weights and inputs, half of the units gone.

    python benchmarks/choosing_units.py [--models vit-s vit-b] [--layers 12] [--keep 0.5]

Processor seconds of one thread.
"""

import argparse
import time

import torch
from torch import Tensor

from snows_hf.masks.aims import damped
from snows_hf.masks.group_obs import Reader, covariance, repair, units_left


WIDTHS = {"vit-s": (384, 6), "vit-b": (768, 12), "vit-l": (1024, 16)}
"""Of the residual stream, and the number of heads."""

TOKENS = 4096


def inputs(width: int, seed: int) -> Tensor:
    """The covariance of correlated inputs whose mean is not zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, width, generator=generator)
    x = x * torch.linspace(0.1, 2, width) + torch.randn(TOKENS, 8, generator=generator) @ torch.randn(8, width) + 1
    x = torch.cat([x, torch.ones(TOKENS, 1)], 1)
    return damped(covariance(x.T @ x, centred=True)[None])[0]


def seconds(rows: int, columns: int, units: int, keep: int, seed: int) -> float:
    """To choose the units of one layer, and to repair it."""
    weight, C = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), inputs(columns, seed)
    started = time.process_time()
    kept = units_left([Reader(weight, C, units)], keep)
    stays = torch.zeros(units, dtype=torch.bool).index_fill_(0, kept, True)
    repair(weight, C, stays.repeat_interleave(columns // units))
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit-s", "vit-b"], choices=list(WIDTHS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--keep", type=float, default=0.5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in given.models:
        width, heads = WIDTHS[model]
        for structure, columns, units in (("mlp", 4 * width, 4 * width), ("heads", width, heads)):
            taken = sum(seconds(width, columns, units, round(given.keep * units), i) for i in range(given.layers))
            print(f"{model} {structure}: {taken:.1f} s for {given.layers} layers of {units} units", flush=True)


if __name__ == "__main__":
    main()
