"""BEiT (transformers and timm): ViT blocks with a relative position bias and layer scale.

Operations as in vit.py. The bias is a constant of each block, or one for all blocks, on images of the size that the
model was made for.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.beit import Attention, Beit
from torch import Tensor, nn
from transformers import BeitForImageClassification

from .attention import attention, split_heads, split_qkv
from .base import Operation, check_kind, module_names, register
from .vit import transformer_block


def _sum(*biases: Tensor | None) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return sum(present[1:], present[0]) if present else None


def _transformers_block(layer: Any, base: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    attn = layer.attention

    def attend(x: Tensor) -> Tensor:
        biases = base.shared_position_bias, layer.relative_position_bias
        bias = _sum(*(b(b.window_size) for b in biases if b is not None))
        return attention(*split_heads(attn, layer.layernorm_before(x)), attn.scaling, bias)

    scales = (lambda x: layer.lambda_1 * x), (lambda x: layer.lambda_2 * x)
    return transformer_block(names, attn, layer.mlp, attend, layer.layernorm_after, scales)


@register(BeitForImageClassification, family="vit")
def transformers_beit(model: Any) -> Iterator[Operation]:
    base, names = model.beit, module_names(model)
    yield Operation.of(names[base.embeddings], base.embeddings)
    for layer in base.layers:
        yield from _transformers_block(layer, base, names)
    yield Operation.of("classifier", lambda x: model.classifier(base.pooler(base.layernorm(x))))


def _timm_block(block: Any, model: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    attn = block.attn
    check_kind(attn, names[attn], Attention, model="Beit")
    check_kind(block.mlp, names[block.mlp], Mlp, model="Beit")

    def attend(x: Tensor) -> Tensor:
        qkv = attn.qkv(block.norm1(x))
        if attn.q_bias is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        own = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()
        shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return attention(*split_qkv(qkv, attn.num_heads), attn.scale, _sum(own, shared))

    scales = None if block.gamma_1 is None else ((lambda x: block.gamma_1 * x), (lambda x: block.gamma_2 * x))
    return transformer_block(names, attn, block.mlp, attend, block.norm2, scales)


@register(Beit, family="vit")
def timm_beit(model: Any) -> Iterator[Operation]:
    names = module_names(model)

    def embed(x: Tensor) -> Tensor:
        x = model.patch_embed(x)
        x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        return model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)

    yield Operation.of("patch_embed", embed)
    for block in model.blocks:
        yield from _timm_block(block, model, names)
    yield Operation.of("head", lambda x: model.forward_head(model.norm(x)))
