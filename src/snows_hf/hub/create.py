"""An untrained network: of an architecture that timm knows by name, or of a checkpoint's configuration."""

from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from .. import models  # noqa: F401  registers the CIFAR ResNets with timm
from ..errors import LoadError, one_line
from .load import Checkpoint, by_processor, by_transform, find_folder, library_of, read_config


def create(source: str, class_names: Sequence[str] | None, seed: int, revision: str | None = None) -> Checkpoint:
    """A classifier with random weights, and its preprocessing; the weights of ``source`` are never read.

    Args:
        source: a name that timm knows, such as ``resnet20_cifar``; or the Hub id or folder of a checkpoint, of which
            only the configuration is used.
        class_names: of the data. An architecture by name gets one output for each; a configuration keeps its own
            classes.
        seed: of the weights.
        revision: of ``source`` on the Hub.

    Raises:
        LoadError: neither, or the library cannot build it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if timm.is_model(source) and not Path(source).exists():
            classes = {} if class_names is None else {"num_classes": len(class_names)}
            labels = {} if class_names is None else {"label_names": list(class_names)}
            return _timm(source, Path(source), labels, source, class_names, **classes)
        if "/" not in source and not Path(expanduser(source)).exists():
            raise LoadError(
                f"{source} is no architecture that timm knows, and no folder.",
                "Give a name such as resnet20_cifar or vit_small_patch16_224, or a folder or Hub id with config.json.",
            )
        folder = find_folder(source, revision)
        config = read_config(folder)
        config.pop("quantization_config", None)
        config.pop("snows", None)
        if library_of(config, folder) == "timm":
            own = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
            return _timm(source, folder, config, f"local-dir:{folder}", own if isinstance(own, list) else None)
        return _transformers(source, folder, config)


def _timm(
    source: str, folder: Path, config: dict[str, Any], name: str, names: Sequence[str] | None, **options: Any
) -> Checkpoint:
    try:
        model: Any = timm.create_model(name, pretrained=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AssertionError) as error:
        raise LoadError(f"timm cannot build {source}: {one_line(error)}") from error
    names = tuple(names) if names else None
    return Checkpoint(source, folder, "timm", config, model.eval(), by_transform(model), None, names)


def _transformers(source: str, folder: Path, config: dict[str, Any]) -> Checkpoint:
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if getattr(settings, "quantization_config", None) is not None:
            del settings.quantization_config
        model = AutoModelForImageClassification.from_config(settings, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, StrictDataclassError) as error:
        raise LoadError(f"transformers cannot build {source}: {one_line(error)}") from error

    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    return Checkpoint(source, folder, "transformers", config, model.eval(), by_processor(processor), processor, names)
