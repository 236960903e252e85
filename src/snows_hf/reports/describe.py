"""What reports say: of layers, sizes, data, hardware and versions, and what a journal says of its run."""

import hashlib
import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import accelerate
import datasets
import safetensors
import timm
import torch
import transformers
from torch import Tensor, nn

from ..adapters import Chain, Group
from ..data.names import Name, short_name, split_revision
from ..hub.load import Checkpoint
from ..masks.choose import split_by_fit
from ..method.records import LayerReport
from ..patterns import Full, Masks, Pattern, PerLayer
from ..runtime.files import checksum
from ..runtime.journal import Digest, digest_of
from ..runtime.version import versions
from ..settings import PruneConfig


def describe_layers(
    checkpoint: Checkpoint,
    chain: Chain,
    layers: list[Group],
    masks: Masks,
    pattern: Pattern,
    config: PruneConfig,
    reports: list[LayerReport],
) -> dict[str, Any]:
    """The part of the report that does not depend on measurements. Layer names are live names of the library."""
    touched = [group for group in layers if any(name in masks for name in group.parameters)]
    chosen = pattern.patterns if isinstance(pattern, PerLayer) else {}  # with those that it leaves dense
    counted = [group for group in layers if group in touched or any(name in chosen for name in group.parameters)]
    pruned = [chain.weight(name) for group in counted for name in group.parameters]
    first = {report.name: report.to_dict() for report in reports if report.sweep == 1}
    # Gradual steps may have removed more since.
    summaries = [first[group.name] | summary(chain, group) for group in touched if group.name in first]
    weights = {name: chain.weight(name) for group in layers for name in group.parameters}
    _, unfit = split_by_fit(weights, pattern)

    def reason(group: Group) -> str:
        if any(name in chosen for name in group.parameters):
            return "the allocation leaves it so"
        if any(name in unfit for name in group.parameters):
            return f"{pattern} does not fit its input width"
        return "the mask file has no mask for it"

    return {
        "source": short_name(checkpoint.source),
        "library": checkpoint.library,
        "architecture": type(checkpoint.model).__name__,
        "task": checkpoint.task,
        "tower": checkpoint.tower,
        "pattern": str(pattern),
        # Where units go alone, zeros are the dense model's own.
        "sparsity": 0.0 if isinstance(pattern, Full) else share_of_zeros(pruned),
        "settings": config.to_dict() | {"mask": Path(config.mask).name},
        "layers": summaries or [summary(chain, group) for group in touched],
        "later_sweeps": [report.to_dict() for report in reports if report.sweep > 1],
        "dense_layers": [
            {"name": group.name, "shape": list(chain.weight(group.parameters[0]).shape), "reason": reason(group)}
            for group in layers
            if group not in touched
        ],
        "never_pruned": chain.dense,
        "pruned_parameters": list(masks),
        "namespace": "live parameter names of the loaded model",
        "versions": versions(torch, transformers, timm, datasets, accelerate, safetensors)
        | {"python": platform.python_version()},
        "seed": config.seed,
    }


def summary(chain: Chain, group: Group) -> dict[str, Any]:
    """What the report says about a layer that SNOWS has not touched."""
    weights = [chain.weight(name) for name in group.parameters]
    return {
        "name": group.name,
        "parameters": list(group.parameters),
        "shape": [sum(weight.shape[0] for weight in weights), *weights[0].shape[1:]],
        "sparsity": share_of_zeros(weights),
    }


def share_of_zeros(weights: Iterable[Tensor]) -> float:
    """Of all weights together."""
    each = list(weights)
    return zeros_of(each) / sum(weight.numel() for weight in each)


def zeros_of(weights: Iterable[Tensor]) -> int:
    return sum(int((weight == 0).sum()) for weight in weights)


def describe_size(network: nn.Module, masks: Masks, flops: dict[str, int]) -> dict[str, Any]:
    """Weights and floating-point operations per image, dense and without those that the zeros make superfluous.
    ``flops`` are those of each dense module on one image, by name, ``""`` being the whole network.
    """
    state = network.state_dict()
    zeros = {name: float((state[name] == 0).double().mean()) for name in masks}
    superfluous = sum(share * flops[name.removesuffix(".weight")] for name, share in zeros.items())
    parameters = list(network.parameters())
    return {
        "parameters": {
            "total": sum(p.numel() for p in parameters),
            "nonzero": sum(int(torch.count_nonzero(p)) for p in parameters),
        },
        "flops": {"dense": flops[""], "pruned": round(flops[""] - superfluous)},
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    }


def describe_data(data: Name | None, split: str) -> dict[str, str | None] | None:
    """What the report says of a dataset: of a folder only its last name; None of none."""
    if data is None:
        return None
    name, revision = split_revision(data)
    return {"name": short_name(name), "split": split, "revision": revision}


def describe_run(
    checkpoint: Checkpoint, weights: dict[str, Tensor], config: PruneConfig, images: Digest, labels: Tensor | None
) -> dict[str, Any]:
    """What the weights of a result depend on: two runs of the same description make the same ones."""
    if labels is not None:
        images.add(labels)
    mask = Path(config.mask)
    return {
        "model": digest_of(weights),
        "configuration": hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest(),
        "calibration images": images.text(),
        "settings": config.to_dict() | {"mask": checksum(mask) if mask.suffix == ".safetensors" else config.mask},
        "versions": versions(torch, transformers, timm),
    }


def finite(value: Any) -> Any:
    """The same report with None for numbers that JSON cannot hold (the loss of a layer that overflowed)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
