"""Attention maps against transformers' own, timm's own, and rollout by its definition."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BY_NAME, variants
from embedded import DIGITS, RESNET, VIT
from PIL import Image
from quick import slow
from torch import Tensor, nn
from transformers import PreTrainedModel

from snows_hf import attention, load
from snows_hf.adapters import build_chain, frozen
from snows_hf.adapters.attention import recorded_attention
from snows_hf.errors import AdapterError, ConfigError, SaveError
from snows_hf.jobs.attention import attention_maps, displayable, patch_grid, similarity


WHOLE = [name for name in BY_NAME if any(word in name for word in ("vit", "deit", "dinov2", "clip", "siglip", "beit"))]


def recorded(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad(), frozen(model), recorded_attention() as record:
        build_chain(model, images[:1]).logits(images)
    return record


@pytest.mark.parametrize("name", variants(WHOLE))
def test_probabilities_are_the_models_own(name: str) -> None:
    case = BY_NAME[name]
    model, images = case.model(torch.float64), case.images(2, torch.float64)
    record = recorded(model, images)
    for weights in record:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    expected: list[Tensor] = []
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            expected = list(model(images, output_attentions=True).attentions)
    else:
        for module in model.blocks.modules():
            if hasattr(module, "attn_drop"):
                module.fused_attn = False
                module.attn_drop.register_forward_hook(lambda m, args, output: expected.append(output))
        with torch.no_grad():
            model(images)
    assert len(record) == len(expected) == 2
    for got, own in zip(record, expected, strict=True):
        torch.testing.assert_close(got, own)


def test_nothing_is_recorded_outside_the_block() -> None:
    case = BY_NAME["timm-vit"]
    record = recorded(case.model(), case.images())
    with recorded_attention() as inner:
        pass
    build_chain(case.model()).logits(case.images())
    assert (len(record), len(inner)) == (2, 0)


@pytest.mark.parametrize(
    "name, extra, class_token",
    [
        ("transformers-vit", 1, True),
        ("transformers-deit", 2, True),
        slow(("transformers-beit", 1, True)),
        ("timm-beit", 1, True),
        slow(("timm-deit-distilled", 2, True)),
        slow(("timm-vit-registers", 3, True)),
        ("timm-vit-registers-no-class", 4, False),
        slow(("timm-vit-average", 0, False)),
        ("timm-vit-map", 0, False),
        slow(("timm-vit-dynamic-size", 1, True)),
        ("transformers-dinov2-registers", 4, True),
        slow(("transformers-siglip", 0, False)),
        ("transformers-clip", 1, True),
    ],
)
def test_maps_by_their_definition(name: str, extra: int, class_token: bool) -> None:
    """From the class token to the patches, or else from patch to patch: registers neither look nor are looked at."""
    case = BY_NAME[name]
    model, images = case.model(torch.float64), case.images(2, torch.float64)
    maps = attention_maps(build_chain(model, images[:1]), images)
    side = case.size // 4
    for i in range(2):
        rollout = np.eye(side * side + extra)
        for weights in recorded(model, images[i : i + 1]):
            mixed = 0.5 * weights[0].mean(0).numpy() + 0.5 * np.eye(len(rollout))
            mixed /= mixed.sum(1, keepdims=True)
            rollout = mixed @ rollout
        last = weights[0].mean(0).numpy()
        for got, matrix in ((maps.last, last), (maps.rollout, rollout)):
            looking = matrix[0] if class_token else matrix[extra:].mean(0)
            expected = looking[extra:].reshape(side, side)
            np.testing.assert_allclose(got[i].numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar-resnet8", "no attention"),
        slow(("timm-convnext", "no attention")),
        ("timm-swin", "windows"),
        slow(("transformers-swin", "windows")),
    ],
)
def test_models_without_such_attention_are_refused(name: str, words: str) -> None:
    case = BY_NAME[name]
    with pytest.raises(AdapterError, match=words):
        attention_maps(build_chain(case.model()), case.images())


def test_a_model_without_a_head_has_the_maps_of_the_one_with_it() -> None:
    case = BY_NAME["transformers-dinov2"]
    whole, images = case.model(torch.float64), case.images(2, torch.float64)
    ours, theirs = (attention_maps(build_chain(model, images[:1]), images) for model in (whole.dinov2, whole))
    torch.testing.assert_close(ours, theirs)


def test_tokens_that_are_no_patches_are_refused() -> None:
    with pytest.raises(AdapterError, match="no patches"):
        patch_grid(nn.Sequential(nn.Conv2d(3, 5, 4, stride=4)), torch.empty(1, 3, 16, 16), 15)
    assert patch_grid(nn.Sequential(nn.Conv2d(3, 5, 4, stride=4)), torch.empty(1, 3, 8, 16), 9) == (2, 4)


def test_similarity_against_numpy() -> None:
    a, b = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    correlation, cosine = similarity(a, b)
    for i in range(3):
        x, y = a[i].flatten().numpy(), b[i].flatten().numpy()
        assert float(correlation[i]) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
        assert float(cosine[i]) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
    assert similarity(a, torch.ones_like(a))[0].abs().max() == 0


def test_images_are_shown_as_they_are() -> None:
    preprocess = load(str(VIT)).preprocess
    side = preprocess([Image.new("RGB", (8, 8))]).shape[-1]
    picture = Image.effect_noise((side, side), 90).convert("RGB")
    shown = displayable(preprocess([picture]), preprocess)
    torch.testing.assert_close(255 * shown[0], torch.from_numpy(np.array(picture)).float(), atol=0.01, rtol=0)


def test_bad_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(output: str = "a.png", model: Path = VIT, **settings: int) -> None:
        attention([str(model)], str(DIGITS), output=tmp_path / output, samples=2, **settings)

    (tmp_path / "there.png").touch()
    with pytest.raises(SaveError, match="exists"):
        ask("there.png")
    with pytest.raises(SaveError, match="folder"):
        ask("no/a.png")
    with pytest.raises(ConfigError, match=r"\.png"):
        ask("a.pdf")
    with pytest.raises(ConfigError, match="images = 0: expected at least 1"):
        ask(images=0)
    with pytest.raises(AdapterError, match="no attention"):
        ask(model=RESNET)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"snows-hf\[viz\]"):
        ask()
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]
