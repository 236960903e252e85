"""Vision Transformers with pre-norm blocks: transformers ViT and DeiT, timm VisionTransformer (DeiT included).

Operations of one block (A.3.8): attention output before the out-projection (k = 0 for the joint QKV group), residual
stream after the out-projection, MLP0, activation, residual stream after MLP3. LayerNorms are absorbed into the
operation that reads them, as batch norms are in CNNs (A.3.2).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import DeiTForImageClassification, DeiTForImageClassificationWithTeacher, ViTForImageClassification

from .attention import attention, split_heads
from .base import Group, Operation, State, check_kind, module_names, register


@dataclass(frozen=True)
class TransformerBlock:
    """What a pre-norm block computes, x → x + project(attend(x), x) → x + mlp3(act(mlp0(x))), norms included, as
    callables on tokens x (n, …, width), with the live names of the prunable layers."""

    attend: Callable[[Tensor], Tensor]
    qkv: Group
    project: Callable[[Tensor, Tensor], Tensor]
    projection: str
    mlp0: Callable[[Tensor], Tensor]
    mlp0_name: str
    activation: Callable[[Tensor], Tensor]
    mlp3: Callable[[Tensor], Tensor]
    mlp3_name: str

    def operations(self) -> Iterator[Operation]:
        yield Operation(f"{self.qkv.name} > attention", lambda s: (self.attend(s[0]), s[0]), self.qkv)
        yield Operation(
            f"{self.projection} > residual",
            lambda s: (s[1] + self.project(*s),),
            Group.of(self.projection, "proj"),
        )
        yield Operation(self.mlp0_name, lambda s: (self.mlp0(s[0]), s[0]), Group.of(self.mlp0_name, "mlp0"))
        yield Operation(f"{self.mlp0_name} > activation", lambda s: (self.activation(s[0]), s[1]))
        yield Operation(
            f"{self.mlp3_name} > residual",
            lambda s: (s[1] + self.mlp3(s[0]),),
            Group.of(self.mlp3_name, "mlp3"),
        )


def transformers_block(
    names: dict[nn.Module, str],
    attn: Any,
    mlp: Any,
    attend: Callable[[Tensor], Tensor],
    project: Callable[[Tensor, Tensor], Tensor],
    norm2: Callable[[Tensor], Tensor],
    scale2: Callable[[Tensor], Tensor] = nn.Identity(),  # noqa: B008  has no state
) -> TransformerBlock:
    """A block with transformers' ``q_proj``, ``k_proj``, ``v_proj``, ``fc1``, ``activation_fn`` and ``fc2``.

    Args:
        names: live names of the model's modules.
        attn: what owns the projections; the one for the output is ``o_proj`` or ``out_proj``.
        mlp: what owns fc1 and fc2.
        attend: tokens to the attention's output, norm included.
        project: that output, and the tokens, to what is added to these.
        norm2: before the MLP.
        scale2: after it.
    """
    output = attn.o_proj if hasattr(attn, "o_proj") else attn.out_proj
    return TransformerBlock(
        attend=attend,
        qkv=Group(f"{names[attn]}.qkv", tuple(f"{names[attn]}.{part}_proj.weight" for part in "qkv"), "qkv"),
        project=project,
        projection=names[output],
        mlp0=lambda x: mlp.fc1(norm2(x)),
        mlp0_name=names[mlp.fc1],
        activation=mlp.activation_fn,
        mlp3=lambda h: scale2(mlp.fc2(h)),
        mlp3_name=names[mlp.fc2],
    )


def timm_block(
    name: str,
    block: Any,
    attend: Callable[[Tensor], Tensor],
    project: Callable[[Tensor, Tensor], Tensor],
    scale2: Callable[[Tensor], Tensor] = nn.Identity(),  # noqa: B008  has no state
) -> TransformerBlock:
    """A block with timm's ``attn.qkv``, ``attn.proj``, ``norm2`` and ``mlp``; ``name`` is its live one, and the
    callables are those of :func:`transformers_block`."""
    mlp = block.mlp
    return TransformerBlock(
        attend=attend,
        qkv=Group.of(f"{name}.attn.qkv", "qkv"),
        project=project,
        projection=f"{name}.attn.proj",
        mlp0=lambda x: mlp.fc1(block.norm2(x)),
        mlp0_name=f"{name}.mlp.fc1",
        activation=mlp.act,
        mlp3=lambda h: scale2(mlp.fc2(mlp.norm(h))),
        mlp3_name=f"{name}.mlp.fc2",
    )


def _vit_block(layer: Any, names: dict[nn.Module, str]) -> TransformerBlock:
    attn = layer.attention

    def attend(x: Tensor) -> Tensor:
        return attention(*split_heads(attn, layer.layernorm_before(x)), attn.scaling)

    return transformers_block(names, attn, layer.mlp, attend, lambda a, x: attn.o_proj(a), layer.layernorm_after)


@register(ViTForImageClassification, DeiTForImageClassification, DeiTForImageClassificationWithTeacher, family="vit")
def transformers_vit(model: Any) -> list[Operation]:
    """Operations of a transformers ViT or DeiT classifier."""
    base, names = model.base_model, module_names(model)
    operations = [Operation(names[base.embeddings], lambda s: (base.embeddings(s[0]),))]
    for layer in base.layers:
        operations += _vit_block(layer, names).operations()

    def head(s: State) -> State:
        x = base.layernorm(s[0])
        if isinstance(model, DeiTForImageClassificationWithTeacher):
            return ((model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2,)
        return (model.classifier(x[:, 0]),)

    return [*operations, Operation("classifier", head)]


def _timm_block(block: Any, name: str) -> TransformerBlock:
    for part, expected in {"": Block, ".attn": Attention, ".mlp": Mlp}.items():
        check_kind(block.get_submodule(part[1:]), f"{name}{part}", expected, model="VisionTransformer")
    attn = block.attn

    def attend(x: Tensor) -> Tensor:
        x = block.norm1(x)
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        a = attn.norm(attention(attn.q_norm(q), attn.k_norm(k), v, attn.scale))
        return a if attn.gate is None else a * attn.gate(x).sigmoid()

    return timm_block(name, block, attend, lambda a, x: block.ls1(attn.proj(a)), block.ls2)


@register(VisionTransformer, family="vit")
def timm_vit(model: Any) -> list[Operation]:
    """Operations of a timm VisionTransformer, distilled ones included."""
    names = module_names(model)

    def embed(s: State) -> State:
        return (model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(s[0])))),)

    operations = [Operation("patch_embed", embed)]
    for block in model.blocks:
        operations += _timm_block(block, names[block]).operations()
    return [*operations, Operation("head", lambda s: (model.forward_head(model.norm(s[0])),))]
