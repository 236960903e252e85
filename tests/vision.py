"""Tiny random models of transformers and timm that are no classifiers, in folders as their libraries write them."""

from pathlib import Path
from typing import Any

import timm
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = SIZES | {"image_size": 16, "patch_size": 8}
DINO = {name: value for name, value in VISION.items() if name != "intermediate_size"}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 12}
WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "of", "picture", "the", ".", *"0123456789", "cat", "dog"]


def _resnet() -> Any:
    widths = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    return tf.ResNetConfig(**widths, layer_type="basic", out_features=["stage4"])


def _clip() -> Any:
    text = TEXT | {"eos_token_id": 2}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def _detr() -> Any:
    small = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {"d_model": 16, "num_queries": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = tf.DetrConfig(backbone_config=_resnet(), use_timm_backbone=False, backbone=None, **small, **heads)
    return tf.DetrForObjectDetection(config)


def _depth() -> Any:
    backbone = tf.Dinov2Config(
        **DINO | {"num_hidden_layers": 4, "image_size": 28, "patch_size": 14},
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    widths = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 8}
    config = tf.DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16, patch_size=14, **widths)
    return tf.DepthAnythingForDepthEstimation(config)


def _sam() -> Any:
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 16}
    vision |= {"image_size": 64, "patch_size": 16, "global_attn_indexes": [1], "window_size": 2}
    decoder = {"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 1, "iou_head_hidden_dim": 8}
    prompts = {"hidden_size": 8, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    config = tf.SamConfig(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompts)
    return tf.SamModel(config)


def _segformer() -> Any:
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
    )  # fmt: skip
    return tf.SegformerForSemanticSegmentation(config)


def _square(size: int, kind: Any = tf.ViTImageProcessor, **more: Any) -> Any:
    return kind(size={"height": size, "width": size}, **more)


MODELS: dict[str, tuple[Any, Any, str]] = {
    "vit": (lambda: tf.ViTModel(tf.ViTConfig(**VISION)), _square(16), "image-feature-extraction"),
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(**DINO)), _square(16), "image-feature-extraction"),
    "dinov3": (lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**VISION)), _square(16), "image-feature-extraction"),
    "mae": (lambda: tf.ViTMAEModel(tf.ViTMAEConfig(**VISION)), _square(16), "image-feature-extraction"),
    "backbone": (
        lambda: tf.Dinov2Backbone(tf.Dinov2Config(**DINO, out_indices=[1, 2])),
        _square(16), "image-feature-extraction",
    ),
    "resnet": (lambda: tf.ResNetModel(_resnet()), _square(32), "image-feature-extraction"),
    "clip vision": (
        lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION)), _square(16), "image-feature-extraction",
    ),
    "clip": (
        _clip, _square(16, tf.CLIPImageProcessor, crop_size=16), "zero-shot-image-classification",
    ),
    "siglip": (
        lambda: tf.SiglipModel(tf.SiglipConfig(text_config=TEXT, vision_config=VISION)),
        _square(16, tf.SiglipImageProcessor), "zero-shot-image-classification",
    ),
    "segformer": (_segformer, _square(32, tf.SegformerImageProcessor), "image-segmentation"),
    "detr": (_detr, tf.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}), "object-detection"),
    "depth": (
        _depth, _square(28, tf.DPTImageProcessor, keep_aspect_ratio=True, ensure_multiple_of=14), "depth-estimation",
    ),
    "sam": (
        _sam, tf.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}), "mask-generation",
    ),
}  # fmt: skip
"""How each is built, its image processor, and what the Hub calls its task."""


def save_model(name: str, folder: Path) -> Path:
    """One of :data:`MODELS`, with a tokenizer where it has a tower for text."""
    build, processor, _ = MODELS[name]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros and ones that make parts of it idle
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if name in ("clip", "siglip"):
        word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer() -> Any:
    """A tokenizer of whole words that begins and ends texts as CLIP's does."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, WORDS.index(word)) for word in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=12, **special)


def save_headless_timm(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder
