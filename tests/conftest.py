"""Fixtures for all tests."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: several tests run side by side

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_is_no_garbage() -> None:
    """Libraries and traced models stay: collections, which every step back for want of memory asks for, take a tenth
    of the time without looking through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_trace_for_each_architecture() -> Iterator[None]:
    from traces import shared  # which loads torch

    from snows_hf.adapters import trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "exported", shared(trace.exported))
        yield


@pytest.fixture
def own_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is traced, for tests of the traces themselves."""
    from snows_hf.adapters import trace

    monkeypatch.setattr(trace, "exported", trace.exported.__wrapped__)


@pytest.fixture(scope="session")
def small_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the embedded ViT, for tests that only look at what happens to a checkpoint."""
    from embedded import two_blocks_of_vit  # which loads torch

    return two_blocks_of_vit(tmp_path_factory.mktemp("small") / "vit_digits")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of the trained CIFAR-10 checkpoints that lie beside the repository, where they do."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs the trained checkpoints in ../shared/models, which are not part of the repository")
    return SHARED / "models"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the CIFAR images that lie beside the repository, where they do."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the CIFAR images in ../shared/data, which are not part of the repository")
    return SHARED / "data"
