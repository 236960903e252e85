"""The accuracy of a checkpoint, dense or pruned."""

from collections.abc import Callable

from ..data.accuracy import Accuracy, accuracy_of
from ..data.images import open_images
from ..data.names import Name
from ..runtime.run import Progress, Run
from .subject import load_told


def evaluate(
    model: Name,
    data: Name,
    *,
    split: str = "test",
    device: str = "auto",
    revision: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Accuracy:
    """Measures top-1 and top-5 accuracy on all images of a split.

    Args:
        model: Hub id or folder.
        data: labelled images, of this ``split``.
        others: as for :func:`snows_hf.prune`.

    Raises:
        SnowsError: no such model or data, no labels, or labels that do not match the model's classes.
    """
    run = Run.begin(device, on_stage=on_stage, on_progress=on_progress)
    checkpoint = load_told(run, model, revision)
    source = open_images(data, split)
    run.say(f"Measuring it on {data} ({split})")
    return accuracy_of(checkpoint.model.to(run.device), source, checkpoint.preprocess, checkpoint.class_names, run=run)
