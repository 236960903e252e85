"""How near a pruned model's outputs are to the dense one's: for models of any kind, without labels."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.memory import Tensors, in_parts
from ..runtime.run import Run
from .images import CHUNK, ImageSource, Preprocess, drawn, image_batches


IMAGES = 1000
"""At most so many of a split's images are compared: they tell the figures to a small part of themselves."""

Outputs = Callable[[Tensor], dict[str, Tensor]]
"""A model: preprocessed images (n, 3, height, width) → outputs by name, each with the images first."""


@dataclass(frozen=True)
class Fidelity:
    """Outputs of a pruned model against those of the dense one on the same images.

    Attributes:
        images: their number.
        outputs: for each by name ``error``, the norm of the difference over that of the dense output, of all images
            together (None where that is zero), and ``cosine`` of the flattened outputs, the mean over images.
        agreement: share of images, in per cent, with the same highest logit; None of what is no classifier.
        divergence: mean of the Kullback-Leibler divergence from the pruned classifier's probabilities to the dense
            one's, in nats; None of what is no classifier.
    """

    images: int
    outputs: Mapping[str, Mapping[str, float | None]]
    agreement: float | None = None
    divergence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def fidelity_of(
    dense: Outputs,
    pruned: Outputs,
    source: ImageSource,
    preprocess: Preprocess,
    classifier: bool,
    batch_size: int = CHUNK,
    run: Run | None = None,
) -> Fidelity:
    """Compares two models on a split's images, or on ``IMAGES`` of them drawn at random. Of the outputs no more than a
    batch's are ever held.

    Args:
        classifier: whether the output ``logits`` holds those of classes.

    Raises:
        DataError: no image, or an unreadable one.
        MemoryLimitError: a single image is too much.
    """
    names: list[str] = []

    def compare(state: Tensors) -> Tensors:
        expected, found = dense(state[0]), pruned(state[0])
        names[:] = expected
        figures = [compared(expected[name], found[name]) for name in expected]
        if classifier:
            figures.append(agreements(expected["logits"], found["logits"]))
        return (torch.stack(figures, dim=1).cpu(),)

    few = drawn(source, IMAGES, seed=0)
    count = None if few.size is None else -(-few.size // batch_size)
    batches = image_batches(few, preprocess, batch_size)
    told = f"Batches of {source.name} ({source.split})"
    rows = torch.cat([in_parts(compare, (pixels,))[0] for pixels in (run or Run()).track(batches, told, count)])
    total, mean = rows.sum(0).tolist(), rows.mean(0).tolist()
    outputs = {
        name: {"error": (total[i][0] / total[i][1]) ** 0.5 if total[i][1] else None, "cosine": mean[i][2]}
        for i, name in enumerate(names)
    }
    agreement, divergence = (100 * mean[-1][0], mean[-1][1]) if classifier else (None, None)
    return Fidelity(len(rows), outputs, agreement, divergence)


def compared(dense: Tensor, pruned: Tensor) -> Tensor:
    """For each image (n, 3): squared norms of the difference and of the dense output, and the cosine of the two."""
    a, b = (output.flatten(1).double() for output in (dense, pruned))
    return torch.stack([(b - a).square().sum(1), a.square().sum(1), F.cosine_similarity(a, b)], dim=1)


def agreements(dense: Tensor, pruned: Tensor) -> Tensor:
    """For each image (n, 3), of logits (n, classes): whether the highest is the same, the divergence, and nothing."""
    a, b = (logits.double().log_softmax(1) for logits in (dense, pruned))
    same = (a.argmax(1) == b.argmax(1)).double()
    divergence = F.kl_div(b, a, reduction="none", log_target=True).sum(1)
    return torch.stack([same, divergence, torch.zeros_like(same)], dim=1)
