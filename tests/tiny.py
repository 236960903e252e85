"""Tiny random networks in float64 whose every part matters: no zero biases, no unit scales, no identical heads."""

import copy
from dataclasses import dataclass, replace
from functools import cache

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from snows_hf.adapters import Chain, State, build_chain, frozen
from snows_hf.adapters.cifar_resnet import CifarResNet
from snows_hf.masks.choose import choose_masks
from snows_hf.method.cascade import prune_chain
from snows_hf.method.objective import ActiveWeights, KStepObjective, Segment
from snows_hf.method.records import LayerReport
from snows_hf.method.streams import split_images
from snows_hf.patterns import NM, Masks
from snows_hf.settings import PruneConfig, SolverConfig


SIZE = 8  # images are 3 x 8 x 8


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Evaluation mode, float64, weights of unit gain, random norms, biases, tokens and batch-norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.square())
            elif tensor.dim() >= 2 and name.endswith("weight"):
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            elif tensor.dim() == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.3 * noise)
    return model


def transformers_vit(seed: int = 0, layers: int = 2) -> ViTForImageClassification:
    """Width 8, two heads, 5 tokens; every block is five operations."""
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=SIZE,
        patch_size=4,
        num_labels=3,
        attn_implementation="sdpa",  # eager attention rounds the softmax to float32
    )
    return randomised(ViTForImageClassification(config), seed)


def timm_vit(seed: int = 0, layers: int = 2) -> VisionTransformer:
    """The same sizes, with one fused QKV matrix."""
    model = VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=8, depth=layers, num_heads=2, mlp_ratio=1.5, num_classes=3
    )
    return randomised(model, seed)


def cifar_resnet(seed: int = 0) -> CifarResNet:
    """Eight layers: one basic block in each of three stages, parameter-free shortcuts."""
    return randomised(CifarResNet(depth=8, num_classes=3), seed)


def timm_resnet(seed: int = 0) -> ResNet:
    """Four basic blocks, downsampling convolutions on the shortcuts, in-place ReLUs."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 8, 16, 16), stem_width=8, num_classes=3)
    return randomised(model, seed)


def nm_masks(model: nn.Module, parameters: tuple[str, ...], n: int, m: int) -> Masks:
    """N:M masks by magnitude."""
    return {name: NM(n, m).mask(model.get_parameter(name).detach().abs()) for name in parameters}


def config(**changes: object) -> PruneConfig:
    """Every setting given, so that no test depends on defaults; names of SolverConfig reach into ``solver``."""
    solver = SolverConfig(
        curvature="gauss-newton",
        preconditioner="none",
        damping=1e-4,
        beta=1e-5,
        backtrack=0.5,
        max_backtracks=10,
        passes=1,
        patience=1000,
        min_gain=0.0,
        cg_rtol=1e-3,
        cg_atol=0.0,
        cg_max_iter=5,
        cg_stall=0.0,
    )
    base = PruneConfig(
        "2:4",
        k=3,
        mask="magnitude",
        batch_size=250,
        held_out=0.25,
        targets="dense",
        weighting="mean",
        biases=False,
        seed=0,
        solver=solver,
    )
    return base.updated(**changes)


@cache
def chain_of(model: nn.Module) -> Chain:
    """Of a model, traced once: weights that change are its own."""
    return build_chain(model)


def magnitude_masks(model: nn.Module, n: int = 2, m: int = 4) -> Masks:
    """N:M masks for every prunable weight that they fit."""
    groups = [group for _, group in chain_of(model).groups()]
    weights = {name: model.get_parameter(name) for group in groups for name in group.parameters}
    return choose_masks(weights, NM(n, m), "magnitude")


@dataclass(frozen=True)
class Run:
    """A dense network, its pruned copy, and what the cascade said about it."""

    dense: nn.Module
    pruned: nn.Module
    masks: Masks
    images: Tensor
    config: PruneConfig
    reports: list[LayerReport]

    def held_out_objective(self, report: LayerReport) -> KStepObjective:
        """The objective that judged a layer, rebuilt from the two networks alone.

        Layers before it are read from the pruned network, layers after it from the dense one: those were still dense.
        """
        before, after = chain_of(self.pruned), chain_of(self.dense)
        index = next(i for i, group in after.groups() if group.name == report.name)
        held_out = self.images[split_images(len(self.images), self.config.batch_size, self.config.held_out)[-1]]
        state: State = (held_out,)
        dense_state: State = (held_out,)
        with torch.no_grad(), frozen(self.dense), frozen(self.pruned):
            for ours, theirs in zip(before.operations[:index], after.operations[:index], strict=True):
                state, dense_state = ours.run(state), theirs.run(dense_state)
            segment = Segment.cut(after, index, self.config.k)
            targets = segment.outputs(dense_state if self.config.targets == "dense" else state)
        active = ActiveWeights({name: self.masks[name] for name in report.parameters})
        return KStepObjective(segment, active, state, self.config, targets)

    def losses(self, report: LayerReport) -> tuple[float, float]:
        """Held-out losses with the dense network's masked weights, and with the weights the pruned network has."""
        objective = self.held_out_objective(report)
        with torch.no_grad(), frozen(self.dense), frozen(self.pruned):
            return tuple(  # type: ignore[return-value]
                objective.value(objective.active.gather({n: net.get_parameter(n) for n in report.parameters}))
                for net in (self.dense, self.pruned)
            )


def prune(model: nn.Module, count: int = 8, n: int = 2, m: int = 4, **changes: object) -> Run:
    """Prunes a copy of a tiny network on random images, by magnitude masks."""
    pruned, masks, settings = copy.deepcopy(model), magnitude_masks(model, n, m), config(**changes)
    calibration = images(count, seed=7)
    reports = prune_chain(chain_of(pruned), calibration, masks, settings)
    return Run(model, pruned, masks, calibration, settings, reports)


def hungry(chain: Chain, name: str, fits: int) -> Chain:
    """The chain with one operation that asks for more memory than there is when it gets more than ``fits`` images."""
    index = next(i for i, operation in enumerate(chain.operations) if operation.name == name)
    run = chain.operations[index].run

    def hungry_run(state: State) -> State:
        if len(state[0]) > fits:
            torch.empty(10**15)
        return run(state)

    chain.operations[index] = replace(chain.operations[index], run=hungry_run)
    return chain
