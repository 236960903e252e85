"""DINOv2 with a classifier (transformers), with registers or without: ViT blocks with layer scale.

Operations as in vit.py. The classifier reads the class token and the mean of the patches. (timm's DINOv2 models are of
its VisionTransformer class.) Those of giant size have a gated MLP, which has no adapter yet.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, cat, nn
from transformers import Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification

from ..errors import AdapterError
from .base import Operation, module_names, register
from .vit import transformers_block


def _block(layer: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    mlp = layer.mlp
    if not hasattr(mlp, "fc1"):
        raise AdapterError(
            f"{names[mlp]} is a {type(mlp).__name__}; expected an MLP of two layers.",
            "This variant of DINOv2 has no adapter yet.",
        )
    scales = layer.layer_scale1, layer.layer_scale2
    return transformers_block(names, layer.attention, mlp, layer.norm1, layer.norm2, scales)


@register(Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification, family="vit")
def dinov2(model: Any) -> Iterator[Operation]:
    base, names = model.base_model, module_names(model)
    yield Operation.of(names[base.embeddings], base.embeddings)
    for layer in base.encoder.layer:
        yield from _block(layer, names)
    registers = getattr(model.config, "num_register_tokens", 0)

    def head(x: Tensor) -> Tensor:
        x = base.layernorm(x)
        return model.classifier(cat([x[:, 0], x[:, 1 + registers :].mean(1)], dim=1))

    yield Operation.of("classifier", head)
