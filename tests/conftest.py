"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: several tests run side by side

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
