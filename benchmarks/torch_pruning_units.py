"""Units by Torch-Pruning's one-shot criteria (``pip install torch-pruning``, which the package itself does not need).

Its own graph finds what a unit is made of, and its own classes score it; what is cut out of the network is what the
package would cut for the same pattern, so that only the choice differs. Without repair, which it has none of.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from snows_hf.adapters.outputs import outputs_of
from snows_hf.adapters.widths import Width, cut, unread
from snows_hf.data.images import open_images
from snows_hf.hub.resize import resized
from snows_hf.jobs.calibration import calibrate, first_pass
from snows_hf.jobs.request import check_pruning
from snows_hf.jobs.smaller import sizes_of, units_to_keep
from snows_hf.jobs.subject import Subject, load_subject
from snows_hf.patterns import split_structures
from snows_hf.patterns.plan import layer_patterns
from snows_hf.runtime.run import Run


CRITERIA: dict[str, Any] = {
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.GroupTaylorImportance,
}
"""Those of the package that are for any layer. GroupHessianImportance is left out: in 1.6.1 it sums no gradients, but
keeps those of the last image."""


def prune(model: str, pattern: str, criterion: str, data: str, settings: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """A model without the units that a criterion likes least, and how many parameters it has."""
    given = {"units": "snip", **settings}  # whose calibration reads the labels
    allow_custom = bool(given.pop("allow_custom", False))
    run = Run.begin("cpu", reproducible=True, dtype=torch.float32)
    candidates = layer_patterns(check_pruning(pattern, "standard", given))
    subject = load_subject(run, model, None, candidates, "standard", pattern, given)
    keep = units_to_keep(subject, split_structures(pattern)[0], allow_custom)
    calibration = calibrate(run, open_images(data, "train"), subject.config, subject.checkpoint)
    if criterion == "taylor":
        _, labels = first_pass(subject.for_images(calibration.images[:1]).chain, calibration, subject.checkpoint)
        assert labels is not None
        accumulate_gradients(subject.network, calibration.images.split(32), labels.split(32))
    image = calibration.images[:1]
    scores = scores_of(subject, keep, image, CRITERIA[criterion]())
    kept = {width: scores[width].topk(count).indices.sort().values for width, count in keep.items()}
    state = cut(subject.original, kept)
    sizes = sizes_of(subject, keep)
    smaller = resized(subject.checkpoint, state, sizes, allow_custom, unread(subject.chain)).model
    return smaller, sum(parameter.numel() for parameter in smaller.parameters())


def accumulate_gradients(model: nn.Module, batches: Any, labels: Any) -> None:
    """Gradients of the mean cross-entropy, where Torch-Pruning looks for them."""
    for images, own in zip(batches, labels, strict=True):
        F.cross_entropy(outputs_of(model, images)["logits"], own, reduction="sum").backward()


def scores_of(subject: Subject, keep: Mapping[Width, int], image: Tensor, importance: Any) -> dict[Width, Tensor]:
    """The score of each unit: of a head, the sum over its entries."""
    graph = tp.DependencyGraph().build_dependency(
        subject.network, image, forward_fn=lambda model, image: outputs_of(model, image)["logits"]
    )
    scores = {}
    for width in keep:
        layer = subject.network.get_submodule(width.makers[0].name.removesuffix(".weight"))
        entries = list(range(width.units * width.makers[0].each))
        pruning = graph.get_pruner_of_module(layer).prune_out_channels
        scores[width] = importance(graph.get_pruning_group(layer, pruning, entries)).view(width.units, -1).sum(1)
    return scores
