"""The accuracy of a checkpoint, dense or pruned."""

from collections.abc import Callable

from ..data.accuracy import Accuracy, accuracy_of
from ..data.images import open_images
from ..data.names import Name
from ..hub.load import load
from ..runtime.device import find_device


def evaluate(
    model: Name,
    data: Name,
    *,
    split: str = "test",
    device: str = "auto",
    revision: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Accuracy:
    """Measures top-1 and top-5 accuracy on all images of a split.

    Args:
        model: Hub id or folder.
        data: labelled images: Hub data set, image folder or folder of parquet.
        split: of ``data``.
        device: ``auto``, ``cpu`` or ``cuda``.
        revision: of the model on the Hub.
        on_stage: called with a line of text when a new stage begins.

    Raises:
        SnowsError: no such model or data, no labels, or labels that do not match the model's classes.
    """
    target = find_device(device)
    on_stage(f"Loading {model}")
    checkpoint = load(model, revision)
    source = open_images(data, split)
    on_stage(f"Measuring it on {data} ({split})")
    return accuracy_of(checkpoint.model.to(target), source, checkpoint.preprocess, checkpoint.class_names)
