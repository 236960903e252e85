"""What features are worth without a classifier: whether the images nearest to one are of its class."""

from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.outputs import outputs_of
from ..runtime.memory import Tensors, in_parts
from ..runtime.run import Run
from .accuracy import Accuracy
from .images import CHUNK, ImageSource, Preprocess, labelled_batches, to_classes


NEIGHBOURS = 20

TEMPERATURE = 0.07
"""A neighbour of cosine c votes with exp(c / 0.07), as in Wu et al., 2018, and for DINO."""

ROWS = 512  # images that are held against all others together


@torch.no_grad()
def neighbour_accuracy(
    model: nn.Module, source: ImageSource, preprocess: Preprocess, batch_size: int = CHUNK, run: Run | None = None
) -> Accuracy:
    """Top-1 and top-5 of the vote of each image's 20 nearest others in a split, by the cosine of their features.

    Raises:
        DataError: no labels, or no image.
        MemoryLimitError: a single image is too much.
    """
    parameter = next(model.parameters())

    def extract(state: Tensors) -> Tensors:
        outputs = outputs_of(model, state[0].to(parameter.device, parameter.dtype))
        return (F.normalize(pooled(outputs).float(), dim=1),)

    batches = labelled_batches(source, preprocess, batch_size, "measuring accuracy")
    count = None if source.size is None else -(-source.size // batch_size)
    features, labels = [], []
    for pixels, own in (run or Run()).track(batches, f"Batches of {source.name} ({source.split})", count):
        features.append(in_parts(extract, (pixels,))[0])
        labels.append(own)
    y = torch.cat(labels)
    y = to_classes(y, torch.arange(int(y.max()) + 1), source)  # refuses those that stand for no label
    ranked = vote(torch.cat(features), y).cpu()
    hits = ranked == y[:, None]
    confusion = Counter(map("{} {}".format, y.tolist(), ranked[:, 0].tolist()))
    top1, top5 = (100 * float(hits[:, :k].any(1).double().mean()) for k in (1, 5))
    return Accuracy(top1, top5, len(y), dict(confusion), method="nearest neighbours")


def vote(features: Tensor, labels: Tensor) -> Tensor:
    """Classes by the votes of the nearest others, (n, 5 or fewer), highest first, of features (n, d) of unit length
    and their classes (n,)."""
    n, labels = len(features), labels.to(features.device)
    chosen = torch.zeros(n, min(5, int(labels.max()) + 1), dtype=torch.long, device=features.device)
    for start in range(0, n if n > 1 else 0, ROWS):
        rows = torch.arange(start, min(start + ROWS, n), device=features.device)
        cosines = features[rows] @ features.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        nearest, places = cosines.topk(min(NEIGHBOURS, n - 1), dim=1)
        votes = features.new_zeros(len(rows), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[places], (nearest / TEMPERATURE).exp())
        chosen[rows] = votes.topk(chosen.shape[1], dim=1).indices
    return chosen


def pooled(outputs: Mapping[str, Tensor]) -> Tensor:
    """One vector an image (n, d) of a model's outputs: the pooled one, else the mean of the last over its
    positions."""
    given = outputs.get("pooler_output", outputs.get("image_embeds"))
    features = [*outputs.values()][-1] if given is None else given
    if features.ndim == 4:  # (n, channels, height, width)
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features  # (n, positions, d)
