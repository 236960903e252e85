"""What a user asks for, held against what there is: before any work is done, or on the first images."""

import fnmatch
import os
from datetime import timedelta
from os.path import expanduser
from pathlib import Path

import accelerate
import torch
from accelerate import InitProcessGroupKwargs
from torch import Tensor

from .accuracy import logits_of
from .adapters import Chain, Group, frozen
from .data import Name, split_revision
from .errors import AdapterError, ConfigError, DataError, MaskError
from .masks.scores import criterion


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
"""To compute in. Not float16: a mean over a batch's outputs has derivatives below its smallest number."""


def check_apart(data: Name, split: str, eval_data: Name | None, eval_split: str, remedy: str) -> None:
    """Refuses to measure a model on the images that made it; None measures nothing.

    Raises:
        DataError: both are the same split of the same data, however it is spelled.
    """
    if eval_data is None:
        return
    # A Hub id names a folder that does not exist, which serves as well.
    places = [Path(expanduser(split_revision(name)[0])).resolve() for name in (data, eval_data)]
    if split == eval_split and places[0] == places[1]:
        raise DataError(
            f"Calibration or training, and evaluation, would use the same split {eval_split!r} of {eval_data}.",
            f"{remedy}: images that a model was made with cannot measure it.",
        )


def check_mask(mask: str) -> None:
    """Refuses a mask file that does not exist, and an unknown criterion.

    Raises:
        ConfigError: no such criterion.
        MaskError: no such file.
    """
    if not mask.endswith(".safetensors"):
        criterion(mask)
    elif not Path(mask).is_file():
        raise MaskError(f"Mask file {mask} does not exist.", "Expected a safetensors file of booleans.")


def find_dtype(name: str) -> torch.dtype:
    """
    Raises:
        ConfigError: not one to compute in.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def find_device(device: str) -> torch.device:
    """``auto`` is CUDA where torch finds it, else the CPU; of several processes each gets a device of its own.

    Raises:
        ConfigError: an unknown name, or a device that this machine has not.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"Device {device!r}: expected auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("Device cuda was asked for, and torch finds none here.", "Use --device cpu.")
    # Never another accelerator by itself: Apple's has no float64, in which masks are chosen.
    cuda = device != "cpu" and torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # accelerate would keep to the first device that was asked for
        return torch.device("cuda" if cuda else "cpu")
    # While the main process measures or saves, the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    own = accelerate.Accelerator(cpu=not cuda, kwargs_handlers=[patience]).device
    return own if cuda else torch.device("cpu")


def find_reproducible(device: str) -> torch.device:
    """:func:`find_device`, for a job whose seed decides the bits of its result: from here on torch leaves out, on
    CUDA, what adds in the order of the moment, and warns where it cannot.

    Raises:
        ConfigError: as there.
    """
    found = find_device(device)
    if found.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return found


def select_layers(chain: Chain, globs: tuple[str, ...]) -> list[Group]:
    """Groups whose name, or that of one of their parameters, matches one of the wildcards; all for none.

    Raises:
        MaskError: a wildcard matches nothing.
    """
    groups = [group for _, group in chain.groups()]
    for glob in globs:
        if not any(_matches(group, glob) for group in groups):
            raise MaskError(
                f"--layers {glob!r} matches no prunable layer.", "`snows-hf inspect MODEL` lists their names."
            )
    return [group for group in groups if not globs or any(_matches(group, glob) for glob in globs)]


def _matches(group: Group, glob: str) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in (group.name, *group.parameters))


def check_chain(chain: Chain, images: Tensor) -> None:
    """Makes sure that the adapter computes what the model does, on real images.

    Raises:
        AdapterError: the logits differ by more than rounding.
    """
    with torch.no_grad(), frozen(chain.model):
        expected = logits_of(chain.model, images.to(next(chain.model.parameters()).device)).double().cpu()
        got = chain.logits(images.to(chain.device)).double().cpu()
    tolerance = 1e3 * torch.finfo(images.dtype).eps * max(1.0, float(expected.abs().max()))
    if not float((got - expected).abs().max()) <= tolerance:
        raise AdapterError(
            f"The adapter for {type(chain.model).__name__} does not reproduce this model: logits differ by "
            f"{float((got - expected).abs().max()):.2g}, expected at most {tolerance:.2g}.",
            "This variant of the architecture has an option that the adapter does not know.",
        )
