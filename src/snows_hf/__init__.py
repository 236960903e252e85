"""Hessian-free one-shot pruning of vision models (SNOWS), native to the Hugging Face Hub.

Importing it registers the CIFAR ResNets with timm, and packed files with transformers.
"""

from .accuracy import Accuracy
from .adapters import build_chain
from .attention import attention
from .config import FinetuneConfig, PruneConfig, SolverConfig, TrainConfig
from .data import Name
from .errors import SnowsError
from .evaluate import evaluate
from .finetune import finetune
from .hub.load import Checkpoint, load
from .hub.push import Pushed, push
from .hub.repack import pack, unpack
from .inspect import inspect
from .probe import probe
from .prune import PruneResult, prune
from .report import compare, report
from .sensitivity import sensitivity
from .speed import Acceleration, accelerate
from .train import train
from .version import __version__


def from_pretrained(source: Name, revision: str | None = None) -> Checkpoint:
    """Loads a checkpoint, packed or not, from the Hub or a folder: see :func:`snows_hf.hub.load.load`."""
    return load(source, revision, trial=False)


__all__ = [
    "Acceleration",
    "Accuracy",
    "Checkpoint",
    "FinetuneConfig",
    "PruneConfig",
    "PruneResult",
    "Pushed",
    "SnowsError",
    "SolverConfig",
    "TrainConfig",
    "__version__",
    "accelerate",
    "attention",
    "build_chain",
    "compare",
    "evaluate",
    "finetune",
    "from_pretrained",
    "inspect",
    "load",
    "pack",
    "probe",
    "prune",
    "push",
    "report",
    "sensitivity",
    "train",
    "unpack",
]
