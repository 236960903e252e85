"""DINOv2 with a classifier (transformers), with registers or without: ViT blocks with layer scale.

Operations as in vit.py. The classifier reads the class token and the mean of the patches. (timm's DINOv2 models are of
its VisionTransformer class.) Those of giant size have a gated MLP, which has no adapter yet.
"""

from typing import Any

from torch import Tensor, cat, nn
from transformers import Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification

from ..errors import AdapterError
from .attention import attention, split_heads
from .base import Operation, State, module_names, register
from .vit import TransformerBlock, transformers_block


def _block(layer: Any, names: dict[nn.Module, str]) -> TransformerBlock:
    attn, mlp = layer.attention, layer.mlp
    if not hasattr(mlp, "fc1"):
        raise AdapterError(
            f"{names[mlp]} is a {type(mlp).__name__}; expected an MLP of two layers.",
            "This variant of DINOv2 has no adapter yet.",
        )

    def attend(x: Tensor) -> Tensor:
        return attention(*split_heads(attn, layer.norm1(x)), attn.scaling)

    def project(a: Tensor, x: Tensor) -> Tensor:
        return layer.layer_scale1(attn.o_proj(a))

    return transformers_block(names, attn, mlp, attend, project, layer.norm2, layer.layer_scale2)


@register(Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification, family="vit")
def dinov2(model: Any) -> list[Operation]:
    """Operations of a transformers DINOv2 classifier."""
    base, names = model.base_model, module_names(model)
    operations = [Operation(names[base.embeddings], lambda s: (base.embeddings(s[0]),))]
    for layer in base.encoder.layer:
        operations += _block(layer, names).operations()
    registers = getattr(model.config, "num_register_tokens", 0)

    def head(s: State) -> State:
        x = base.layernorm(s[0])
        return (model.classifier(cat([x[:, 0], x[:, 1 + registers :].mean(1)], dim=1)),)

    return [*operations, Operation("classifier", head)]
