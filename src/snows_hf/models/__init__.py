"""Architectures that neither timm nor transformers has, registered with timm."""

from . import cifar_resnet


__all__ = ["cifar_resnet"]
