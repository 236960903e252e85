"""The checkpoints and images that come with the package, copies to damage, and what pruning makes of them."""

import json
import re
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from snows_hf import prune


EMBEDDED = Path(str(files("snows_hf") / "embedded"))
VIT = EMBEDDED / "vit_digits"
RESNET = EMBEDDED / "resnet_digits"
DIGITS = EMBEDDED / "digits"

NO_HUB = "http://127.0.0.1:9"
"""An address where nothing answers."""


@dataclass(frozen=True)
class Pruned:
    """A source folder, the folder made of it, and the report."""

    source: Path
    folder: Path
    report: dict[str, Any]


def pruned(source: Path, folder: Path, **settings: Any) -> Pruned:
    """``source`` pruned to 2:4 with few images, a cheap mask, a small K and few steps, saved to ``folder``."""
    quick = {"data": str(DIGITS), "samples": 32, "k": 1, "mask": "sparsegpt", "layer_steps": 2, "joint_steps": 2}
    return Pruned(source, folder, prune(str(source), "2:4", output=folder, **quick | settings).report)


def copy_of(source: Path, folder: Path, without: tuple[str, ...] = ()) -> Path:
    """A copy of a checkpoint, less some of its files."""
    return shutil.copytree(source, folder, ignore=lambda *_: without)


def edit_config(folder: Path, name: str = "config.json", /, **changes: Any) -> Path:
    """Sets keys of config.json, or of another such file; None removes one."""
    config = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def two_blocks_of_vit(folder: Path) -> Path:
    """A copy of the ViT less its last two blocks: half the work, where the accuracy does not matter."""
    kept = {name: tensor for name, tensor in tensors_of(VIT).items() if not re.search(r"\.layer\.[23]\.", name)}
    return edit_config(write_tensors(copy_of(VIT, folder), kept), num_hidden_layers=2)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
