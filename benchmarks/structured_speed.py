"""How much faster stock libraries run what structured pruning leaves: ViT-B/16, DINOv2-S and ResNet-50 of random
weights, whole and as the configurations that ``prune`` writes say, in turns.

    python benchmarks/structured_speed.py [--models vit-b ...] [--batch-sizes 1 8] [--threads 2] [--rounds 15]

Each figure is the median of the turns' ratios, dense over smaller, with the quarter and three-quarter points of these,
so that a busy machine shows.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import timm
import torch
import transformers as tf
from torch import Tensor, nn


def vit(**said: Any) -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**said))


def dinov2(**said: Any) -> nn.Module:
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(hidden_size=384, **{"num_attention_heads": 6, **said}))


def resnet(**said: Any) -> nn.Module:
    model: nn.Module = timm.create_model("resnet50", **said)
    return model


MODELS: dict[str, tuple[Callable[..., nn.Module], int, dict[str, dict[str, Any]]]] = {
    "vit-b": (
        vit,
        224,
        {
            "mlp:0.5": {"intermediate_size": 1536},
            "mlp:0.5+heads:0.33": {"intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64},
            "mlp:0.5+ranks:0.25": {"intermediate_size": 1536, "head_dim": 48},
            "mlp:0.5+ranks:0.5": {"intermediate_size": 1536, "head_dim": 32},
        },
    ),
    "dinov2-s": (
        dinov2,
        112,
        {
            "mlp:0.5": {"mlp_ratio": 2},
            "mlp:0.75": {"mlp_ratio": 1},
            "heads:0.33": {"num_attention_heads": 4, "head_dim": 64},
            "mlp:0.5+heads:0.33": {"mlp_ratio": 2, "num_attention_heads": 4, "head_dim": 64},
            "ranks:0.25": {"head_dim": 48},
            "ranks:0.5": {"head_dim": 32},
            "mlp:0.5+ranks:0.25": {"mlp_ratio": 2, "head_dim": 48},
        },
    ),
    "resnet-50": (resnet, 224, {"channels:0.25": {"base_width": 48}, "channels:0.5": {"base_width": 32}}),
}
"""The side of its images and, by pattern, what the configuration of the result says."""


@torch.inference_mode()
def seconds(model: nn.Module, images: Tensor) -> float:
    started = time.perf_counter()
    model(images)
    return time.perf_counter() - started


def compared(dense: nn.Module, smaller: nn.Module, images: Tensor, rounds: int) -> str:
    turns = [(seconds(dense, images), seconds(smaller, images)) for _ in range(rounds + 2)][2:]
    low, _, high = quantiles([ours / theirs for ours, theirs in turns], n=4)
    before, after = (1000 * median(times) for times in zip(*turns, strict=True))
    ratio = median(ours / theirs for ours, theirs in turns)
    return f"{ratio:.2f} times as fast ({low:.2f} to {high:.2f}), {before:.0f} → {after:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.models:
        build, side, patterns = MODELS[name]
        dense = build().eval()
        for pattern, said in patterns.items():
            smaller = build(**said).eval()
            for size in given.batch_sizes:
                found = compared(dense, smaller, torch.randn(size, 3, side, side), given.rounds)
                print(f"{name} {pattern}, {size} image{'s' * (size > 1)}: {found}", flush=True)


if __name__ == "__main__":
    main()
