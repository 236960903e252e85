"""``prune --allow-custom``: smaller networks that no configuration describes, and only this package loads."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from embedded import DIGITS, copy_of, edit_config, tensors_of, write_tensors
from quick import rest_slow
from torch import nn

import snows_hf
from snows_hf.adapters import build_chain
from snows_hf.adapters.outputs import outputs_of
from snows_hf.adapters.widths import widths_of
from snows_hf.errors import ConfigError
from snows_hf.hub.custom import narrow


CALIBRATION = ("--data", DIGITS, "--samples", 24, "--k", 1)
ALONE = ("--set", "units=magnitude", "--set", "repair=false", "--no-update", "--allow-custom")
SIZES: dict[str, Any] = {"hidden_sizes": [16, 32], "num_labels": 10, "embedding_size": 8, "depths": [2, 1]}


def trained(model: Any) -> Any:
    """Random norms and biases, no two entries of which are the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith(("weight", "var")) else -0.5))
    return model


def timm_folder(folder: Path, architecture: str) -> Path:
    torch.manual_seed(0)
    model = trained(timm.create_model(architecture, num_classes=10))
    model.pretrained_cfg |= {"input_size": (3, 32, 32)}
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def transformers_folder(folder: Path, model: Any) -> Path:
    trained(model).save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def resnet(folder: Path) -> Path:
    config = tf.ResNetConfig(**SIZES, layer_type="bottleneck")
    return transformers_folder(folder, tf.ResNetForImageClassification(config))


def convnext(folder: Path) -> Path:
    config = tf.ConvNextConfig(
        hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=10, layer_scale_init_value=1.0
    )
    return transformers_folder(folder, tf.ConvNextForImageClassification(config))


def vit(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = tf.ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=10)
    return transformers_folder(folder, tf.ViTForImageClassification(config))


def timm_vit(folder: Path) -> Path:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 4}
    model = trained(timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes))
    timm.models.save_for_hf(model, str(folder), model_args=sizes, safe_serialization=True)
    return folder


MODELS: dict[str, tuple[Callable[[Path], Path], str, tuple[object, ...]]] = {
    "EfficientNet": (lambda folder: timm_folder(folder, "test_efficientnet"), "channels:0.25", ()),
    "MobileNetV3": (lambda folder: timm_folder(folder, "mobilenetv3_small_050"), "channels:0.5", ()),
    "ResNet": (resnet, "channels:0.5", ()),
    "ConvNeXt": (convnext, "mlp:0.5", ()),
    "one block of a ViT": (vit, "mlp:0.5+heads:0.5", ("--layers", "vit.layers.0.*")),
    "timm's heads": (timm_vit, "heads:0.25", ()),
}


@torch.no_grad()
def masked(folder: Path, units: dict[str, Any], smaller: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of the whole model, in float64, whose layers do not read the units that are gone: by the entries that a
    norm or a bias has for them."""
    model: Any = snows_hf.load(folder).model.double()
    own, left = model.state_dict(), smaller.state_dict()
    for width in widths_of(build_chain(model, pixels[:1])):
        if width.name in units and width.kind == units[width.name]["kind"]:
            slot = next(slot for slot in width.along if own[slot.name].dim() == 1)
            there = torch.isin(own[slot.name], left[slot.name])[slot.offset :][: width.units * slot.each]
            for reader in width.readers:
                model.get_parameter(reader.name)[:, ~there.repeat_interleave(reader.each // slot.each)] = 0
    return outputs_of(model, pixels)["logits"]


QUICK = {"ResNet", "timm's heads"}


@pytest.mark.parametrize("name", rest_slow(MODELS, QUICK))
def test_it_is_made_saved_and_loaded(run, tmp_path: Path, name: str) -> None:
    build, pattern, options = MODELS[name]
    folder = build(tmp_path / "model")
    refused = run("prune", folder, "--pattern", pattern, *CALIBRATION, *options, "--output", "refused")
    assert refused.code == 1 and "--allow-custom" in refused.err and not Path("refused").exists()

    given = ("prune", folder, "--pattern", pattern, *CALIBRATION, *options, *ALONE, "--output", "out", "--json")
    made = run(*given)
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert json.loads(Path("out/config.json").read_text())["snows"]["custom"] is True
    checkpoint = snows_hf.from_pretrained("out")
    assert checkpoint.custom and type(checkpoint.model) is type(snows_hf.load(folder).model)
    assert report["parameters"]["total"] == sum(p.numel() for p in checkpoint.model.parameters())
    assert report["parameters"]["total"] < report["parameters"]["dense"]
    found = json.loads(run("inspect", "out", "--json").out)
    assert found["parameters"] == report["parameters"]["total"]

    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = outputs_of(checkpoint.model.double(), pixels)["logits"]
    expected = masked(folder, report["units"], checkpoint.model, pixels)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What ``prune`` makes of one model of each library, in folders ``out`` beside ``model``."""
    made = {}
    for library, name in (("timm", "EfficientNet"), ("transformers", "ResNet")):
        build, pattern, _ = MODELS[name]
        home = tmp_path_factory.mktemp(library)
        model = build(home / "model")
        given: dict[str, Any] = {"data": str(DIGITS), "samples": 24, "k": 1, "update": False, "allow_custom": True}
        snows_hf.prune(model, pattern, output=home / "out", eval_data=str(DIGITS), **given)
        made[library] = home / "out"
    return made


def test_stock_loaders_fail_loudly(results: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(f"local-dir:{results['timm']}", pretrained=True)
    for folder in results.values():
        with pytest.raises(RuntimeError, match="mismatch"):
            tf.AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(RuntimeError, match="mismatch"):
        tf.AutoModel.from_pretrained(results["transformers"])


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_card_says_how_to_load_it(library: str, results: dict[str, Path]) -> None:
    card = (results[library] / "README.md").read_text()
    assert "**Only snows-hf loads it**" in card and "ordinary checkpoint" not in card
    assert "library_name" not in card and "stock libraries" not in card
    (snippet,) = re.findall("```python\n(import snows_hf\n.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(snippet.replace("THIS_FOLDER", str(results[library])), found)
    assert found["model"](found["checkpoint"].image()) is not None


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_every_command_takes_it(run, library: str, results: dict[str, Path]) -> None:
    folder, dense = results[library], results[library].parent / "model"
    report = json.loads((folder / "snows_config.json").read_text())
    assert report["custom"] is True
    data = ("--data", DIGITS)
    assert json.loads(run("eval", folder, *data, "--json", "--confusions").out) == report["pruned"]
    for command in (
        ("eval", folder, *data, "--split", "test", "--reference", dense),
        ("eval", folder, *data, "--split", "test", "--reference", dense),
        ("bench", folder, "--dense", dense, "--dtype", "float32", "--batch-sizes", 1),
        ("report", folder, "--output", "page", "--dense", dense),
        ("compare", folder, folder, "--output", "compare.html"),
        ("probe", dense, folder, *data, "--samples", 40),
        ("sensitivity", folder, *data, "--samples", 8, "--patterns", "2:4"),
        ("finetune", folder, *data, "--samples", 16, "--epochs", 1, "--output", "finetuned"),
        ("prune", folder, "--pattern", "2:4", *CALIBRATION, "--no-update", "--output", "zeros"),
        ("prune", folder, "--pattern", "channels:0.5", *CALIBRATION, *ALONE, "--output", "again"),
        ("pack", "zeros", "packed"),
        ("unpack", "packed", "unpacked"),
    ):
        done = run(*command)
        assert done.code == 0, (command, done.err)
    for other in ("finetuned", "zeros", "again", "packed", "unpacked"):
        assert snows_hf.from_pretrained(other).custom, other
        assert "**Only snows-hf loads it**" in Path(other, "README.md").read_text(), other
    assert "only snows-hf loads it, unpacked" in Path("packed/README.md").read_text()
    zeros, unpacked = tensors_of(Path("zeros")), snows_hf.from_pretrained("packed").model.state_dict()
    assert sum(t.sum() for t in zeros.values()) == pytest.approx(float(sum(t.sum() for t in unpacked.values())))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_what_is_no_narrower_model_is_refused(run, tmp_path: Path, library: str, results: dict[str, Path]) -> None:
    own = tensors_of(results[library])
    module = {"timm": "blocks.0.0.bn1", "transformers": "resnet.embedder.embedder.normalization"}[library]
    name = f"{module}.weight"
    wrong = {
        "narrower shape": own | {name: torch.ones(4096)},
        "of different sizes": own | {name: own[name][:-1].clone()},
        "": {key: tensor for key, tensor in own.items() if key != name},
    }
    for i, (message, tensors) in enumerate(wrong.items()):
        folder = write_tensors(copy_of(results[library], tmp_path / str(i)), tensors)
        done = run("inspect", folder)
        assert done.code == 1 and message in done.err and module in done.err and str(folder) in done.err
        assert "Traceback" not in done.err
    folder = edit_config(copy_of(results[library], tmp_path / "unsaid"), snows={})
    done = run("inspect", folder)
    assert done.code == 1 and "Traceback" not in done.err


def test_modules_that_cannot_be_narrowed_are_refused() -> None:
    grouped = nn.Conv2d(8, 8, 3, groups=2)
    with pytest.raises(ConfigError, match="weight: a Conv2d of several groups cannot be narrowed"):
        narrow(grouped, {"weight": torch.Size((4, 4, 3, 3))})
    with pytest.raises(ConfigError, match="weight: a LayerNorm cannot be narrowed"):
        narrow(nn.LayerNorm(8), {"weight": torch.Size((4,))})
    with pytest.raises(ConfigError, match="no such tensor"):
        narrow(nn.Linear(8, 8), {"scale": torch.Size((4,))})
    attention = timm.layers.Attention(16, num_heads=4, qkv_bias=True)
    with pytest.raises(ConfigError, match="not those of whole heads"):
        narrow(attention, {"qkv.weight": torch.Size((42, 16)), "qkv.bias": torch.Size((42,))})
    assert grouped.weight.shape == (8, 4, 3, 3)
