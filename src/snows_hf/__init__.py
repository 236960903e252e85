"""Hessian-free one-shot pruning of vision models (SNOWS), native to the Hugging Face Hub.

Importing it registers the CIFAR ResNets with timm, and packed files with transformers.
"""

from .adapters import build_chain
from .config import PruneConfig, SolverConfig, TrainConfig
from .errors import SnowsError
from .evaluate import Accuracy, evaluate
from .hub.load import Checkpoint, load
from .hub.push import Pushed, push
from .hub.repack import pack, unpack
from .inspect import inspect
from .prune import PruneResult, prune
from .sensitivity import sensitivity
from .speed import Acceleration, accelerate
from .train import train
from .version import __version__


def from_pretrained(source: str, revision: str | None = None) -> Checkpoint:
    """Loads a checkpoint, packed or not, from the Hub or a folder: see :func:`snows_hf.hub.load.load`."""
    return load(source, revision)


__all__ = [
    "Acceleration",
    "Accuracy",
    "Checkpoint",
    "PruneConfig",
    "PruneResult",
    "Pushed",
    "SnowsError",
    "SolverConfig",
    "TrainConfig",
    "__version__",
    "accelerate",
    "build_chain",
    "evaluate",
    "from_pretrained",
    "inspect",
    "load",
    "pack",
    "prune",
    "push",
    "sensitivity",
    "train",
    "unpack",
]
