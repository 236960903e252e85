"""From config alone, random weights, full size: do the adapters hold on the real architectures?

For each model: its operations and groups, the largest difference between the chain's logits and the model's own, and
its first block pruned to 2:4 on a few random images. The pattern must hold on the pruned weights, and the loss on the
held-out image must have gone down in every layer. Nothing is downloaded; accuracy is no question here.

    python benchmarks/full_size.py [--models NAME …] [--images 4] [--device cpu]
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from snows_hf.adapters import Chain, build_chain, frozen
from snows_hf.adapters.outputs import logits_of
from snows_hf.masks.choose import choose_masks
from snows_hf.method.cascade import prune_chain
from snows_hf.patterns import NM
from snows_hf.settings import PruneConfig


PATTERN = NM(2, 4)
VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@dataclass(frozen=True)
class Entry:
    """How a model is made, and how the names of the groups in its first block begin."""

    make: Callable[[], nn.Module]
    first_block: str


MODELS = {
    "transformers ViT-B/16": Entry(lambda: ViTForImageClassification(ViTConfig(num_labels=1000)), "vit.layers.0."),
    "transformers ViT-L/16": Entry(
        lambda: ViTForImageClassification(ViTConfig(num_labels=1000, **VIT_L)), "vit.layers.0."
    ),
    "timm vit_base_patch16_224": Entry(lambda: timm.create_model("vit_base_patch16_224"), "blocks.0."),
    "timm deit_small_patch16_224": Entry(lambda: timm.create_model("deit_small_patch16_224"), "blocks.0."),
    "transformers ResNet-50": Entry(
        lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)), "resnet.encoder.stages.0.layers.0."
    ),
    "timm resnet50": Entry(lambda: timm.create_model("resnet50"), "layer1.0."),
    "timm mobilenetv1_100": Entry(lambda: timm.create_model("mobilenetv1_100"), "blocks.0.0."),
}


def smooth_images(n: int) -> Tensor:
    """Random images (n, 3, 224, 224) whose pixels go together as those of photographs do: white noise would leave the
    weights that stay nothing to make up for."""
    return F.interpolate(torch.randn(n, 3, 28, 28), 224, mode="bicubic")


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Norms at random: timm starts the last batch norm of a residual unit at zero, which would hide what is in it."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def difference(chain: Chain, images: Tensor) -> tuple[float, float]:
    """Largest absolute difference between the chain's logits and the model's, and the largest logit."""
    expected = logits_of(chain.model, images)
    with frozen(chain.model):
        got = chain.logits(images)
    return float((got - expected).abs().max()), float(expected.abs().max())


def run(name: str, entry: Entry, n: int, device: torch.device) -> list[str]:
    """One row of the table: builds the model, checks its chain, prunes its first block."""
    started = time.perf_counter()
    torch.manual_seed(0)
    model = randomised(entry.make()).eval().to(device)
    images = smooth_images(n).to(device)
    chain = build_chain(model)
    operations, groups = [o.name for o in chain.operations], [g for _, g in chain.groups()]
    print(f"\n{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    print(f"  {len(operations)} operations: {', '.join(operations[:4])}, … {operations[-1]}")
    print(f"  {len(groups)} groups: {', '.join(group.name for group in groups[:4])}, …")

    single, largest = difference(chain, images)
    model.double()
    double, _ = difference(chain, images[:1].double())
    model.float()
    print(f"  chain against model: {single:.1e} in float32, {double:.1e} in float64; largest logit {largest:.2g}")

    block = [group for group in groups if group.name.startswith(entry.first_block)]
    weights = {p: chain.weight(p).detach() for group in block for p in group.parameters}
    masks = choose_masks(weights, PATTERN, "magnitude")
    config = PruneConfig(str(PATTERN)).updated(k=3, cg_max_iter=3, batch_size=n, held_out=1 / n)
    reports = prune_chain(chain, images.cpu(), masks, config)
    for report in reports:
        print(
            f"  {report.name} {report.shape}: K = {report.k}, {report.cg_iterations} products, held-out loss "
            f"{report.loss_start:.3e} → {report.loss_pruned:.3e}, {report.seconds:.1f} s"
        )
        assert report.loss_pruned < report.loss_start, f"{report.name}: the held-out loss did not go down"
    for parameter, mask in masks.items():
        weight = chain.weight(parameter)
        assert PATTERN.holds(weight), f"{parameter} breaks {PATTERN}"
        assert not weight[~mask].any(), f"{parameter} has weights outside its mask"
    dense = [group.name for group in block if not any(p in masks for p in group.parameters)]
    if dense:
        print(f"  left dense, {PATTERN} does not fit: {', '.join(dense)}")
    masked, pruned = (sum(getattr(report, f"loss_{what}") for report in reports) for what in ("masked", "pruned"))
    return [
        *(name, str(len(operations)), str(len(groups)), f"{single:.1e}", f"{double:.1e}"),
        *(str(len(reports)), f"{masked:.3e} → {pruned:.3e}", f"{time.perf_counter() - started:.0f}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Chains and first-block pruning of full-size models, random weights.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--images", type=int, default=4, help="random images, one of them held out (at least 2)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        rows.append(run(name, MODELS[name], arguments.images, torch.device(arguments.device)))
        gc.collect()
    print("\n| model | operations | groups | max difference, float32 | float64 | layers pruned", end="")
    print(" | held-out loss, masked → pruned (sum) | seconds |\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
