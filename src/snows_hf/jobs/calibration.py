"""The calibration images: read, and run through the model once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Chain
from ..adapters.check import check_chain
from ..adapters.flops import count_flops
from ..data.images import ImageSource, drawn, image_batches, label_map, labelled_batches, to_classes
from ..errors import AdapterError
from ..hub.load import Checkpoint
from ..masks.criteria import needs_labels
from ..runtime.distributed import local_processes
from ..runtime.journal import Digest
from ..runtime.memory import Images, Shelf, available
from ..runtime.run import Run
from ..settings import PruneConfig


@dataclass(frozen=True)
class Calibration:
    """Images that a model is pruned with: preprocessed, in the type that the solver computes in; the data's own
    labels (n,), if the mask criterion needs them; and a digest of the images as they were read."""

    source: ImageSource
    images: Images
    labels: Tensor | None
    digest: Digest


def calibrate(run: Run, source: ImageSource, config: PruneConfig, checkpoint: Checkpoint) -> Calibration:
    """Reads the calibration images, onto a shelf with room for a quarter of what is left of a budget, or for half of
    what is free.

    Raises:
        DataError: no image, an unreadable one, or no labels where there must be.
    """
    run.say(f"Reading {config.samples} images of {source.name}")
    shelf = Shelf(available() / 2 / local_processes() if run.left is None else run.left / 4)
    images, labels, digest = Images(shelf), list[Tensor](), Digest()
    given = drawn(source, config.samples, config.seed), checkpoint.preprocess
    batches: Iterable[tuple[Tensor, Tensor | None]] = ((batch, None) for batch in image_batches(*given))
    if needs_labels(config.mask, config.units):
        batches = labelled_batches(*given, purpose=f"the mask criterion {config.mask!r}")
    for batch, own in batches:
        # Channels last, which convolutions hand on: on CPUs their backward passes run up to three times faster so.
        images.append(batch.to(run.dtype, memory_format=torch.channels_last))
        digest.add(batch)
        if own is not None:
            labels.append(own)
        run.tell("Reading images", len(images), config.samples)
    if len(images) < config.samples:
        run.say(f"{source.name} ({source.split}) has only {len(images)} images: all of them are used")
    return Calibration(source, images, torch.cat(labels) if labels else None, digest)


def class_labels(labels: Tensor, source: ImageSource, checkpoint: Checkpoint, classes: int) -> Tensor:
    """The model's class of each label of the data (n,).

    Raises:
        DataError: the classes cannot be matched.
    """
    return to_classes(labels, label_map(source.class_names, checkpoint.class_names, classes, source.name), source)


def first_pass(chain: Chain, calibration: Calibration, checkpoint: Checkpoint) -> tuple[dict[str, int], Tensor | None]:
    """Makes sure that the chain computes what the model does, as it was loaded, before anything is measured.

    Returns:
        Operations of every module on one image, by name, and the model's class of each of the data's labels (n,).

    Raises:
        AdapterError: it does not, or it has no classes for the labels.
        DataError: the classes cannot be matched.
    """
    images, labels = calibration.images, calibration.labels
    outputs = check_chain(chain, images[:2])
    flops = count_flops(chain, images[:1])
    if labels is None:
        return flops, None
    if "logits" not in outputs or outputs["logits"].dim() != 2:
        what = f"{type(chain.model).__name__} has no classes, which a mask criterion with labels needs."
        raise AdapterError(what, "Use a criterion without labels, such as magnitude, sparsegpt or alps.")
    return flops, class_labels(labels, calibration.source, checkpoint, outputs["logits"].shape[1])
