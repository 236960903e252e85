"""Which class of transformers a checkpoint is of, and what that is for."""

from typing import Any

import transformers
from transformers import (
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForImageToImage,
    AutoModelForInstanceSegmentation,
    AutoModelForKeypointDetection,
    AutoModelForMaskGeneration,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    AutoModelForZeroShotImageClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from ..adapters.outputs import check_takes_images
from ..errors import LoadError


CLASSIFICATION = "image-classification"
ZERO_SHOT = "zero-shot-image-classification"
FEATURES = "image-feature-extraction"
"""Of what has no head, and of heads that nothing else fits."""

TASKS: dict[str, tuple[Any, ...]] = {
    CLASSIFICATION: (AutoModelForImageClassification,),
    ZERO_SHOT: (AutoModelForZeroShotImageClassification,),
    "image-segmentation": (
        AutoModelForSemanticSegmentation,
        AutoModelForUniversalSegmentation,
        AutoModelForInstanceSegmentation,
        AutoModelForImageSegmentation,
    ),
    "depth-estimation": (AutoModelForDepthEstimation,),
    "object-detection": (AutoModelForObjectDetection,),
    "mask-generation": (AutoModelForMaskGeneration,),
    "keypoint-detection": (AutoModelForKeypointDetection,),
    "image-to-image": (AutoModelForImageToImage,),
}
"""The Hub's tasks, with those of transformers' classes that know the models for them."""


def model_class(source: str, config: dict[str, Any]) -> Any:
    """The class that a config.json names under ``architectures``; without one that transformers has for its
    ``model_type``, the one for classifying images, else the bare model.

    Raises:
        AdapterError: it takes something else than images.
        LoadError: transformers has no class for it.
    """
    named, kind = config.get("architectures"), config["model_type"]
    for name in named if isinstance(named, list) else []:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and _kind(found) == kind:
            check_takes_images(found)
            return found
    for mapping in (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        if isinstance(kind, str) and kind in mapping:
            names = mapping[kind]
            found = getattr(transformers, names if isinstance(names, str) else names[0])
            check_takes_images(found)
            return found
    raise LoadError(
        f"{source} names no model that transformers has: architectures {named!r:.80}, model_type {kind!r:.80}.",
        "Models whose code comes with them are not run.",
    )


def task_of(model: Any) -> str:
    """What a model of transformers is for, by the Hub's names."""
    name = type(model).__name__
    for task, kinds in TASKS.items():
        if any(name in _names(kind) for kind in kinds):
            return task
    return FEATURES


def _kind(found: type[PreTrainedModel]) -> str | None:
    return getattr(found.config_class, "model_type", None)


def _names(kind: Any) -> list[str]:
    """Names of the classes that one of transformers' auto classes chooses from."""
    values = kind._model_mapping._model_mapping.values()
    return [name for value in values for name in ((value,) if isinstance(value, str) else value)]
