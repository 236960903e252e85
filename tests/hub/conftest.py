"""Checkpoints pruned once for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import timm
import torch
from embedded import DIGITS, RESNET, VIT, Pruned, pruned
from quick import slow


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def save_tiny_timm(folder: Path) -> Path:
    """A timm ViT with random weights on images 16 x 16, with everything that a config.json of timm may say."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    config = {"label_names": list("0123456789"), "comment": "kept"}
    timm.models.save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_timm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_timm(tmp_path_factory.mktemp("timm") / "tiny_vit")


@pytest.fixture(scope="session")
def results(tiny_timm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pruned]:
    """Each family pruned to 2:4, with accuracy measured."""
    sources = {"vit": VIT, "resnet": RESNET, "timm": tiny_timm}
    folder = tmp_path_factory.mktemp("results")
    return {name: pruned(source, folder / name, eval_data=str(DIGITS)) for name, source in sources.items()}


@pytest.fixture(params=["vit", slow("resnet"), slow("timm")])
def result(request: pytest.FixtureRequest, results: dict[str, Pruned]) -> Pruned:
    return results[request.param]
