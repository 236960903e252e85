"""BEiT (transformers and timm): ViT blocks with a relative position bias and layer scale.

Operations as in vit.py. The bias is a constant of each block, or one for all blocks, on images of the size that the
model was made for.
"""

from typing import Any

import torch
from timm.layers import Mlp
from timm.models.beit import Attention, Beit
from torch import Tensor, nn
from transformers import BeitForImageClassification

from .attention import attention, split_heads
from .base import Operation, State, check_kind, module_names, register
from .vit import TransformerBlock, timm_block, transformers_block


def _sum(*biases: Tensor | None) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return sum(present[1:], present[0]) if present else None


def _transformers_block(layer: Any, base: Any, names: dict[nn.Module, str]) -> TransformerBlock:
    attn = layer.attention

    def attend(x: Tensor) -> Tensor:
        bias = _sum(
            *(b(b.window_size) for b in (base.shared_position_bias, layer.relative_position_bias) if b is not None)
        )
        return attention(*split_heads(attn, layer.layernorm_before(x)), attn.scaling, bias)

    return transformers_block(
        names,
        attn,
        layer.mlp,
        attend,
        lambda a, x: layer.lambda_1 * attn.o_proj(a),
        layer.layernorm_after,
        lambda h: layer.lambda_2 * h,
    )


@register(BeitForImageClassification, family="vit")
def transformers_beit(model: Any) -> list[Operation]:
    """Operations of a transformers BEiT classifier."""
    base, names = model.beit, module_names(model)
    operations = [Operation(names[base.embeddings], lambda s: (base.embeddings(s[0]),))]
    for layer in base.layers:
        operations += _transformers_block(layer, base, names).operations()

    def head(s: State) -> State:
        return (model.classifier(base.pooler(base.layernorm(s[0]))),)

    return [*operations, Operation("classifier", head)]


def _timm_block(block: Any, model: Any, name: str) -> TransformerBlock:
    attn = block.attn
    check_kind(attn, f"{name}.attn", Attention, model="Beit")
    check_kind(block.mlp, f"{name}.mlp", Mlp, model="Beit")

    def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
        return x if gamma is None else gamma * x

    def attend(x: Tensor) -> Tensor:
        qkv = attn.qkv(block.norm1(x))
        if attn.q_bias is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        own = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()
        shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
        return attention(q, k, v, attn.scale, _sum(own, shared))

    return timm_block(
        name,
        block,
        attend,
        lambda a, x: scaled(attn.proj(a), block.gamma_1),
        lambda x: scaled(x, block.gamma_2),
    )


@register(Beit, family="vit")
def timm_beit(model: Any) -> list[Operation]:
    """Operations of a timm BEiT."""
    names = module_names(model)

    def embed(s: State) -> State:
        x = model.patch_embed(s[0])
        x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        return (model.pos_drop(x if model.pos_embed is None else x + model.pos_embed),)

    operations = [Operation("patch_embed", embed)]
    for block in model.blocks:
        operations += _timm_block(block, model, names[block]).operations()
    return [*operations, Operation("head", lambda s: (model.forward_head(model.norm(s[0])),))]
