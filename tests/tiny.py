"""Tiny random networks in float64 whose every part matters: no zero biases, no unit scales, no identical heads."""

import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from snows_hf.masks import NM, Masks
from snows_hf.models.cifar_resnet import CifarResNet


SIZE = 8  # images are 3 x 8 x 8


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Evaluation mode, float64, weights of unit gain, random norms, biases, tokens and batch-norm statistics."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.square())
            elif tensor.dim() >= 2 and name.endswith("weight"):
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            elif tensor.dim() == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.3 * noise)
    return model


def transformers_vit(seed: int = 0, layers: int = 2) -> ViTForImageClassification:
    """Width 8, two heads, 5 tokens; every block is five operations."""
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=SIZE,
        patch_size=4,
        num_labels=3,
        attn_implementation="sdpa",  # eager attention rounds the softmax to float32
    )
    return randomised(ViTForImageClassification(config), seed)


def timm_vit(seed: int = 0, layers: int = 2) -> VisionTransformer:
    """The same sizes, with one fused QKV matrix."""
    model = VisionTransformer(
        img_size=SIZE, patch_size=4, embed_dim=8, depth=layers, num_heads=2, mlp_ratio=1.5, num_classes=3
    )
    return randomised(model, seed)


def cifar_resnet(seed: int = 0) -> CifarResNet:
    """Eight layers: one basic block in each of three stages, parameter-free shortcuts."""
    return randomised(CifarResNet(depth=8, num_classes=3), seed)


def timm_resnet(seed: int = 0) -> ResNet:
    """Four basic blocks, downsampling convolutions on the shortcuts, in-place ReLUs."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 8, 16, 16), stem_width=8, num_classes=3)
    return randomised(model, seed)


def nm_masks(model: nn.Module, parameters: tuple[str, ...], n: int, m: int) -> Masks:
    """N:M masks by magnitude."""
    return {name: NM(n, m).mask(model.get_parameter(name).detach().abs()) for name in parameters}
