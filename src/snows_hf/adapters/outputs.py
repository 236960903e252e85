"""What a model makes of images alone: its outputs by name, whichever library it is of and whatever it is for."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError


PREDICTIONS = (
    *("logits", "pred_boxes", "pred_masks", "predicted_depth", "reconstruction"),
    *("class_queries_logits", "masks_queries_logits"),
)
"""What transformers' models are for, where they have a head. Beside one of these their hidden states do not count."""

NOT_OUTPUTS = ("hidden_states", "attentions", "loss", "mask", "ids_restore")
"""How names end of what transformers returns besides."""


def is_two_tower(model: nn.Module | type[nn.Module]) -> bool:
    """Whether a model embeds images and text in one space (CLIP, SigLIP); of these, the tower for images counts."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def outputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """A model's outputs for preprocessed images (n, 3, height, width), by name, each with the images first.

    Predictions where there is a head for them, else features: ``image_embeds`` of CLIP's kind, ``last_hidden_state``
    and ``pooler_output``, a backbone's ``feature_maps.0`` …; timm's are ``logits``, or ``features`` without a head.

    Raises:
        AdapterError: the model takes something else than images, or gives nothing that could be compared.
    """
    found = dict(_flat(_call(model)(images)))
    heads = {name: value for name, value in found.items() if name.partition(".")[0] in PREDICTIONS}
    outputs = {name: value for name, value in (heads or found).items() if value.is_floating_point()}
    if not outputs:
        raise AdapterError(f"{type(model).__name__} has no output of floating-point numbers, but {', '.join(found)}.")
    return outputs


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """A classifier's logits (n, classes).

    Raises:
        AdapterError: it is none.
    """
    outputs = outputs_of(model, images)
    if "logits" not in outputs:
        raise AdapterError(f"{type(model).__name__} has no logits, but {', '.join(outputs)}.")
    return outputs["logits"]


def check_takes_images(model: type[nn.Module]) -> None:
    """Makes sure that a class of transformers' models takes images alone, or has a tower that does.

    Raises:
        AdapterError: it takes something else (text), or something besides (text beside the image).
    """
    if is_two_tower(model) or hasattr(model, "get_image_embeddings"):
        return
    _, *takes = inspect.signature(model.forward).parameters.values()
    named = [parameter for parameter in takes if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    needed = [parameter.name for parameter in named if parameter.default is parameter.empty]
    names = {parameter.name for parameter in named}
    if {*needed} - {"pixel_values"} or "pixel_values" not in names or (not needed and "input_ids" in names):
        given = ", ".join(needed or [parameter.name for parameter in named[:3]] + ["…"] * (len(named) > 3))
        raise AdapterError(
            f"{model.__name__} takes {given}: not images alone.",
            "Models of images, and the image towers of models of images and text, can be pruned.",
        )


def _call(model: Any) -> Callable[[Tensor], Any]:
    """The model as a function of images."""
    if is_two_tower(model):
        return lambda images: {"image_embeds": _pooled(model.get_image_features(pixel_values=images))}
    if hasattr(model, "get_image_embeddings"):  # SAM: its prompts and masks come after
        return lambda images: {"image_embeddings": model.get_image_embeddings(images)}
    if not hasattr(model, "main_input_name"):  # timm's
        headless = getattr(model, "num_classes", 1) == 0
        return lambda images: _named(model(images), "features" if headless else "logits")
    check_takes_images(type(model))
    masks = "noise" in inspect.signature(model.forward).parameters and hasattr(model.config, "mask_ratio")
    if masks and isinstance(model.config.patch_size, int):  # Hiera's, a pair, masks in pretraining alone
        return lambda images: _unmasked(model, images)
    return lambda images: model(pixel_values=images)


def _pooled(output: Any) -> Tensor:
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled


def _named(output: Any, name: str) -> dict[str, Any]:
    return output if isinstance(output, dict) else {name: output}


def _unmasked(model: Any, images: Tensor) -> Any:
    """A masked autoencoder's encoder with every patch there, in its own order."""
    config, patch = model.config, model.config.patch_size
    noise = torch.arange((images.shape[2] // patch) * (images.shape[3] // patch), device=images.device)
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        return model(pixel_values=images, noise=noise.to(images).expand(images.shape[0], -1))
    finally:
        config.mask_ratio = ratio


def _flat(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a model returns, with the names and numbers on the way to it."""
    if isinstance(output, Tensor):
        yield name or "logits", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            if not str(key).endswith(NOT_OUTPUTS):
                yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(output, list | tuple):
        for number, value in enumerate(output):
            yield from _flat(value, f"{name}.{number}" if name else str(number))
