"""An untrained network: of an architecture that timm knows by name, or of a checkpoint's configuration."""

from collections.abc import Sequence
from os import fspath
from os.path import expanduser
from pathlib import Path
from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from ..adapters import cifar_resnet  # noqa: F401  registers the CIFAR ResNets with timm
from ..data.names import Name
from ..errors import LoadError
from .folder import find_folder, library_of, read_config
from .load import Checkpoint, library_errors, of_timm, of_transformers, tried


def create(source: Name, class_names: Sequence[str] | None, seed: int, revision: str | None = None) -> Checkpoint:
    """A classifier with random weights, and its preprocessing; the weights of ``source`` are never read.

    Args:
        source: a name that timm knows, such as ``resnet20_cifar``; or the Hub id or folder of a checkpoint.
        class_names: of the data. An architecture by name gets one output for each; a configuration keeps its number of
            classes, and its names for them where the data have none or another number.

    Raises:
        LoadError: neither, or the library cannot build it.
    """
    source = fspath(source)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if timm.is_model(source) and not Path(source).exists():
            if class_names is None:
                return _timm(source, Path(source), {}, source)
            labels = list(class_names)
            return _timm(source, Path(source), {"label_names": labels}, source, num_classes=len(labels))
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
            made = _timm(source, folder, config, f"local-dir:{folder}")
            if class_names is not None and len(class_names) == made.model.num_classes:
                config["label_names"] = list(class_names)
                made.class_names = tuple(class_names)
            return made
        return _transformers(source, folder, config, class_names)


def _timm(source: str, folder: Path, config: dict[str, Any], name: str, **options: Any) -> Checkpoint:
    with library_errors(f"timm cannot build {source}"):
        model = timm.create_model(name, pretrained=False, **options)
    return tried(of_timm(source, folder, config, model))


def _transformers(source: str, folder: Path, config: dict[str, Any], class_names: Sequence[str] | None) -> Checkpoint:
    with library_errors(f"transformers cannot build {source}"):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if class_names is not None and len(class_names) == settings.num_labels:
            settings.id2label = dict(enumerate(class_names))
            settings.label2id = {name: i for i, name in enumerate(class_names)}
            config |= {"id2label": {str(i): name for i, name in enumerate(class_names)}, "label2id": settings.label2id}
        vars(settings).pop("quantization_config", None)
        model = AutoModelForImageClassification.from_config(settings, trust_remote_code=False)
    return tried(of_transformers(source, folder, config, model))
