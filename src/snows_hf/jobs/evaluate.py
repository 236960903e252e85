"""How good a checkpoint is, dense or pruned: its accuracy, or how near its outputs are to another one's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.accuracy import Accuracy
from ..data.fidelity import Fidelity, fidelity_of
from ..data.images import open_images
from ..data.names import Name
from ..data.zero_shot import PROMPT
from ..errors import ConfigError
from ..hub.load import Checkpoint, library_errors
from ..runtime.run import Progress, Run
from .measure import check_measurable, measuring, outputs_on_device
from .request import check_prompts
from .subject import load_told


def evaluate(
    model: Name,
    data: Name,
    *,
    split: str = "test",
    prompts: Sequence[str] = (),
    device: str = "auto",
    revision: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Accuracy:
    """Measures top-1 and top-5 accuracy on all images of a split: of a classifier; of a model of images and text by
    the names of the data's classes (zero-shot); of features by each image's nearest neighbours in the split.

    Args:
        model: Hub id or folder.
        data: labelled images, of this ``split``.
        prompts: what is said of an image, with {} for the name of a class, to a model of images and text; by default
            "a photo of a {}.". Of several the embeddings are averaged.
        others: as for :func:`snows_hf.prune`.

    Raises:
        SnowsError: no such model or data, no labels, labels that do not match the model's classes, or a model that is
            for something else than classes.
    """
    check_prompts(prompts)
    run = Run.begin(device, on_stage=on_stage, on_progress=on_progress)
    checkpoint = load_told(run, model, revision)
    source = open_images(data, split)
    check_measurable(checkpoint, source, prompts)
    measured = measuring(checkpoint.model.to(run.device), checkpoint, source, prompts or (PROMPT,))
    assert measured is not None  # it was checked
    run.say(f"Measuring it on {data} ({split})")
    return measured(run)


def fidelity(
    model: Name,
    reference: Name,
    data: Name,
    *,
    split: str = "test",
    device: str = "auto",
    revision: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Fidelity:
    """Compares the outputs of a checkpoint with those of another one, the dense model say, on a split's images, which
    need no labels: models of any kind.

    Args:
        model: Hub id or folder, of this ``revision``.
        reference: Hub id or folder of the same architecture.
        others: as for :func:`snows_hf.prune`.

    Raises:
        SnowsError: no such model or data, or models of different kinds.
    """
    run = Run.begin(device, on_stage=on_stage, on_progress=on_progress)
    checkpoint, dense = load_told(run, model, revision), load_told(run, reference)
    with library_errors(f"{reference} cannot take the images of {model}"):
        alike = kind_of(checkpoint, checkpoint.image()) == kind_of(dense, checkpoint.image())
    if not alike:
        raise ConfigError(
            f"{reference} ({type(dense.model).__name__}) has other weights than {model} "
            f"({type(checkpoint.model).__name__}).",
            "Give the model that was pruned as --reference.",
        )
    source = open_images(data, split)
    run.say(f"Comparing them on {data} ({split})")
    own, theirs = (outputs_on_device(loaded.model.to(run.device)) for loaded in (checkpoint, dense))
    return fidelity_of(theirs, own, source, checkpoint.preprocess, checkpoint.is_classifier, run=run)


@torch.no_grad()
def kind_of(checkpoint: Checkpoint, image: Tensor) -> tuple[type, set[str], dict[str, torch.Size]]:
    """What is the same of models that can be compared: class, names of weights, and the shapes of their outputs for an
    image. Weights' shapes are not, where structures were cut out."""
    outputs = outputs_on_device(checkpoint.model)(image)
    shapes = {name: values.shape for name, values in outputs.items()}
    return type(checkpoint.model), set(checkpoint.model.state_dict()), shapes
