"""Swin Transformers (transformers and timm): ViT blocks whose attention stays within windows.

Operations as in vit.py, on tokens in their grid, (n, rows, columns, width), with the attention's output by window,
(n, windows, window², width), and one more operation where a stage begins with fewer and wider tokens: the
``reduction`` that merges four neighbours.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import swin_transformer as timm_swin
from torch import Tensor, nn
from transformers import SwinForImageClassification
from transformers.models.swin import modeling_swin

from .attention import attention, split_heads
from .base import Group, Operation, State, check_kind, module_names, register
from .vit import TransformerBlock, timm_block, transformers_block


def _merging(downsample: Any, names: dict[nn.Module, str], merge: Callable[[Tensor], Tensor]) -> Operation:
    name = names[downsample.reduction]
    return Operation(name, lambda s: (merge(s[0]),), Group.of(name, "downsample"))


def _transformers_block(layer: Any, names: dict[nn.Module, str]) -> TransformerBlock:
    attn = layer.attention

    def attend(x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        layer.set_shift_and_window_size((height, width))  # as the model does: windows no larger than the grid
        x, _ = layer.maybe_pad(layer.layernorm_before(x), height, width)
        windows = modeling_swin.window_partition(layer.cyclic_shift(x), layer.window_size)
        windows = windows.flatten(1, 2).unflatten(0, (len(x), -1))
        bias = attn.relative_position_bias()
        mask = layer.get_attn_mask(x.shape[1], x.shape[2], x.dtype, x.device)
        return attention(*split_heads(attn, windows), attn.scaling, bias if mask is None else bias + mask[:, None])

    def project(a: Tensor, x: Tensor) -> Tensor:
        (height, width), size = x.shape[1:3], layer.window_size
        padded = (-(-height // size) * size, -(-width // size) * size)
        windows = attn.o_proj(a).flatten(0, 1).unflatten(1, (size, size))
        x = layer.cyclic_shift(modeling_swin.window_reverse(windows, size, *padded), reverse=True)
        return x[:, :height, :width]

    return transformers_block(names, attn, layer.mlp, attend, project, layer.layernorm_after)


@register(SwinForImageClassification, family="vit")
def transformers_swin(model: Any) -> list[Operation]:
    """Operations of a transformers Swin classifier."""
    base, names = model.swin, module_names(model)

    def embed(s: State) -> State:
        tokens, grid = base.embeddings(s[0])
        return (tokens.unflatten(1, grid),)

    operations = [Operation(names[base.embeddings], embed)]
    for stage in base.encoder.layers:
        for layer in stage.blocks:
            operations += _transformers_block(layer, names).operations()
        if stage.downsample is not None:

            def merge(x: Tensor, downsample: Any = stage.downsample) -> Tensor:
                height, width = x.shape[1:3]
                return downsample(x.flatten(1, 2), (height, width)).unflatten(1, (-(-height // 2), -(-width // 2)))

            operations.append(_merging(stage.downsample, names, merge))

    def head(s: State) -> State:
        return (model.classifier(base.pooler(base.layernorm(s[0].flatten(1, 2)).transpose(1, 2)).flatten(1)),)

    return [*operations, Operation("classifier", head)]


def _timm_block(block: Any, names: dict[nn.Module, str]) -> TransformerBlock:
    attn = block.attn
    check_kind(attn, names[attn], timm_swin.WindowAttention, model="SwinTransformer")
    check_kind(block.mlp, names[block.mlp], Mlp, model="SwinTransformer")
    window, shift = tuple(block.window_size), tuple(block.shift_size)

    def attend(x: Tensor) -> Tensor:
        x = torch.roll(block.norm1(x), (-shift[0], -shift[1]), (1, 2))
        x = F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))
        windows = timm_swin.window_partition(x, window).flatten(1, 2).unflatten(0, (len(x), -1))
        # (n, windows, tokens, 3·heads·d) → three of (n, windows, heads, tokens, d)
        q, k, v = attn.qkv(windows).unflatten(-1, (3, attn.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        mask = block.get_attn_mask(x) if getattr(block, "dynamic_mask", False) else block.attn_mask
        bias = attn._get_rel_pos_bias()
        return attention(q, k, v, attn.scale, bias if mask is None else bias + mask[:, None])

    def project(a: Tensor, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        windows = attn.proj(a).flatten(0, 1).unflatten(1, window)
        x = timm_swin.window_reverse(windows, window, height + -height % window[0], width + -width % window[1])
        return torch.roll(x[:, :height, :width], shift, (1, 2))

    return timm_block(names[block], block, attend, project)


@register(timm_swin.SwinTransformer, family="vit")
def timm_swin_transformer(model: Any) -> list[Operation]:
    """Operations of a timm SwinTransformer."""
    names = module_names(model)
    operations = [Operation("patch_embed", lambda s: (model.patch_embed(s[0]),))]
    for stage in model.layers:
        if not isinstance(stage.downsample, nn.Identity):
            operations.append(_merging(stage.downsample, names, stage.downsample))
        for block in stage.blocks:
            operations += _timm_block(block, names).operations()
    return [*operations, Operation("head", lambda s: (model.forward_head(model.norm(s[0])),))]
