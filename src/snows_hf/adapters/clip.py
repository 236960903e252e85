"""Vision towers of CLIP and SigLIP with a classifier (transformers).

Operations as in vit.py. Both classifiers read the mean of the patches: CLIP's before its last LayerNorm, SigLIP's
after it. SigLIP's pooling head does not reach the logits, and is left as it is. (timm's towers are of its
VisionTransformer class.)
"""

from typing import Any

from torch import Tensor, nn
from transformers import CLIPForImageClassification, SiglipForImageClassification

from .attention import attention, split_heads
from .base import Operation, State, module_names, register
from .vit import TransformerBlock, transformers_block


def _block(layer: Any, names: dict[nn.Module, str]) -> TransformerBlock:
    attn = layer.self_attn

    def attend(x: Tensor) -> Tensor:
        return attention(*split_heads(attn, layer.layer_norm1(x)), attn.scale)

    return transformers_block(names, attn, layer.mlp, attend, lambda a, x: attn.out_proj(a), layer.layer_norm2)


@register(CLIPForImageClassification, family="vit")
def clip(model: Any) -> list[Operation]:
    """Operations of a transformers CLIP vision classifier."""
    tower, names = model.vision_model, module_names(model)
    # (pre_layrnorm is the library's spelling.)
    operations = [Operation(names[tower.pre_layrnorm], lambda s: (tower.pre_layrnorm(tower.embeddings(s[0])),))]
    for layer in tower.encoder.layers:
        operations += _block(layer, names).operations()
    return [*operations, Operation("classifier", lambda s: (model.classifier(s[0][:, 1:].mean(1)),))]


@register(SiglipForImageClassification, family="vit")
def siglip(model: Any) -> list[Operation]:
    """Operations of a transformers SigLIP vision classifier."""
    tower, names = model.vision_model, module_names(model)
    operations = [Operation(names[tower.embeddings], lambda s: (tower.embeddings(s[0]),))]
    for layer in tower.encoder.layers:
        operations += _block(layer, names).operations()

    def head(s: State) -> State:
        return (model.classifier(tower.post_layernorm(s[0]).mean(1)),)

    return [*operations, Operation("classifier", head)]
