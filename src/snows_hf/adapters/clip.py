"""Vision towers of CLIP and SigLIP with a classifier (transformers).

Operations as in vit.py. Both classifiers read the mean of the patches: CLIP's before its last LayerNorm, SigLIP's
after it. SigLIP's pooling head does not reach the logits, and is left as it is. (timm's towers are of its
VisionTransformer class.)
"""

from collections.abc import Iterator
from typing import Any

from transformers import CLIPForImageClassification, SiglipForImageClassification

from .base import Operation, module_names, register
from .vit import transformers_block


def _blocks(model: Any) -> Iterator[Operation]:
    names = module_names(model)
    for layer in model.vision_model.encoder.layers:
        yield from transformers_block(names, layer.self_attn, layer.mlp, layer.layer_norm1, layer.layer_norm2)


@register(CLIPForImageClassification, family="vit")
def clip(model: Any) -> Iterator[Operation]:
    tower = model.vision_model
    # (pre_layrnorm is the library's spelling.)
    yield Operation.of("vision_model.pre_layrnorm", lambda x: tower.pre_layrnorm(tower.embeddings(x)))
    yield from _blocks(model)
    yield Operation.of("classifier", lambda x: model.classifier(x[:, 1:].mean(1)))


@register(SiglipForImageClassification, family="vit")
def siglip(model: Any) -> Iterator[Operation]:
    tower = model.vision_model
    yield Operation.of("vision_model.embeddings", tower.embeddings)
    yield from _blocks(model)
    yield Operation.of("classifier", lambda x: model.classifier(tower.post_layernorm(x).mean(1)))
