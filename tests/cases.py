"""Tiny models with random weights, one per supported family and variant: built offline from their config alone.

Nothing is left at a value that hides a mistake: norms, their running statistics, layer scales, tokens and position
embeddings are all random.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from quick import rest_slow
from timm.layers import BlurPool2d, RmsNorm
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet, mobilenetv1_100
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from snows_hf.adapters.cifar_resnet import CifarResNet


@dataclass(frozen=True)
class Case:
    """One variant of an architecture: ``make`` builds it, on images (n, 3, size, size)."""

    name: str
    make: Callable[[], nn.Module]
    size: int

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in evaluation mode: the same weights on every call."""
        return randomised(self.make()).to(dtype).eval()

    def images(self, n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(n, 3, self.size, self.size, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and running statistic drawn anew, at a scale that keeps activations and attention lively."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    for name, parameter in model.named_parameters():
        if parameter.ndim in (2, 4):
            normal(parameter, 0.0, (2 / parameter[0].numel()) ** 0.5)
        elif name.endswith(("weight", "gamma")):
            normal(parameter, 1.0, 0.2)
        else:
            normal(parameter, 0.0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            normal(buffer, 0.0, 0.2)
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


_TRANSFORMERS_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
_TRANSFORMERS_RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "num_labels": 5}
_TIMM_VIT = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "num_classes": 5,
}
_TIMM_RESNET = {"layers": (1, 2, 1, 1), "channels": (8, 8, 16, 16), "num_classes": 5, "stem_width": 8}


def transformers_vit(cls: type[nn.Module], config: type, **changes: object) -> nn.Module:
    return cls(config(**_TRANSFORMERS_VIT, **changes))


def transformers_resnet(layer_type: str, **changes: object) -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(**_TRANSFORMERS_RESNET, layer_type=layer_type, **changes))


def transformers_tower(cls: type[nn.Module], config: type) -> nn.Module:
    """A vision tower with a classifier, whose configuration has that of a text tower beside it."""
    tower = {name: value for name, value in _TRANSFORMERS_VIT.items() if name != "num_labels"}
    return cls(config(vision_config=tower, num_labels=5))


def transformers_swin(image_size: int = 16, **changes: object) -> nn.Module:
    """On a grid of 8 x 8 tokens, 4 x 4 in the second stage: shifted windows, and one as large as the grid."""
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "patch_size": 2}
    return SwinForImageClassification(SwinConfig(**sizes | changes, image_size=image_size, num_labels=5))


def timm_swin(img_size: int = 16, **changes: object) -> nn.Module:
    sizes = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "patch_size": 2}
    return SwinTransformer(**sizes | changes, img_size=img_size, num_classes=5)


def transformers_convnext(cls: type[nn.Module], config: type, **changes: object) -> nn.Module:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "layer_scale_init_value": 0.5}
    return cls(config(**sizes | changes, num_labels=5))


def timm_convnext(**changes: object) -> nn.Module:
    return ConvNeXt(**{"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16), "num_classes": 5} | changes)


def timm_vit(cls: type[nn.Module] = VisionTransformer, **changes: object) -> nn.Module:
    return cls(**_TIMM_VIT | changes)


def timm_resnet(block: type[nn.Module] = BasicBlock, **changes: object) -> nn.Module:
    return ResNet(block, **_TIMM_RESNET | changes)


def timm_mobilenet(block: str = "dsa", options: str = "", **changes: object) -> nn.Module:
    """MobileNetV1 of few channels. ``dsa`` blocks are MobileNetV1's: an activation after the pointwise convolution and
    no skip connection; ``ds`` blocks have the skip and not the activation."""
    stages = [f"{block}_r1_k3_s1_c16", f"{block}_r2_k3_s2_c16", f"{block}_r1_k3_s2_c32"]
    blocks = decode_arch_def([[stage + options] for stage in stages])
    settings = {"num_features": 0, "stem_size": 8, "fix_stem": True, "num_classes": 5, "act_layer": nn.ReLU6}
    return EfficientNet(blocks, **settings | changes)


CASES = [
    Case("transformers-vit", partial(transformers_vit, ViTForImageClassification, ViTConfig), 16),
    Case(
        "transformers-vit-no-qkv-bias",
        partial(transformers_vit, ViTForImageClassification, ViTConfig, qkv_bias=False, hidden_act="relu"),
        16,
    ),
    Case("transformers-deit", partial(transformers_vit, DeiTForImageClassification, DeiTConfig), 16),
    Case(
        "transformers-deit-teacher", partial(transformers_vit, DeiTForImageClassificationWithTeacher, DeiTConfig), 16
    ),
    Case("timm-vit", timm_vit, 16),
    Case("timm-vit-average", partial(timm_vit, class_token=False, global_pool="avg"), 16),
    Case("timm-vit-map", partial(timm_vit, class_token=False, global_pool="map"), 16),
    Case("timm-vit-qk-norm", partial(timm_vit, qk_norm=True), 16),
    Case("timm-vit-layer-scale", partial(timm_vit, init_values=0.1), 16),
    Case("timm-vit-pre-norm", partial(timm_vit, pre_norm=True), 16),
    Case("timm-vit-scale-norms", partial(timm_vit, scale_attn_norm=True, scale_mlp_norm=True), 16),
    Case("timm-vit-registers", partial(timm_vit, reg_tokens=2, no_embed_class=True), 16),
    Case(
        "timm-vit-registers-no-class",
        partial(timm_vit, class_token=False, reg_tokens=4, no_embed_class=True, global_pool="avg"),
        16,
    ),
    Case("timm-vit-dynamic-size", partial(timm_vit, dynamic_img_size=True), 24),
    Case("timm-vit-rms-norm", partial(timm_vit, norm_layer=RmsNorm, proj_bias=False), 16),
    Case("timm-deit-distilled", partial(timm_vit, VisionTransformerDistilled), 16),
    Case("transformers-resnet-basic", partial(transformers_resnet, "basic"), 32),
    Case("transformers-resnet-bottleneck", partial(transformers_resnet, "bottleneck"), 32),
    Case(
        "transformers-resnet-downsample-in-bottleneck",
        partial(transformers_resnet, "bottleneck", downsample_in_bottleneck=True),
        32,
    ),
    Case(
        "transformers-resnet-downsample-in-first-stage",
        partial(transformers_resnet, "basic", downsample_in_first_stage=True),
        32,
    ),
    Case("timm-resnet-basic", timm_resnet, 32),
    Case("timm-resnet-bottleneck", partial(timm_resnet, Bottleneck), 32),
    Case("timm-resnet-avg-down", partial(timm_resnet, Bottleneck, avg_down=True), 32),
    Case("timm-resnet-dilated", partial(timm_resnet, Bottleneck, avg_down=True, output_stride=8), 32),
    Case("timm-resnet-deep-stem", partial(timm_resnet, stem_type="deep", replace_stem_pool=True), 32),
    Case("timm-resnet-anti-aliasing-basic", partial(timm_resnet, aa_layer=BlurPool2d), 64),
    Case("timm-resnet-anti-aliasing-bottleneck", partial(timm_resnet, Bottleneck, aa_layer=BlurPool2d), 64),
    Case(
        "timm-resnet-squeeze-excitation",
        partial(timm_resnet, block_args={"attn_layer": "se"}),
        32,
    ),
    Case("timm-resnext", partial(timm_resnet, Bottleneck, cardinality=2, base_width=32), 32),
    Case("timm-resnet-silu-group-norm", partial(timm_resnet, act_layer="silu", norm_layer="groupnorm1"), 32),
    Case("timm-resnet-drop", partial(timm_resnet, drop_rate=0.3, drop_path_rate=0.3, drop_block_rate=0.3), 32),
    Case("cifar-resnet8", partial(CifarResNet, depth=8), 32),
    Case("cifar-resnet20", partial(CifarResNet, depth=20), 32),
    Case("timm-mobilenet", timm_mobilenet, 32),
    Case("timm-mobilenet-head", partial(timm_mobilenet, num_features=32), 32),
    Case("timm-mobilenet-skip", partial(timm_mobilenet, "ds", drop_rate=0.3, drop_path_rate=0.3), 32),
    Case("timm-mobilenet-squeeze-excitation", partial(timm_mobilenet, "ds", options="_se0.5"), 32),
    Case("timm-mobilenet-anti-aliasing", partial(timm_mobilenet, aa_layer="avg"), 32),
    Case("timm-mobilenetv1_100", partial(mobilenetv1_100, num_classes=5), 32),
    Case(
        "transformers-dinov2", partial(transformers_vit, Dinov2ForImageClassification, Dinov2Config, mlp_ratio=2), 16
    ),
    Case(
        "transformers-dinov2-registers",
        partial(
            transformers_vit,
            Dinov2WithRegistersForImageClassification,
            Dinov2WithRegistersConfig,
            mlp_ratio=2,
            num_register_tokens=3,
        ),
        16,
    ),
    Case("timm-vit-dinov2", partial(timm_vit, init_values=0.1, reg_tokens=4, no_embed_class=True), 16),
    Case("transformers-clip", partial(transformers_tower, CLIPForImageClassification, CLIPConfig), 16),
    Case("transformers-siglip", partial(transformers_tower, SiglipForImageClassification, SiglipConfig), 16),
    Case("timm-vit-clip", partial(timm_vit, pre_norm=True, act_layer="quick_gelu"), 16),
    Case(
        "timm-vit-siglip",
        partial(timm_vit, class_token=False, global_pool="map", act_layer="gelu_tanh"),
        16,
    ),
    Case("transformers-beit", partial(transformers_vit, BeitForImageClassification, BeitConfig), 16),
    Case(
        "transformers-beit-position-biases",
        partial(
            transformers_vit,
            BeitForImageClassification,
            BeitConfig,
            use_relative_position_bias=True,
            use_shared_relative_position_bias=True,
            use_absolute_position_embeddings=True,
            use_mean_pooling=False,
            layer_scale_init_value=0.0,
        ),
        16,
    ),
    Case("timm-beit", partial(timm_vit, Beit, qkv_bias=True, init_values=0.1, use_rel_pos_bias=True), 16),
    Case("timm-beit-shared-bias", partial(timm_vit, Beit, use_abs_pos_emb=False, use_shared_rel_pos_bias=True), 16),
    Case("transformers-swin", transformers_swin, 16),
    Case("transformers-swin-padded", partial(transformers_swin, 20, use_absolute_embeddings=True), 20),
    Case("transformers-swin-odd", partial(transformers_swin, 18, window_size=3, qkv_bias=False), 18),
    Case("transformers-swin-other-size", transformers_swin, 22),  # than in its configuration
    Case("timm-swin", timm_swin, 16),
    Case("timm-swin-padded", partial(timm_swin, 20), 20),
    Case("timm-swin-dynamic-size", partial(timm_swin, strict_img_size=False), 22),
    Case("timm-swin-always-partition", partial(timm_swin, 20, always_partition=True, window_size=3), 20),
    Case("transformers-convnext", partial(transformers_convnext, ConvNextForImageClassification, ConvNextConfig), 32),
    Case(
        "transformers-convnext-no-scale",
        partial(transformers_convnext, ConvNextForImageClassification, ConvNextConfig, layer_scale_init_value=0.0),
        32,
    ),
    Case(
        "transformers-convnextv2",
        partial(transformers_convnext, ConvNextV2ForImageClassification, ConvNextV2Config),
        32,
    ),
    Case("timm-convnext", timm_convnext, 64),
    Case("timm-convnext-convolutions", partial(timm_convnext, conv_mlp=True, stem_type="overlap_tiered"), 64),
    Case("timm-convnextv2", partial(timm_convnext, use_grn=True, ls_init_value=None, head_norm_first=True), 64),
]

BY_NAME = {case.name: case for case in CASES}

REPRESENTATIVES = {
    *("transformers-vit", "timm-vit", "transformers-dinov2", "transformers-clip", "timm-vit-siglip", "timm-beit"),
    *("transformers-swin", "transformers-convnext", "timm-resnet-basic", "cifar-resnet8", "timm-mobilenet-skip"),
}
"""One variant of each family."""


def variants(names: Iterable[str] = BY_NAME) -> list:
    """Names of cases as parameters of a test: those that represent no family are for ``make test-all``."""
    return rest_slow(names, REPRESENTATIVES)
