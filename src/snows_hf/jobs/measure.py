"""How good a model is, now or as an earlier run has measured it: its accuracy, and how near it is to the dense one."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..adapters.outputs import outputs_of
from ..data.accuracy import Accuracy, accuracy_of
from ..data.fidelity import Outputs, fidelity_of
from ..data.images import ImageSource, check_labels, open_images
from ..data.names import Name
from ..data.neighbours import neighbour_accuracy
from ..data.zero_shot import PROMPT, ZeroShot
from ..errors import ConfigError, DataError
from ..hub.load import Checkpoint
from ..hub.tasks import CLASSIFICATION, FEATURES, ZERO_SHOT
from ..masks.criteria import needs_labels
from ..runtime.journal import Record
from ..runtime.run import Run
from ..settings import PruneConfig


Measured = Callable[[Run], Accuracy]


def measuring(
    network: nn.Module, checkpoint: Checkpoint, data: ImageSource | None, prompts: Sequence[str] = (PROMPT,)
) -> Measured | None:
    """How to measure a network, which is the checkpoint's or computes what that does, on labelled images: as the
    classifier that it is; by the names of the classes, of a model of images and text; by nearest neighbours, of
    features. None where there are no images or labels, and for other tasks, whose labels are no classes.

    Raises:
        LoadError: a tokenizer that cannot be loaded.
    """
    if data is None or data.label_column is None:
        return None
    if checkpoint.task == CLASSIFICATION:
        return lambda run: accuracy_of(network, data, checkpoint.preprocess, checkpoint.class_names, run=run)
    if checkpoint.tower is not None and data.class_names is not None and checkpoint.tokenizer is not None:
        named = ZeroShot(network, checkpoint.model, checkpoint.tokenizer, data.class_names, prompts)

        def by_names(run: Run) -> Accuracy:
            found = accuracy_of(named, data, checkpoint.preprocess, data.class_names, run=run)
            return replace(found, method="zero-shot")

        return by_names
    if checkpoint.task in (FEATURES, ZERO_SHOT):
        return lambda run: neighbour_accuracy(network, data, checkpoint.preprocess, run=run)
    return None


def open_labelled(data: Name | None, split: str) -> ImageSource | None:
    """Images to measure an accuracy on; None where none are named.

    Raises:
        DataError: no such data, or no labels.
    """
    if data is None:
        return None
    source = open_images(data, split)
    check_labels(source, "measuring accuracy")
    return source


def check_measurable(checkpoint: Checkpoint, data: ImageSource, prompts: Sequence[str] = ()) -> None:
    """Refuses to measure an accuracy that is not defined, before any work.

    Raises:
        ConfigError: there are no classes in what the model is for, or ``prompts`` for one that takes none.
        DataError: no labels, or no names of classes for the prompts.
    """
    name = f"{checkpoint.source} ({type(checkpoint.model).__name__})"
    if checkpoint.task not in (CLASSIFICATION, FEATURES, ZERO_SHOT) and checkpoint.tower is None:
        raise ConfigError(
            f"{name} is for {checkpoint.task}, of which accuracy is not defined.",
            "--reference, and `snows-hf prune --eval-data`, measure how near outputs are to those of the dense model.",
        )
    check_labels(data, "measuring accuracy")
    if prompts and checkpoint.tower is None:
        raise ConfigError(f"{name} has no tower for text, and takes no --prompt.")
    if prompts and checkpoint.tokenizer is None:
        raise ConfigError(f"{name} has no tokenizer in its folder, which --prompt needs.")
    if prompts and data.class_names is None:
        raise DataError(f"Data {data.name} ({data.split}) has no names of classes, which --prompt needs.")


def check_classifier(checkpoint: Checkpoint, what: str) -> None:
    """
    Raises:
        ConfigError: the model has no classes, which ``what`` needs.
    """
    if checkpoint.task != CLASSIFICATION:
        raise ConfigError(
            f"{checkpoint.source} ({type(checkpoint.model).__name__}) is for {checkpoint.task}, and no classifier, "
            f"which {what} needs."
        )


def check_mask_labels(config: PruneConfig, checkpoint: Checkpoint) -> None:
    """
    Raises:
        ConfigError: a mask criterion that needs labels, for a model without classes.
    """
    for name in (config.mask, config.units):
        if needs_labels(name):
            check_classifier(checkpoint, f"the mask criterion {name!r}")


def measure(run: Run, what: str, measured: Measured | None, data: ImageSource | None) -> dict[str, Any] | None:
    """Accuracy on all of some labelled images, once for all runs that go on from each other; None without a way to
    measure it. The model is called ``what``."""
    if data is None or measured is None:
        return None

    def found() -> Record:
        run.say(f"Measuring the {what} model on {data.name} ({data.split})")
        return Record({}, measured(run).to_dict())

    return run.journal.once(f"accuracy-{what}-{_key(data)}", found).facts


def measure_fidelity(
    run: Run, what: str, dense: Outputs, network: nn.Module, checkpoint: Checkpoint, data: ImageSource
) -> dict[str, Any]:
    """How near the outputs of a network called ``what`` are to the dense one's, once as well."""

    def found() -> Record:
        run.say(f"Comparing outputs of the {what} model with the dense one's on {data.name} ({data.split})")
        own = outputs_on_device(network)
        fidelity = fidelity_of(dense, own, data, checkpoint.preprocess, checkpoint.is_classifier, run=run)
        return Record({}, fidelity.to_dict())

    return run.journal.once(f"fidelity-{what}-{_key(data)}", found).facts


def outputs_on_device(network: nn.Module) -> Outputs:
    """A network's outputs for images from anywhere, in any type."""

    def outputs(images: Any) -> Any:
        parameter = next(network.parameters())
        return outputs_of(network, images.to(parameter.device, parameter.dtype))

    return outputs


def _key(data: ImageSource) -> str:
    return hashlib.sha256(repr((data.name, data.split)).encode()).hexdigest()[:8]
