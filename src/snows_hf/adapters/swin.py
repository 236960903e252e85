"""Swin Transformers (transformers and timm): ViT blocks whose attention stays within windows.

Operations as in vit.py, on tokens in their grid, (n, rows, columns, width), with the attention's output by window,
(n, windows, window², width), and one more operation where a stage begins with fewer and wider tokens: the
``reduction`` that merges four neighbours.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import swin_transformer as timm_swin
from torch import Tensor, nn
from transformers import SwinForImageClassification
from transformers.models.swin import modeling_swin

from .attention import attention, split_heads, split_qkv
from .base import Operation, check_kind, module_names, register
from .vit import transformer_block


def _transformers_block(layer: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
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

    return transformer_block(names, attn, layer.mlp, attend, layer.layernorm_after, project=project)


@register(SwinForImageClassification, family="vit")
def transformers_swin(model: Any) -> Iterator[Operation]:
    base, names = model.swin, module_names(model)

    def embed(x: Tensor) -> Tensor:
        tokens, grid = base.embeddings(x)
        return tokens.unflatten(1, grid)

    yield Operation.of(names[base.embeddings], embed)
    for stage in base.encoder.layers:
        for layer in stage.blocks:
            yield from _transformers_block(layer, names)
        if stage.downsample is not None:

            def merge(x: Tensor, downsample: Any = stage.downsample) -> Tensor:
                height, width = x.shape[1:3]
                return downsample(x.flatten(1, 2), (height, width)).unflatten(1, (-(-height // 2), -(-width // 2)))

            yield Operation.of(names[stage.downsample.reduction], merge, "downsample")

    def head(x: Tensor) -> Tensor:
        return model.classifier(base.pooler(base.layernorm(x.flatten(1, 2)).transpose(1, 2)).flatten(1))

    yield Operation.of("classifier", head)


def _timm_block(block: Any, names: dict[nn.Module, str]) -> Iterator[Operation]:
    attn = block.attn
    check_kind(attn, names[attn], timm_swin.WindowAttention, model="SwinTransformer")
    check_kind(block.mlp, names[block.mlp], Mlp, model="SwinTransformer")
    window, shift = tuple(block.window_size), tuple(block.shift_size)

    def attend(x: Tensor) -> Tensor:
        x = torch.roll(block.norm1(x), (-shift[0], -shift[1]), (1, 2))
        x = F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))
        windows = timm_swin.window_partition(x, window).flatten(1, 2).unflatten(0, (len(x), -1))
        mask = block.get_attn_mask(x) if getattr(block, "dynamic_mask", False) else block.attn_mask
        bias = attn._get_rel_pos_bias()
        bias = bias if mask is None else bias + mask[:, None]
        return attention(*split_qkv(attn.qkv(windows), attn.num_heads), attn.scale, bias)

    def project(a: Tensor, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        windows = attn.proj(a).flatten(0, 1).unflatten(1, window)
        x = timm_swin.window_reverse(windows, window, height + -height % window[0], width + -width % window[1])
        return torch.roll(x[:, :height, :width], shift, (1, 2))

    return transformer_block(names, attn, block.mlp, attend, block.norm2, project=project)


@register(timm_swin.SwinTransformer, family="vit")
def timm_swin_transformer(model: Any) -> Iterator[Operation]:
    names = module_names(model)
    yield Operation.of("patch_embed", model.patch_embed)
    for stage in model.layers:
        if not isinstance(stage.downsample, nn.Identity):
            yield Operation.of(names[stage.downsample.reduction], stage.downsample, "downsample")
        for block in stage.blocks:
            yield from _timm_block(block, names)
    yield Operation.of("head", lambda x: model.forward_head(model.norm(x)))
