"""Hessian-free one-shot pruning of vision models (SNOWS), native to the Hugging Face Hub.

Names are imported when they are first used, so that importing the package itself takes no torch. Once it is imported,
timm knows the CIFAR ResNets and transformers reads packed files.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import lazy_loader
import wrapt

from .runtime.version import __version__ as __version__


if TYPE_CHECKING:
    from .adapters import build_chain as build_chain
    from .data.accuracy import Accuracy as Accuracy
    from .errors import SnowsError as SnowsError
    from .hub.load import Checkpoint as Checkpoint, from_pretrained as from_pretrained, load as load
    from .hub.push import Pushed as Pushed, push as push
    from .hub.repack import pack as pack, unpack as unpack
    from .jobs.accelerate import Acceleration as Acceleration, accelerate as accelerate
    from .jobs.attention import attention as attention
    from .jobs.evaluate import evaluate as evaluate, fidelity as fidelity
    from .jobs.finetune import finetune as finetune
    from .jobs.inspect import inspect as inspect
    from .jobs.probe import probe as probe
    from .jobs.prune import PruneResult as PruneResult, prune as prune
    from .jobs.report import compare as compare, report as report
    from .jobs.sensitivity import sensitivity as sensitivity
    from .jobs.train import train as train
    from .settings import (
        FinetuneConfig as FinetuneConfig,
        PruneConfig as PruneConfig,
        SolverConfig as SolverConfig,
        TrainConfig as TrainConfig,
    )

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapters": ["build_chain"],
        "data.accuracy": ["Accuracy"],
        "errors": ["SnowsError"],
        "hub.load": ["Checkpoint", "from_pretrained", "load"],
        "hub.push": ["Pushed", "push"],
        "hub.repack": ["pack", "unpack"],
        "jobs.accelerate": ["Acceleration", "accelerate"],
        "jobs.evaluate": ["evaluate", "fidelity"],
        "jobs.prune": ["PruneResult", "prune"],
        "jobs.report": ["compare", "report"],
        "settings": ["FinetuneConfig", "PruneConfig", "SolverConfig", "TrainConfig"],
        **{f"jobs.{job}": [job] for job in ("attention", "finetune", "inspect", "probe", "sensitivity", "train")},
    },
)


@wrapt.when_imported("timm.models")
def _register_networks(_: ModuleType) -> None:
    import_module("snows_hf.adapters.cifar_resnet")


@wrapt.when_imported("transformers.modeling_utils")
def _register_packed_files(_: ModuleType) -> None:
    import_module("snows_hf.hub.quantizer")
