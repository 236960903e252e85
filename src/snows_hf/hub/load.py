"""From a Hub id or a folder to a model with its preprocessing, of transformers or timm."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from os import fspath
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from timm.models import clean_state_dict
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

from ..adapters import cifar_resnet  # noqa: F401  registers the CIFAR ResNets with timm
from ..adapters.base import example
from ..adapters.outputs import is_two_tower, outputs_of
from ..data.images import Preprocess
from ..data.names import Name, local_folder
from ..errors import ConfigError, LoadError, NumericsError, SnowsError, one_line, shortened
from ..runtime.run import Run
from . import quantizer  # noqa: F401  registers packed files with transformers
from .custom import narrow, narrowed_class
from .folder import TOKENIZER_FILES, check_weights, check_whole, find_folder, is_custom, library_of, read_config
from .packed import PACKED_FILE, read_packed
from .tasks import CLASSIFICATION, FEATURES, model_class, task_of


@dataclass
class Checkpoint:
    """A loaded model.

    Attributes:
        source: what the user asked for.
        folder: where its files are.
        library: ``transformers`` or ``timm``.
        config: the contents of its config.json, less what says that the weights are packed.
        model: the network, in evaluation mode.
        preprocess: RGB PIL images → pixel values (n, 3, height, width).
        processor: the transformers image processor; None for timm, which keeps preprocessing in its config.
        class_names: names of the classes by logit, or None; None of what is no classifier.
        task: what it is for, by the Hub's names: see tasks.py.
        options: what ``from_pretrained`` of its class must be told.
        custom: whether its tensors are smaller than any configuration says: only this package loads it then.
    """

    source: str
    folder: Path
    library: str
    config: dict[str, Any]
    model: nn.Module
    preprocess: Preprocess
    processor: Any
    class_names: tuple[str, ...] | None
    task: str = CLASSIFICATION
    options: dict[str, Any] = field(default_factory=dict)
    custom: bool = False

    @property
    def is_classifier(self) -> bool:
        return self.task == CLASSIFICATION

    @property
    def tower(self) -> str | None:
        """Which part of a model of images and text is meant; None of a model of images."""
        return "vision" if is_two_tower(self.model) else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether it is a model of images and text with the files of a tokenizer in its folder."""
        return self.tower is not None and any((self.folder / name).is_file() for name in TOKENIZER_FILES)

    @cached_property
    def tokenizer(self) -> Any:
        """That of transformers for a model of images and text; None where the folder has none.

        Raises:
            LoadError: it has one that transformers cannot load.
        """
        if not self.has_tokenizer:
            return None
        with library_errors(f"transformers cannot load the tokenizer of {self.source}"):
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)

    def image(self) -> torch.Tensor:
        """A blank image as the model takes it, (1, 3, height, width): of the size in the model's configuration where
        the preprocessing leaves images as large as they are."""
        height, width = (224, 224) if resizes(self.processor) else example(self.model).shape[2:]
        return self.preprocess([PIL.Image.new("RGB", (width, height))])


def resizes(processor: Any) -> bool:
    """Whether images come out of a processor of transformers (None: of timm) in another size than the user's."""
    return bool(getattr(processor, "do_resize", True))


@contextmanager
def library_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turns whatever a library raises within the block into a :class:`LoadError`: a configuration can make them divide
    by zero, or look for a package that is not there. So are shapes in a file that its model cannot be narrowed to."""
    try:
        yield
    except ConfigError as error:
        raise LoadError(f"{what}: {error.message}", error.remedy) from error
    except SnowsError:
        raise
    except Exception as error:
        raise LoadError(f"{what}: {type(error).__name__}: {one_line(error)}", remedy) from error


def load(source: Name, revision: str | None = None, trial: bool = True, run: Run | None = None) -> Checkpoint:
    """Loads a vision model, whatever it is for, and its preprocessing.

    Args:
        source: Hub id or folder; ``hf-hub:`` and ``local-dir:`` say which, as in timm.
        trial: run a blank image through it, too: for jobs, whose faults are better known before any work.
        run: told how much of a download has come, and what is not loaded; without one the Hub's client shows bars of
            its own.

    Raises:
        AdapterError: it takes something else than images.
        LoadError: not found, not safetensors, corrupt, or its preprocessing does not fit.
        NumericsError: a weight, or an image that was prepared, is NaN or infinite.
    """
    source = fspath(source)
    folder = find_folder(source, revision, run)
    config = read_config(folder)
    library = library_of(config, folder)
    if local_folder(source) is None:
        check_whole(source, revision, folder, library)
    check_weights(folder)
    if (folder / PACKED_FILE).is_file():
        config.pop("quantization_config", None)
    checkpoint = (_load_timm if library == "timm" else _load_transformers)(source, folder, config)
    if checkpoint.options and run is not None:
        run.say(f"{source} has no weights for a pooler: {type(checkpoint.model).__name__} is loaded without one")
    for name, tensor in checkpoint.model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            fault = f"Weight {name} of {source} holds NaN or infinite values."
            raise NumericsError(fault, "The checkpoint is damaged.")
    return tried(checkpoint) if trial else checkpoint


def from_pretrained(source: Name, revision: str | None = None) -> Checkpoint:
    """Loads a checkpoint, packed or not, from the Hub or a folder: see :func:`load`."""
    return load(source, revision, trial=False)


@torch.no_grad()
def tried(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, once a blank image has run through it.

    Raises:
        AdapterError: nothing comes of it for each image.
        LoadError: the image cannot be prepared, or the model does not take what comes of it.
        NumericsError: what comes of it is NaN or infinite.
    """
    with library_errors(
        f"{checkpoint.source} cannot take an image that is prepared as its configuration says",
        "Expected the config.json (and preprocessor_config.json, of transformers) that belong to the weights.",
    ):
        pixels = checkpoint.image()
        if not torch.isfinite(pixels).all():
            fault = f"{checkpoint.source} prepares images to values that are NaN or infinite."
            raise NumericsError(fault, "Look at the standard deviations in its configuration.")
        outputs_of(checkpoint.model, pixels.to(next(checkpoint.model.parameters()).dtype))
    return checkpoint


def _load_transformers(source: str, folder: Path, config: dict[str, Any]) -> Checkpoint:
    with library_errors(f"transformers cannot load {source}"):
        kind = model_class(source, config)

    def read(as_class: Any, **options: Any) -> tuple[Any, list[str], dict[str, torch.Size]]:
        """The model, the names of the weights that it lacks, and the shapes that the file has otherwise."""
        with library_errors(f"transformers cannot load {source} as {kind.__name__}"):
            model, info = as_class.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
        shapes = {key[0]: key[1] for key in info["mismatched_keys"]}
        return model, sorted([*info["missing_keys"], *shapes]), shapes

    options: dict[str, Any] = {}
    model, lacking, shapes = read(kind)
    # Many backbones on the Hub were trained without the pooler that their class has.
    missing = [name for name in lacking if name not in shapes]
    if missing and all(name.startswith("pooler.") for name in missing) and _may_lack_pooler(kind):
        options = {"add_pooling_layer": False}
        model, lacking, shapes = read(kind, **options)
    if custom := is_custom(config):
        model, lacking, _ = read(narrowed_class(kind, shapes), **options)
        model.__class__ = kind
    check_complete(source, model, lacking)
    checkpoint = of_transformers(source, folder, config, model)
    checkpoint.options, checkpoint.custom = options, custom
    return checkpoint


def _may_lack_pooler(kind: type[nn.Module]) -> bool:
    return "add_pooling_layer" in inspect.signature(kind.__init__).parameters


def check_complete(source: str, model: nn.Module, lacking: Sequence[str], of_what: str = "") -> None:
    """Refuses, with a :class:`LoadError`, a model that ``lacking`` weights of its own were not found for."""
    if lacking:
        fault = f"lacks weights of {type(model).__name__}, or has them in another shape: {shortened(lacking, 3)}"
        remedy = (
            "Expected a checkpoint with all its weights, a trained head too, and the config.json that belongs to it."
        )
        raise LoadError(f"{source} {fault}{of_what}.", remedy)


def of_transformers(source: str, folder: Path, config: dict[str, Any], model: Any) -> Checkpoint:
    """A model of transformers with the preprocessing of its folder. Where the size of what that makes of an image
    depends on the image's shape (DETR, Depth Anything), it gets the square in the middle of each.

    Raises:
        LoadError: the folder has none, or one that transformers cannot use.
    """
    with library_errors(
        f"{source} has no usable preprocessor_config.json",
        "Without it the images cannot be prepared as the model expects.",
    ):
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    task = task_of(model)
    names = names_of(model.config.id2label, model.config.num_labels) if task == CLASSIFICATION else None

    def prepared(images: Sequence[PIL.Image.Image]) -> Any:
        return processor(images=list(images), return_tensors="pt")["pixel_values"]

    @cache
    def follows_shape() -> bool:
        wide, high = (prepared([PIL.Image.new("RGB", size)]) for size in ((96, 64), (64, 96)))
        return resizes(processor) and wide.shape != high.shape

    def preprocess(images: Sequence[PIL.Image.Image]) -> Any:
        return prepared([central_square(image) for image in images] if follows_shape() else images)

    return Checkpoint(source, folder, "transformers", config, model.eval(), preprocess, processor, names, task)


def central_square(image: PIL.Image.Image) -> PIL.Image.Image:
    return PIL.ImageOps.fit(image, (min(image.size),) * 2)


def _load_timm(source: str, folder: Path, config: dict[str, Any]) -> Checkpoint:
    packed = (folder / PACKED_FILE).is_file()
    if not packed and not (folder / "model.safetensors").is_file():
        raise LoadError(f"{folder} has no model.safetensors, the file that timm reads.")
    with library_errors(f"timm cannot load {source}"):
        stored = read_packed(folder / PACKED_FILE)[0] if packed else load_file(folder / "model.safetensors")
        if custom := is_custom(config):
            model, lacking = _timm_narrowed(folder, stored), []
        else:
            model = _timm_of(folder, stored)
            lacking = lacking_weights(model, folder, stored)
    check_complete(source, model, lacking, f" for {model.num_classes} classes" if model.num_classes else "")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in stored:  # timm computes in float32 whatever the file has
            tensor.data = tensor.data.to(stored[name].dtype)
    buffers_follow_weights(model)
    checkpoint = of_timm(source, folder, config, model)
    checkpoint.custom = custom
    return checkpoint


def _timm_narrowed(folder: Path, stored: dict[str, torch.Tensor]) -> Any:
    """timm's model of a configuration, as narrow as these tensors, which it must have all of, and no other."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
    narrow(model, {name: tensor.shape for name, tensor in stored.items()})
    model.load_state_dict(stored)
    return model


def _timm_of(folder: Path, stored: dict[str, torch.Tensor]) -> Any:
    """timm's model of a configuration with the weights of a dictionary, as if it were the file's."""
    weights = {"source": "", "state_dict": clean_state_dict(stored)}
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, pretrained_cfg_overlay=weights)
    model.pretrained_cfg.pop("state_dict")
    return model


@torch.no_grad()
def lacking_weights(model: Any, folder: Path, stored: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that timm left as it drew them: of a head for other classes, say, or whatever is missing in
    the file (``stored``) where the configuration, or the architecture itself, has timm load without being strict."""
    state = model.state_dict()
    heads = model.pretrained_cfg.get("classifier") or ()
    lacking = [f"{head}.weight" for head in ((heads,) if isinstance(heads, str) else heads)]
    lacking = [name for name in lacking if name not in state and model.num_classes]

    def is_stored(name: str) -> bool:  # torch.equal is false of other shapes
        return name in stored and torch.equal(stored[name].to(state[name].dtype), state[name])

    changed = [name for name, tensor in state.items() if tensor.is_floating_point() and not is_stored(name)]
    if changed:
        # timm reads other projects' layouts, too, and renames, splits or resizes what it finds there. What comes of a
        # file is NaN if that file holds nothing else.
        nothing = {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in stored.items()}
        traced = _timm_of(folder, nothing).state_dict()
        lacking += [name for name in changed if not traced[name].isnan().any()]
    return lacking


def of_timm(source: str, folder: Path, config: dict[str, Any], model: Any) -> Checkpoint:
    """A model of timm with the preprocessing and the names of the classes that its configuration says.

    Raises:
        LoadError: these are not what timm reads, or writes again.
    """
    for key in ("label_names", "labels", "label_descriptions"):
        if config.get(key) and not isinstance(config[key], dict if key == "label_descriptions" else dict | list):
            raise LoadError(f"{folder / 'config.json'}: {key} = {config[key]!r}: expected names of classes.")
    labels = config.get("label_names") or model.pretrained_cfg.get("label_names")
    with library_errors(f"timm cannot read {source}'s preprocessing or names of classes"):
        names = names_of(labels, model.num_classes) if labels and model.num_classes else None
        transform = create_transform(**resolve_data_config(model=model), is_training=False)

    def preprocess(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
        return torch.stack([transform(image) for image in images])

    task = CLASSIFICATION if model.num_classes else FEATURES
    return Checkpoint(source, folder, "timm", config, model.eval(), preprocess, None, names, task)


def buffers_follow_weights(model: nn.Module) -> None:
    """Casts what a model computes with, and no file holds, to the type of its weights: Swin's attention masks, say."""
    dtype, kept = next(model.parameters()).dtype, model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in kept and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def names_of(labels: Any, count: int) -> tuple[str, ...]:
    """Names of the classes by logit, of a list or a mapping; one that has none is called by its number."""
    named = dict(enumerate(labels)) if isinstance(labels, list | tuple) else {int(i): labels[i] for i in labels}
    return tuple(str(named.get(i, i)) for i in range(count))
