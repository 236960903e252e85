"""Vision Transformers with pre-norm blocks: transformers ViT and DeiT, timm VisionTransformer (DeiT included).

Operations of one block (A.3.8): attention output before the out-projection (k = 0 for the joint QKV group), residual
stream after the out-projection, MLP0, activation, residual stream after MLP3. LayerNorms are absorbed into the
operation that reads them, as batch norms are in CNNs (A.3.2).
"""

from collections.abc import Callable, Iterator
from typing import Any

from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, ViTForImageClassification

from .attention import attention, split_heads, split_qkv
from .base import Function, Group, Operation, check_kind, module_names, register


def transformer_block(
    names: dict[nn.Module, str],
    attn: Any,
    mlp: Any,
    attend: Function,
    norm2: Function,
    scales: tuple[Function, Function] | None = None,
    project: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[Operation]:
    """Operations of x → x + scale1(project(attend(x), x)) → x + scale2(mlp(norm2(x))), on tokens x (n, …, width).

    Args:
        attn: what owns the projections: ``qkv`` and ``proj`` (timm), or ``q_proj``, ``k_proj``, ``v_proj`` and
            ``o_proj`` or ``out_proj`` (transformers).
        mlp: what owns ``fc1``, an activation, ``fc2`` and, in timm, a norm before that.
        attend: tokens to the attention's output, norm included.
        scales: of what the attention and the MLP add to the tokens.
        project: the attention's output, and the tokens, to what is added to these; the out-projection for None.
    """
    qkv = ("qkv",) if hasattr(attn, "qkv") else ("q_proj", "k_proj", "v_proj")
    group = Group(f"{names[attn]}.qkv", tuple(f"{names[attn]}.{part}.weight" for part in qkv), "qkv")
    out = next(getattr(attn, part) for part in ("proj", "o_proj", "out_proj") if hasattr(attn, part))
    between = getattr(mlp, "norm", nn.Identity())
    scale1, scale2 = scales or (nn.Identity(), nn.Identity())
    project = project or (lambda a, x: out(a))
    mlp0, mlp3 = names[mlp.fc1], names[mlp.fc2]

    yield Operation(f"{group.name} > attention", lambda s: (attend(s[0]), s[0]), group)
    yield Operation(f"{names[out]} > residual", lambda s: (s[1] + scale1(project(*s)),), Group.of(names[out], "proj"))
    yield Operation(mlp0, lambda s: (mlp.fc1(norm2(s[0])), s[0]), Group.of(mlp0, "mlp0"))
    yield Operation.of(f"{mlp0} > activation", mlp.act if hasattr(mlp, "act") else mlp.activation_fn)
    yield Operation(f"{mlp3} > residual", lambda s: (s[1] + scale2(mlp.fc2(between(s[0]))),), Group.of(mlp3, "mlp3"))


def transformers_block(
    names: dict[nn.Module, str],
    attn: Any,
    mlp: Any,
    norm1: Function,
    norm2: Function,
    scales: tuple[Function, Function] | None = None,
) -> Iterator[Operation]:
    """:func:`transformer_block` whose attention has no bias, with the norm before it."""
    scale = attn.scaling if hasattr(attn, "scaling") else attn.scale

    def attend(x: Tensor) -> Tensor:
        return attention(*split_heads(attn, norm1(x)), scale)

    return transformer_block(names, attn, mlp, attend, norm2, scales)


@register(ViTForImageClassification, DeiTForImageClassification, DeiTForImageClassificationWithTeacher, family="vit")
def transformers_vit(model: Any) -> Iterator[Operation]:
    base, names = model.base_model, module_names(model)
    yield Operation.of(names[base.embeddings], base.embeddings)
    for layer in base.layers:
        norms = layer.layernorm_before, layer.layernorm_after
        yield from transformers_block(names, layer.attention, layer.mlp, *norms)

    def head(x: Tensor) -> Tensor:
        x = base.layernorm(x)
        if isinstance(model, DeiTForImageClassificationWithTeacher):
            return (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2
        return model.classifier(x[:, 0])

    yield Operation.of("classifier", head)


def _timm_block(block: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    check_kind(block, names[block], Block, model="VisionTransformer")
    check_kind(block.attn, names[block.attn], Attention, model="VisionTransformer")
    check_kind(block.mlp, names[block.mlp], Mlp, model="VisionTransformer")
    attn = block.attn

    def attend(x: Tensor) -> Tensor:
        x = block.norm1(x)
        q, k, v = split_qkv(attn.qkv(x), attn.num_heads)
        a = attn.norm(attention(attn.q_norm(q), attn.k_norm(k), v, attn.scale))
        return a if attn.gate is None else a * attn.gate(x).sigmoid()

    return transformer_block(names, attn, block.mlp, attend, block.norm2, (block.ls1, block.ls2))


@register(VisionTransformer, family="vit")
def timm_vit(model: Any) -> Iterator[Operation]:
    """Operations of a timm VisionTransformer, distilled ones included."""
    names = module_names(model)
    yield Operation.of(
        "patch_embed", lambda x: model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    )
    for block in model.blocks:
        yield from _timm_block(block, names)
    yield Operation.of("head", lambda x: model.forward_head(model.norm(x)))
