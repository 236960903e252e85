"""Hessian-free one-shot pruning of vision models (SNOWS), native to the Hugging Face Hub.

Names are imported when they are first used (``__init__.pyi`` says from where), so that importing the package itself
takes no torch. Once it is imported, timm knows the CIFAR ResNets and transformers reads packed files.
"""

from importlib import import_module
from types import ModuleType

import lazy_loader
import wrapt

from .runtime.version import __version__ as __version__


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("timm.models")
def _register_networks(_: ModuleType) -> None:
    import_module("snows_hf.adapters.cifar_resnet")


@wrapt.when_imported("transformers.modeling_utils")
def _register_packed_files(_: ModuleType) -> None:
    import_module("snows_hf.hub.quantizer")
