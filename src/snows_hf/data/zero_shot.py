"""Models of images and text as classifiers: an image is of the class whose name it is nearest to."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.outputs import outputs_of
from ..errors import AdapterError


PROMPT = "a photo of a {}."
"""What is said of an image, where nothing else is asked for; {} stands for the name of a class."""

CHUNK = 256  # texts that are embedded together


class ZeroShot(nn.Module):
    """A classifier made of a model of images and text.

    Args:
        images: gives ``image_embeds``; the model itself, or its tower for images alone.
        model: of transformers, whose tower for text is asked once, when the first image comes.
        tokenizer: its own.
        names: of the classes.
        prompts: with {} for a name. The embeddings of a class in all prompts are averaged.
    """

    def __init__(
        self,
        images: nn.Module,
        model: nn.Module,
        tokenizer: Any,
        names: Sequence[str],
        prompts: Sequence[str] = (PROMPT,),
    ) -> None:
        super().__init__()
        self.images = images
        self.asked = (model, tokenizer, names, prompts)

    @cached_property
    def classes(self) -> Tensor:
        return class_embeddings(*self.asked)

    def forward(self, pixels: Tensor) -> Tensor:
        """Cosines of images (n, 3, height, width) to classes, (n, classes)."""
        outputs = outputs_of(self.images, pixels)
        if "image_embeds" not in outputs:
            raise AdapterError(f"{type(self.images).__name__} embeds no images, but has {', '.join(outputs)}.")
        embeddings = F.normalize(outputs["image_embeds"].float(), dim=-1)
        return embeddings @ self.classes.to(embeddings).T


@torch.no_grad()
def class_embeddings(model: Any, tokenizer: Any, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Directions of classes in the space that a model embeds images and text in, (classes, d), in float32."""
    device = next(model.parameters()).device
    total: Tensor | None = None
    for prompt in prompts:
        texts = [prompt.replace("{}", name.replace("_", " ")) for name in names]
        parts = []
        for start in range(0, len(texts), CHUNK):
            tokens = tokenizer(texts[start : start + CHUNK], return_tensors="pt", **text_form(model, tokenizer))
            found = model.get_text_features(**tokens.to(device))
            embeddings = found if isinstance(found, Tensor) else found.pooler_output
            parts.append(F.normalize(embeddings.float(), dim=-1))
        own = torch.cat(parts)
        total = own if total is None else total + own
    assert total is not None
    return F.normalize(total, dim=-1)


def text_form(model: Any, tokenizer: Any) -> dict[str, Any]:
    """How a model takes its texts: SigLIP, which has no attention mask, was trained on texts of its full length
    (transformers' zero-shot pipeline knows it by the same name)."""
    longest = min(model.config.text_config.max_position_embeddings, tokenizer.model_max_length)
    padding = "max_length" if "siglip" in model.config.model_type else True
    return {"padding": padding, "truncation": True, "max_length": longest}
