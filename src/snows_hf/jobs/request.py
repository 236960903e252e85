"""What a user asks for, held against what there is: before any work is done, or on the first images."""

from os.path import expanduser
from pathlib import Path

import torch

from ..data.names import Name, split_revision
from ..errors import ConfigError, DataError, MaskError
from ..masks.scores import criterion


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
