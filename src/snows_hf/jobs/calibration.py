"""The calibration images: read, and run through the model once."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..adapters import Chain
from ..adapters.check import check_chain
from ..adapters.flops import count_flops
from ..data.images import ImageSource, calibration_chunks, check_labels, label_map, labelled_chunks, to_classes
from ..hub.load import Checkpoint
from ..masks.scores import needs_labels
from ..runtime.distributed import local_processes
from ..runtime.journal import Digest
from ..runtime.memory import Images, Shelf, available
from ..settings import PruneConfig


DEFAULT_DATA = "timm/mini-imagenet"
"""Calibration images where none are named: 50,000 images of ImageNet's training set, openly on the Hub."""


def read_calibration(
    source: ImageSource, config: PruneConfig, checkpoint: Checkpoint, dtype: torch.dtype, left: int | None = None
) -> tuple[Images, Tensor | None, Digest]:
    """The calibration images, the data's own labels (n,) if the mask criterion needs them, and the images' digest.

    They rest on a shelf with room for a quarter of the ``left`` bytes of a budget, or for half of what is free.

    Raises:
        DataError: no image, an unreadable one, or no labels where there must be.
    """
    shelf = Shelf(available() / 2 / local_processes() if left is None else left / 4)
    images, labels, digest = Images(shelf), list[Tensor](), Digest()
    given = source, config.samples, config.seed, checkpoint.preprocess
    chunks: Iterable[tuple[Tensor, Tensor | None]] = ((chunk, None) for chunk in calibration_chunks(*given))
    if needs_labels(config.mask):
        check_labels(source, f"the mask criterion {config.mask!r}")
        chunks = labelled_chunks(*given)
    for chunk, own in chunks:
        # Channels last, which convolutions hand on: on CPUs their backward passes run up to three times faster so.
        images.append(chunk.to(dtype, memory_format=torch.channels_last))
        digest.add(chunk)
        if own is not None:
            labels.append(own)
    return images, torch.cat(labels) if labels else None, digest


def class_labels(labels: Tensor, source: ImageSource, checkpoint: Checkpoint, classes: int) -> Tensor:
    """The model's class of each label of the data (n,).

    Raises:
        DataError: the classes cannot be matched.
    """
    return to_classes(labels, label_map(source.class_names, checkpoint.class_names, classes, source.name), source)


def first_pass(
    chain: Chain,
    images: Images,
    labels: Tensor | None,
    source: ImageSource,
    checkpoint: Checkpoint,
) -> tuple[dict[str, int], Tensor | None]:
    """Makes sure that the adapter computes what the model does, before anything is measured.

    Args:
        chain: of the checkpoint as it was loaded: in its own types, on the CPU.
        images: of the calibration.
        labels: the data's own (n,), or None.
        source: of the images.
        checkpoint: whose classes the labels are matched to.

    Returns:
        Operations of every module on one image, by name, and the model's class of each of the data's labels (n,).

    Raises:
        AdapterError: it does not.
        DataError: the classes cannot be matched.
    """
    logits = check_chain(chain, images[:2])
    flops = count_flops(chain, images[:1])
    return flops, None if labels is None else class_labels(labels, source, checkpoint, logits.shape[1])
