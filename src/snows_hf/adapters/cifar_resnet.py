"""CIFAR ResNets of He et al. (2015), section 4.2, registered with timm as ``resnet20_cifar`` … ``resnet110_cifar``.

Three stages of n basic blocks with 16, 32 and 64 channels, 6n + 2 layers, option A shortcuts (every second pixel,
zero-padded channels, no parameters).
"""

from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn


class OptionAShortcut(nn.Module):
    """Identity, or for a change of width: every ``stride``-th pixel, channels padded with zeros on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)) if self.extra else x


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: logits (n, num_classes) from images (n, in_chans, 32, 32).

    ``inner``: between the two convolutions of a block there are so many channels, as a share of the stage's.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_chans: int = 3, inner: float = 1.0) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth {depth}: expected 6n + 2, such as 20, 32, 44, 56 or 110.")
        self.num_classes, self.num_features = num_classes, 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        blocks, width = (depth - 2) // 6, 16
        for stage, out_width in enumerate((16, 32, 64), start=1):
            strides = [1 if stage == 1 else 2] + [1] * (blocks - 1)
            layer = nn.Sequential()
            for stride in strides:
                shortcut = nn.Sequential(OptionAShortcut(width, out_width, stride))
                layer.append(_narrowed(BasicBlock(width, out_width, stride, shortcut), round(inner * out_width)))
                width = out_width
            self.add_module(f"layer{stage}", layer)
        self.linear: nn.Module = nn.Linear(64, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.linear = nn.Linear(64, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for layer in (self.get_submodule(f"layer{stage}") for stage in (1, 2, 3)):
            x = layer(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((-2, -1))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _narrowed(block: BasicBlock, inner: int) -> BasicBlock:
    """A block with another number of channels between its convolutions."""
    first, second = block.conv1, block.conv2
    if inner != first.out_channels:
        block.conv1 = nn.Conv2d(first.in_channels, inner, 3, first.stride[0], padding=1, bias=False)
        block.bn1 = nn.BatchNorm2d(inner)
        block.conv2 = nn.Conv2d(inner, second.out_channels, 3, padding=1, bias=False)
    return block


_CFG = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "fixed_input_size": True,
    "pool_size": (8, 8),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "conv1",
    "classifier": "linear",
}
_DEPTHS = (20, 32, 44, 56, 110)
default_cfgs = generate_default_cfgs({f"resnet{depth}_cifar": dict(_CFG) for depth in _DEPTHS})


def _register(depth: int) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # timm passes the configured image size on to the class; a convolutional network has no use for it.
        given = {"depth": depth, "kwargs_filter": ("img_size",), **kwargs}
        return build_model_with_cfg(CifarResNet, f"resnet{depth}_cifar", pretrained, **given)

    create.__name__ = f"resnet{depth}_cifar"
    register_model(create)


for _depth in _DEPTHS:
    _register(_depth)
