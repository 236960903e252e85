"""Which structures of which family are cut to an ordinary checkpoint: small models with random weights, pruned, and
loaded by stock libraries in a process in which this package cannot be imported.

    python benchmarks/stock_load.py [--only GLOB] [--log LOG.jsonl]

Prints the table of docs/structured.md. A cell names what of the configuration says the new widths, once stock
transformers or timm has computed the logits that this package does, bit for bit; or how it was refused.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import snows_hf
from snows_hf.adapters.outputs import outputs_of
from snows_hf.errors import SnowsError


SHARES = {"mlp": 0.5, "heads": 0.5, "ranks": 0.5, "channels": 0.5}
IMAGE = 32
DIGITS = Path(snows_hf.__file__).parent / "embedded" / "digits"
ALONE: dict[str, Any] = {"samples": 4, "units": "magnitude", "repair": False, "update": False}

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 10}
SIZES |= {"image_size": IMAGE, "patch_size": 8}
VIT = SIZES | {"intermediate_size": 64}
STAGES: dict[str, Any] = {"image_size": IMAGE, "num_labels": 10, "depths": [1, 1], "embed_dim": 16}
SWIN = STAGES | {"patch_size": 4, "window_size": 4, "num_heads": [2, 4]}
HIERA = STAGES | {"image_size": [IMAGE, IMAGE], "patch_size": [7, 7], "num_heads": [2, 4]}
HIERA |= {"masked_unit_size": [4, 4], "masked_unit_attention": [True, False]}
HIERA |= {"query_stride": [2, 2], "num_query_pool": 1}
CONVOLUTIONS: dict[str, Any] = {"num_labels": 10, "depths": [1, 1], "hidden_sizes": [16, 32]}
TIMM_VIT: dict[str, Any] = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
TIMM_SWIN: dict[str, Any] = {"img_size": IMAGE, "window_size": 4, "embed_dim": 16, "depths": (1, 1)}
TIMM_SWIN |= {"num_heads": (2, 4)}


def of_transformers(name: str, **config: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        kind: Any = getattr(tf, name)
        trained(kind(kind.config_class(**config))).save_pretrained(folder)
        tf.ViTImageProcessor(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)

    return save


def of_tower(kind: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        vision = {name: value for name, value in VIT.items() if name != "num_labels"}
        trained(kind(kind.config_class(vision_config=vision, num_labels=10))).save_pretrained(folder)
        tf.ViTImageProcessor(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)

    return save


def of_timm(architecture: str, **arguments: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        model: Any = trained(timm.create_model(architecture, num_classes=10, **arguments))
        size = arguments.get("img_size", 2 * IMAGE)  # of convolutions whose last images would be of one pixel
        model.pretrained_cfg |= {"input_size": (3, size, size)}
        timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)

    return save


TRANSFORMERS: dict[str, Callable[[Path], None]] = {
    "ViT": of_transformers("ViTForImageClassification", **VIT),
    "DeiT": of_transformers("DeiTForImageClassification", **VIT),
    "BEiT": of_transformers("BeitForImageClassification", **VIT),
    "BEiT, tables of positions": of_transformers("BeitForImageClassification", **VIT, use_relative_position_bias=True),
    "BEiT, one table for all blocks": of_transformers(
        "BeitForImageClassification", **VIT, use_shared_relative_position_bias=True
    ),
    "ViT-MSN": of_transformers("ViTMSNForImageClassification", **VIT),
    "I-JEPA": of_transformers("IJepaForImageClassification", **VIT),
    "DINOv2": of_transformers("Dinov2ForImageClassification", **SIZES, mlp_ratio=2),
    "DINOv2, SwiGLU": of_transformers(
        "Dinov2ForImageClassification", **SIZES | {"hidden_size": 48}, mlp_ratio=4, use_swiglu_ffn=True
    ),
    "DINOv2 with registers": of_transformers("Dinov2WithRegistersForImageClassification", **SIZES, mlp_ratio=2),
    "DINOv3": of_transformers("DINOv3ViTModel", **VIT),
    "DINOv3, SwiGLU": of_transformers("DINOv3ViTModel", **VIT, use_gated_mlp=True),
    "AIMv2, SwiGLU": of_transformers("Aimv2VisionModel", **VIT),
    "CLIP": of_tower(tf.CLIPForImageClassification),
    "SigLIP": of_tower(tf.SiglipForImageClassification),
    "SigLIP, vision tower": of_transformers("SiglipVisionModel", **VIT),
    "Swin": of_transformers("SwinForImageClassification", **SWIN),
    "Swin v2": of_transformers("Swinv2ForImageClassification", **SWIN),
    "Hiera": of_transformers("HieraForImageClassification", **HIERA),
    "ResNet of bottlenecks": of_transformers("ResNetForImageClassification", **CONVOLUTIONS, embedding_size=16),
    "ConvNeXt": of_transformers("ConvNextForImageClassification", **CONVOLUTIONS, num_stages=2),
}
TIMM: dict[str, Callable[[Path], None]] = {
    "ViT": of_timm("vit_tiny_patch16_224", **TIMM_VIT),
    "ViT, packed SwiGLU": of_timm("vit_giant_patch14_reg4_dinov2", **TIMM_VIT, mlp_ratio=4.0),
    "DeiT": of_timm("deit_tiny_distilled_patch16_224", **TIMM_VIT),
    "BEiT": of_timm("beit_base_patch16_224", **TIMM_VIT),
    "EVA": of_timm("vit_small_patch16_dinov3", **TIMM_VIT),
    "EVA-02, SwiGLU": of_timm("eva02_tiny_patch14_224", **TIMM_VIT, mlp_ratio=4.0),
    "EVA, SwiGLU in multiples of 8": of_timm("vit_small_plus_patch16_dinov3", **TIMM_VIT),
    "EVA, grouped queries": of_timm("vit_base_patch16_sapiens2", **TIMM_VIT, num_kv_heads=2, dynamic_img_size=False),
    "AIMv2, SwiGLU": of_timm("aimv2_large_patch14_224", **TIMM_VIT),
    "Swin": of_timm("swin_tiny_patch4_window7_224", **TIMM_SWIN),
    "Swin v2": of_timm("swinv2_tiny_window8_256", **TIMM_SWIN),
    "gMixer, packed GLU": of_timm("gmixer_12_224", img_size=IMAGE),
    "ResNet of bottlenecks": of_timm("resnet26"),
    "ResNet of basic blocks": of_timm("resnet18"),
    "CIFAR ResNet, this package's": of_timm("resnet20_cifar"),
    "ConvNeXt": of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "EfficientNet": of_timm("test_efficientnet"),
    "MobileNetV3": of_timm("mobilenetv3_small_050"),
}
FAMILIES = {f"transformers: {name}": save for name, save in TRANSFORMERS.items()}
FAMILIES |= {f"timm: {name}": save for name, save in TIMM.items()}

STOCK = """
import sys
sys.modules["snows_hf"] = None
import timm, torch, transformers as tf
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    pixels = load_file(f"{folder}/pixels.safetensors")["pixels"]
    if "architectures" in __import__("json").load(open(f"{folder}/config.json")):
        config = tf.AutoConfig.from_pretrained(folder)
        model = getattr(tf, config.architectures[0]).from_pretrained(folder).eval()
    else:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        found = model(pixels)
    if not isinstance(found, torch.Tensor):
        found = found.logits if "logits" in found else found[0]
    save_file({"found": found.contiguous()}, f"{folder}/stock.safetensors")
"""


def trained(model: nn.Module) -> nn.Module:
    """Random norms, biases and tables, as of a model that has been trained: no entry makes a part idle."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and name in model.state_dict():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if name.endswith(("norm.weight", "var")) else tensor + 0.1 * noise)
    return model


def measured(name: str, structure: str, source: Path, folder: Path) -> dict[str, Any]:
    """What becomes of a structure of a model: the fields that say its new widths, or why it is refused."""
    pattern = f"{structure}:{SHARES[structure]}"
    facts = {"family": name, "structure": structure}
    given = {"data": DIGITS, "output": folder, **ALONE}
    try:
        snows_hf.prune(source, pattern, **given)
    except SnowsError as error:
        facts["refusal"] = str(error)
        if "--allow-custom" not in str(error):
            return facts
        try:
            snows_hf.prune(source, pattern, allow_custom=True, **given)
        except SnowsError as custom:
            return facts | {"custom": str(custom)}
        return facts | {"custom": True}
    loaded = snows_hf.load(folder)
    pixels = torch.randn(3, *loaded.image().shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = outputs_of(loaded.model, pixels)
    expected = found.get("logits", next(iter(found.values())))
    save_file({"pixels": pixels}, folder / "pixels.safetensors")
    save_file({"expected": expected.contiguous()}, folder / "expected.safetensors")
    return facts | {"fields": said_otherwise(source, folder), "folder": str(folder)}


def said_otherwise(source: Path, folder: Path) -> dict[str, Any]:
    """Fields of config.json that are not what they were."""
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    changed = dict[str, Any]()
    for place in ("", "vision_config", "model_args"):
        old, new = (config.get(place, {}) if place else config for config in (before, after))
        changed |= {key: value for key, value in new.items() if value != old.get(key) and key not in AROUND}
    return changed


AROUND = ("snows", "model_args", "vision_config", "dtype", "transformers_version", "pretrained_cfg")


def stock_agrees(folders: list[Path]) -> dict[str, bool]:
    """Whether stock libraries, in a process without this package, find the same bits in each folder."""
    subprocess.run([sys.executable, "-c", STOCK, *map(str, folders)], check=True)
    return {
        str(folder): torch.equal(
            load_file(folder / "stock.safetensors")["found"], load_file(folder / "expected.safetensors")["expected"]
        )
        for folder in folders
    }


def rows(facts: list[dict[str, Any]]) -> Iterator[str]:
    """A table in which families of a library with the same cells share a row."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for family in dict.fromkeys(fact["family"] for fact in facts):
        cells = {fact["structure"]: cell(fact) for fact in facts if fact["family"] == family}
        library, _, name = family.partition(": ")
        shared.setdefault((library, *(cells[structure] for structure in SHARES)), []).append(name)
    yield f"| family | {' | '.join(f'`{structure}`' for structure in SHARES)} |"
    yield f"|---|{len(SHARES) * '---|'}"
    for (library, *own), names in shared.items():
        yield f"| {library}: {'; '.join(names)} | {' | '.join(own)} |"


def cell(fact: dict[str, Any]) -> str:
    if "fields" in fact:
        fields = ", ".join(f"`{name}`" for name in fact["fields"])
        return fields if fact["stock"] else f"{fields}, for this package"
    if "custom" in fact:
        return "`--allow-custom`" if fact["custom"] is True else "refused"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="families, with wildcards")
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    facts = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as home:
        for number, (name, save) in enumerate(FAMILIES.items()):
            if not fnmatchcase(name, given.only):
                continue
            source = Path(home) / f"{number}"
            save(source)
            facts += [measured(name, structure, source, Path(home) / f"{number}-{structure}") for structure in SHARES]
        own = [fact for fact in facts if "folder" in fact and "this package" not in fact["family"]]
        agrees = stock_agrees([Path(fact["folder"]) for fact in own])
        facts = [fact | {"stock": agrees.get(fact.pop("folder", ""))} for fact in facts]
    if given.log:
        given.log.write_text("".join(f"{json.dumps(fact)}\n" for fact in facts))
    print("\n".join(rows(facts)))
    wrong = [fact for fact in facts if fact["stock"] is False]
    if wrong:
        sys.exit(f"Stock libraries compute something else: {wrong}")


if __name__ == "__main__":
    main()
