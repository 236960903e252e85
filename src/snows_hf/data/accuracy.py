"""Accuracy on a labelled split."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.outputs import logits_of
from ..runtime.memory import Tensors, in_parts
from ..runtime.run import Run
from .images import ImageSource, Preprocess, label_map, labelled_batches, to_classes


@dataclass(frozen=True)
class Accuracy:
    """Shares of images, in per cent, whose class is the highest, or among the five highest, logits.

    ``confusion`` counts them by true and predicted class: ``"3 5"`` those of class 3 that were taken for 5, by the
    model's numbers; pairs that never occur are left out. ``method`` says who chose the classes: the ``classifier``, or
    of models without one ``zero-shot`` their names, or the ``nearest neighbours`` (by the data's numbers, both).
    """

    top1: float
    top5: float
    images: int
    confusion: Mapping[str, int] = field(default_factory=dict)
    method: str = "classifier"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def accuracy_of(
    model: nn.Module,
    source: ImageSource,
    preprocess: Preprocess,
    class_names: tuple[str, ...] | None = None,
    batch_size: int = 64,
    run: Run | None = None,
) -> Accuracy:
    """Top-1 and top-5 accuracy of a classifier on all images of a split.

    Raises:
        DataError: no labels, labels that do not match the model's classes, or no image.
        MemoryLimitError: a single image is too much.
    """
    training, parameter = model.training, next(model.parameters())
    classes: Tensor | None = None
    top1 = top5 = images = 0
    confusion = Counter[str]()

    def classify(state: Tensors) -> Tensors:
        return (logits_of(model, state[0].to(parameter.device, parameter.dtype)),)

    batches = labelled_batches(source, preprocess, batch_size, "measuring accuracy")
    count = None if source.size is None else -(-source.size // batch_size)
    model.eval()
    try:
        for pixels, labels in (run or Run()).track(batches, f"Batches of {source.name} ({source.split})", count):
            (logits,) = in_parts(classify, (pixels,))
            if classes is None:
                classes = label_map(source.class_names, class_names, logits.shape[1], source.name)
            ranked = logits.float().topk(min(5, logits.shape[1])).indices.cpu()
            wanted = to_classes(labels, classes, source)
            hits = ranked == wanted[:, None]
            confusion.update(map("{} {}".format, wanted.tolist(), ranked[:, 0].tolist()))
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(1).sum())
            images += len(labels)
    finally:
        model.train(training)
    return Accuracy(100 * top1 / images, 100 * top5 / images, images, dict(confusion))
