"""Images of another size than a model's configuration has, on the command line: run, or refused in one message."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from cases import BY_NAME, randomised
from embedded import DIGITS, VIT, copy_of, edit_config, tensors_of, write_tensors


VIT_ARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN_ARGS = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}


def transformers_checkpoint(name: str, size: int) -> Path:
    """A case's network, and a preprocessor that makes images of this size."""
    folder = Path(name)
    randomised(BY_NAME[name].make()).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((VIT / "preprocessor_config.json").read_bytes())
    return edit_config(folder, "preprocessor_config.json", size={"height": size, "width": size})


def timm_checkpoint(architecture: str, size: int, arguments: dict[str, Any]) -> Path:
    folder = Path(architecture)
    folder.mkdir()
    model = timm.create_model(architecture, num_classes=5, **arguments)
    write_tensors(folder, randomised(model).state_dict())
    about = {"input_size": [3, size, size], "num_classes": 5, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
    config = {"architecture": architecture, "num_classes": 5, "model_args": arguments, "pretrained_cfg": about}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def commands(model: Path) -> list[tuple[object, ...]]:
    given = ("--data", DIGITS, "--samples", 8)
    return [
        ("prune", model, "--pattern", "2:4", *given, "--k", 1, "--output", "out"),
        ("sensitivity", model, "--patterns", "2:4", *given, "--repair-steps", 0),
        ("attention", model, *given, "--images", 1, "--output", "maps.png"),
    ]


def check_refused(run, model: Path, words: str) -> None:
    for command in commands(model):
        result = run(*command, "--quiet")
        assert (result.code, result.out) == (1, ""), command
        assert result.err.startswith("Error: ") and words in result.err and "Traceback" not in result.err
    assert not Path("out").exists() and not Path("maps.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "windows"),
    [
        (lambda: transformers_checkpoint("transformers-swin", 22), True),
        (lambda: timm_checkpoint("swin_tiny_patch4_window7_224", 22, SWIN_ARGS | {"strict_img_size": False}), True),
        (lambda: transformers_checkpoint("transformers-dinov2", 24), False),
        (lambda: timm_checkpoint("vit_tiny_patch16_224", 24, VIT_ARGS | {"dynamic_img_size": True}), False),
    ],
    ids=["transformers-swin", "timm-swin", "transformers-dinov2", "timm-vit"],
)
def test_models_that_take_any_size(run, make, windows: bool) -> None:
    model = make()
    before = tensors_of(model)
    pruning, measuring, drawing = commands(model)
    result = run(*pruning, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["pattern"] == "2:4" and tensors_of(Path("out")).keys() == before.keys()
    result = run(*measuring, "--json")
    assert result.code == 0, result.err
    assert all(layer["candidates"][0]["loss"] > 0 for layer in json.loads(result.out)["layers"])
    result = run(*drawing, "--json")
    if windows:
        assert result.code == 1 and "attends within windows" in result.err
    else:
        assert result.code == 0 and json.loads(result.out)["patches"] == [6, 6]


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers_checkpoint("transformers-vit", 24),
        lambda: transformers_checkpoint("transformers-deit", 24),
        lambda: transformers_checkpoint("transformers-swin-padded", 24),
        lambda: timm_checkpoint("vit_tiny_patch16_224", 24, VIT_ARGS),
        lambda: timm_checkpoint("swin_tiny_patch4_window7_224", 24, SWIN_ARGS),
        lambda: timm_checkpoint("beit_base_patch16_224", 24, VIT_ARGS),
    ],
    ids=["transformers-vit", "transformers-deit", "transformers-swin", "timm-vit", "timm-swin", "timm-beit"],
)
def test_models_that_take_one_size(run, make) -> None:
    check_refused(run, make(), "cannot take an image that is prepared as its configuration says")


@pytest.mark.slow
def test_position_biases_of_another_size(run) -> None:
    model = transformers_checkpoint("transformers-beit-position-biases", 24)
    pruning, *_ = commands(edit_config(model, use_absolute_position_embeddings=False))
    assert run(*pruning).code == 0


def test_images_that_are_not_resized(run) -> None:
    """Only they have the size that a model must take: a blank one says nothing."""
    model = edit_config(copy_of(VIT, Path("own")), "preprocessor_config.json", do_resize=False)
    check_refused(
        run,
        model,
        "cannot be traced on images of (3, 8, 8): ValueError: Input image size (8*8)",
    )
