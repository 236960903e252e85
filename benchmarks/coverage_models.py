"""The models that benchmarks/coverage.py measures: one of each class, small, with random weights."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from snows_hf.adapters.base import example
from snows_hf.adapters.outputs import outputs_of


HEADLESS = """
    ViTModel Dinov2Model Dinov2WithRegistersModel DINOv3ViTModel DINOv3ConvNextModel SiglipVisionModel
    CLIPVisionModel CLIPVisionModelWithProjection ViTMAEModel ViTMSNModel IJepaModel BeitModel DeiTModel
    SwinModel Swinv2Model ConvNextModel ResNetModel HieraModel PvtModel Aimv2VisionModel MLCDVisionModel
    PixioModel Dinov2Backbone DINOv3ViTBackbone SwinBackbone ConvNextBackbone ResNetBackbone VitDetBackbone
    VitPoseBackbone
"""
TOWERS = """
    CLIPModel SiglipModel Siglip2Model MetaClip2Model AltCLIPModel ChineseCLIPModel AlignModel CLIPSegModel
"""
DENSE = """
    SegformerForSemanticSegmentation UperNetForSemanticSegmentation DPTForSemanticSegmentation
    DPTForDepthEstimation DepthAnythingForDepthEstimation GLPNForDepthEstimation ZoeDepthForDepthEstimation
    BeitForSemanticSegmentation MobileViTForSemanticSegmentation MobileNetV2ForSemanticSegmentation
    DetrForObjectDetection YolosForObjectDetection ConditionalDetrForObjectDetection
    DeformableDetrForObjectDetection RTDetrForObjectDetection SamModel SamVisionModel Sam2VisionModel
    MaskFormerForInstanceSegmentation Mask2FormerForUniversalSegmentation EomtForUniversalSegmentation
    Swin2SRForImageSuperResolution ViTForMaskedImageModeling VitPoseForPoseEstimation
    SuperPointForKeypointDetection
"""
TIMM_HEADLESS = """
    test_vit test_resnet test_convnext test_efficientnet
"""
WIDTHS = ("hidden_size", "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim")


@dataclass(frozen=True)
class Case:
    """A class to measure: its library or use, its name, the model that stands for it, and how many names of its
    library's registry are of this class."""

    kind: str
    name: str
    model: str
    names: int = 1


def cases() -> Iterator[Case]:
    yield from (Case("timm", name, min(own, key=weights), len(own)) for name, own in timm_classes().items())
    for names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        for name in [names] if isinstance(names, str) else names:
            yield Case("transformers", name, name)
    for kind, classes in (("headless", HEADLESS), ("two towers", TOWERS), ("dense", DENSE)):
        yield from (Case(kind, name, name) for name in classes.split())
    yield from (Case("headless", f"timm, num_classes=0: {name}", name) for name in TIMM_HEADLESS.split())


class _Class(Exception):  # noqa: N818
    """Of the model that timm was about to build."""


def timm_classes() -> dict[str, list[str]]:
    """The names of timm's models by their class."""

    def tell(cls: type, *_: Any, **__: Any) -> None:
        raise _Class(cls.__name__)

    found = defaultdict(list)
    with ExitStack() as stack:
        for name, module in sys.modules.copy().items():
            if name.startswith("timm.models.") and hasattr(module, "build_model_with_cfg"):
                stack.enter_context(patch.object(module, "build_model_with_cfg", tell))
        for name in timm.list_models():
            try:
                timm.create_model(name)
            except _Class as cls:
                found[str(cls)].append(name)
    return found


def weights(name: str) -> float:
    """How many a model of timm's has; infinitely many if it cannot be built without values."""
    with suppress(Exception), torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    return float("inf")


def build(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """The model in float64, and the options that it was built with."""
    torch.manual_seed(0)
    model, options = timm_model(case) if case.model in timm.list_models() else (transformers_model(case.model), {})
    return randomised(model), options


def timm_model(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    """Two blocks deep and on small images where the class lets us choose."""
    head = {"num_classes": 0} if case.kind == "headless" else {}
    for options in (
        {"img_size": 64, "depth": 2},
        {"img_size": 64, "num_blocks": 2},
        {"depth": 2},
        {"img_size": 64},
        {},
    ):
        with suppress(Exception):
            model = timm.create_model(case.model, **options, **head).eval()
            with torch.no_grad():
                model(image_of(model))
            return model, options | head
    return timm.create_model(case.model, **head), head


def transformers_model(name: str) -> nn.Module:
    """With narrow layers and small images where the class lets us."""
    cls = getattr(transformers, name)
    for narrow, small in ((True, True), (True, False), (False, True), (False, False)):
        with suppress(Exception):
            model = cls(configured(name, cls.config_class, narrow, small)).eval()
            with torch.no_grad():
                outputs_of(model, image_of(model))
            return model
    return cls(configured(name, cls.config_class, narrow=True, small=True))


def configured(name: str, config: type, narrow: bool, small: bool) -> Any:
    """A small configuration; of those that are nothing without a backbone's, with a small one of it."""
    if name.startswith(("DepthAnything", "ZoeDepth")):
        stages = [f"stage{i}" for i in (1, 2, 3, 4)]
        sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 4, "image_size": 56}
        backbone = transformers.Dinov2Config(**sizes, out_features=stages, reshape_hidden_states=False)
        return config(backbone_config=backbone, reassemble_hidden_size=96, neck_hidden_sizes=[16, 32, 64, 64])
    if name.startswith("VitPose"):
        sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": [64, 48]}
        return config(backbone_config=transformers.VitPoseBackboneConfig(**sizes, out_indices=[2]))
    if name == "TimmWrapperForImageClassification":
        return config(architecture="test_vit")
    if name.startswith("Perceiver"):
        return config(num_cross_attention_heads=1, num_self_attends_per_block=2, image_size=32)
    if "Detr" in name and not name.startswith("RT"):
        stages = [f"stage{i}" for i in ((2, 3, 4) if name.startswith("Deformable") else (4,))]
        backbone = transformers.ResNetConfig(depths=[1, 1, 1, 1], out_features=stages)
        sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
        return config(backbone_config=backbone, use_timm_backbone=False, **sizes)
    if name == "BeitForSemanticSegmentation":
        sizes = {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 384, "image_size": 64}
        return config(**sizes, out_indices=[1, 2, 3, 4])
    return smaller(config(), narrow, small)


def smaller(config: Any, narrow: bool, small: bool) -> Any:
    """A configuration, and those inside it, with fewer layers, smaller images, a small vocabulary, narrow layers."""
    changes: dict[str, Any] = {}
    many = 4 if hasattr(config, "backbone_out_indices") else 2
    patches = getattr(config, "patch_size", 16)
    pixels = 4 * patches if isinstance(patches, int) and patches > 8 else 64
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            changes[key] = smaller(value, narrow, small)
        elif key == "depths":
            changes[key] = [min(depth, 2) for depth in value]
        elif key == "hidden_sizes" and isinstance(value, tuple):  # to which a backbone adds a list
            changes[key] = list(value)
        elif key == "backbone_out_indices" and value:
            changes[key] = [0, 1, 2, 3]
        elif small and key == "image_size" and value:
            changes[key] = min(value, pixels) if isinstance(value, int) else [min(each, pixels) for each in value]
        elif isinstance(value, int):
            if key in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
                changes[key] = min(value, many)
            elif key == "num_blocks":  # of Eomt, from the end, that see the queries
                changes[key] = 1
            elif key == "num_queries":
                changes[key] = min(value, 20)
            elif key == "vocab_size":
                changes[key] = min(value, 2000)
            elif narrow and key in (
                "hidden_size",
                "intermediate_size",
                "encoder_ffn_dim",
                "decoder_ffn_dim",
                "mlp_dim",
            ):
                changes[key] = value // 8 if value >= 512 else value
    if "num_hidden_layers" not in changes and getattr(config, "out_features", None):
        changes["out_features"] = config.out_features
    return type(config)(**changes)


def image_of(model: nn.Module) -> Tensor:
    """A blank image of the size that the model says; of about 96 pixels where it takes any."""
    image = example(model)
    config = getattr(model, "config", None)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    vision = getattr(config, "vision_config", config)
    free = not cfg.get("fixed_input_size") if config is None else not hasattr(vision, "image_size")
    if not free or hasattr(model, "patch_embed"):
        return image
    patches = (getattr(module, "patch_size", None) for module in model.modules())
    patch_size = next((each if isinstance(each, int) else each[0] for each in patches if each), 16)
    size = max(96 // patch_size * patch_size, patch_size)
    return image[..., :size, :size]


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Evaluation mode, float64, and no part that says nothing: zero biases and scales, unit statistics of norms, which
    here are those of random images."""
    model = model.double().eval().requires_grad_()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        if parameter.dim() == 1:
            parameter.add_(0.2 * noise)
        elif parameter.dim() > 1 and name.endswith("weight"):
            parameter.copy_(noise * (2 / parameter[0].numel()) ** 0.5)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the plain mean
    if norms:
        outputs_of(model, torch.randn(4, *image_of(model).shape[1:], dtype=torch.float64))
    return model.eval()
