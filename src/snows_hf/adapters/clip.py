"""Vision towers of CLIP and SigLIP with a classifier (transformers).

Operations as in vit.py. Both classifiers read the mean of the patches: CLIP's before its last LayerNorm, SigLIP's
after it. SigLIP's pooling head does not reach the logits, and is left as it is. (timm's towers are of its
VisionTransformer class.)
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import CLIPForImageClassification, SiglipForImageClassification

from .attention import attention, split_heads
from .base import Operation, module_names, register
from .vit import transformer_block


def _block(layer: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    attn = layer.self_attn

    def attend(x: Tensor) -> Tensor:
        return attention(*split_heads(attn, layer.layer_norm1(x)), attn.scale)

    return transformer_block(names, attn, layer.mlp, attend, layer.layer_norm2)


@register(CLIPForImageClassification, family="vit")
def clip(model: Any) -> Iterator[Operation]:
    """Operations of a transformers CLIP vision classifier."""
    tower, names = model.vision_model, module_names(model)
    # (pre_layrnorm is the library's spelling.)
    yield Operation.of(names[tower.pre_layrnorm], lambda x: tower.pre_layrnorm(tower.embeddings(x)))
    for layer in tower.encoder.layers:
        yield from _block(layer, names)
    yield Operation.of("classifier", lambda x: model.classifier(x[:, 1:].mean(1)))


@register(SiglipForImageClassification, family="vit")
def siglip(model: Any) -> Iterator[Operation]:
    """Operations of a transformers SigLIP vision classifier."""
    tower, names = model.vision_model, module_names(model)
    yield Operation.of(names[tower.embeddings], tower.embeddings)
    for layer in tower.encoder.layers:
        yield from _block(layer, names)
    yield Operation.of("classifier", lambda x: model.classifier(tower.post_layernorm(x).mean(1)))
