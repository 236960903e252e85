"""What a user asks for, held against itself and the disk before any work is done, and before torch is loaded.

Each job begins with its own function of these. The command line calls it first, so that what is refused is refused at
once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.names import Name, local_folder, split_revision
from ..errors import ConfigError, DataError, MaskError, PatternError, SaveError
from ..masks.criteria import SCORES, find_criterion
from ..patterns import parse_candidates, split_structures
from ..patterns.plan import at_initialisation, layer_patterns, order_for
from ..runtime.files import check_file, check_output
from ..runtime.launch import check_device, check_memory
from ..settings import PruneConfig, TrainConfig, check_seed, settings_for


if TYPE_CHECKING:
    import torch


DEFAULT_DATA = "timm/mini-imagenet"
"""Calibration images where none are named: 50,000 images of ImageNet's training set, openly on the Hub."""

DEFAULT_PATTERNS = "0.5,0.6,0.7,0.8,0.9,0.95"
"""What a sensitivity measures where no patterns are named."""

DTYPES = ("float32", "float64", "bfloat16")
"""To compute in. Not float16: a mean over a batch's outputs has derivatives below its smallest number."""

FORMATS = ("safetensors", "packed")


def check_pruning(pattern: str, effort: str, settings: dict[str, Any]) -> PruneConfig:
    """The settings of a prune, but for those that the effort has for a family of architectures.

    Raises:
        ConfigError: unknown or bad settings, or that do not go together; no such criterion.
        MaskError: no such mask file.
        PatternError: no pattern.
    """
    asked = settings_for(effort, "", pattern, settings)
    order_for(asked, layer_patterns(asked))
    check_mask(asked.mask)
    check_units(pattern, asked)
    return asked


ANY_STRUCTURE = "mlp:0.5"
"""Stands for the pattern that ``faster`` will choose: settings are the same for all that name structures alone."""

OF_ZEROS = ("allocation", "budget", "gradual", "permute", "sparsity")
"""Settings that say where zeros go."""


def check_faster(
    pattern: str | None, faster: float | None, batch: int, allow_custom: bool, settings: Mapping[str, Any]
) -> str:
    """The pattern of a prune; where the user says instead how many times as fast the model should be, one that stands
    for it (:data:`ANY_STRUCTURE`).

    Raises:
        ConfigError: both of them or none, no such speed, no such batch, settings of zeros, or custom models.
    """
    how = "As in --pattern 2:4, or --faster 1.5."
    if faster is None:
        if pattern is None:
            raise ConfigError("Neither a pattern nor a speed is given: what should be pruned is not said.", how)
        if batch != 1:
            raise ConfigError(f"--faster-batch {batch} goes with --faster, which is not given.", "Leave it out.")
        return pattern
    if pattern is not None:
        raise ConfigError(
            f"--faster {faster} chooses the pattern itself, and --pattern {pattern} is given besides.",
            "Leave out one of the two.",
        )
    if not (isinstance(faster, int | float) and 1 < faster < math.inf):
        raise ConfigError(
            f"--faster {faster}: expected a number above 1, so many times as fast as the dense model.",
            "--faster 1.5 makes a model that takes two thirds of the time.",
        )
    check_count("--faster-batch", batch)
    if allow_custom:
        raise ConfigError(
            "--faster finds what a configuration can say, and --allow-custom is given besides.",
            "Leave it out, or say a --pattern.",
        )
    if own := [name for name in OF_ZEROS if name in settings]:
        raise ConfigError(
            f"--faster removes whole units and makes no zeros, which {', '.join(own)} is about.", "Leave it out."
        )
    return ANY_STRUCTURE


def check_no_structures(pattern: str, what: str) -> None:
    """
    Raises:
        PatternError: structures, for a job that knows zeros alone.
    """
    if split_structures(pattern)[0]:
        raise PatternError(f"{what} takes zeros alone, not structures: {pattern!r}.", "As in 2:4 or 0.7.")


def check_units(pattern: str, config: PruneConfig) -> None:
    """
    Raises:
        ConfigError: no criterion of units, or settings that a smaller network cannot be made with.
    """
    if config.units not in ("obs", *SCORES):
        known = ", ".join(("obs", *SCORES))
        raise ConfigError(f"Criterion {config.units!r} of units: expected one of {known}.")
    if split_structures(pattern)[0] and config.targets != "dense":
        raise ConfigError(
            f"Targets {config.targets!r}: a smaller network is fitted to the dense one, targets = dense."
        )


def check_sensitivity(patterns: str, effort: str, settings: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: unknown or bad settings, no such criterion, or masks from a file.
        PatternError: no pattern.
    """
    check_no_structures(patterns, "A sensitivity")
    parse_candidates(patterns)
    mask = settings_for(effort, "", patterns, settings).mask
    if mask.endswith(".safetensors"):
        raise ConfigError("A mask file says one sparsity for each layer; a sensitivity needs a mask criterion.")
    check_mask(mask)


def check_training(pattern: str | None, settings: dict[str, Any]) -> TrainConfig:
    """The settings of a pruning at initialisation.

    Raises:
        ConfigError: unknown or bad settings; no such criterion, or none that has scores, for structures.
        MaskError: no such mask file.
        PatternError: no pattern, or a cap below its sparsity.
    """
    config = TrainConfig().updated(**settings)
    if pattern is not None:
        at_initialisation(pattern, config)
    check_mask(config.mask)
    if pattern is not None and split_structures(pattern)[0] and config.mask not in SCORES:
        fault = f"Mask criterion {Path(config.mask).name!r} has no scores that could be summed over units."
        raise ConfigError(fault, f"For structures at initialisation, expected one of {', '.join(SCORES)}.")
    return config


def check_request(
    data: Name,
    data_split: str,
    eval_data: Name | None,
    eval_split: str,
    output: str | Path | None,
    device: str,
    *,
    dtype: str = "float32",
    memory: float | None = None,
    format: str = "safetensors",
) -> None:
    """What a job that makes a model is asked for besides its settings.

    Raises:
        ConfigError: no such device, dtype or format, or no budget of memory.
        DataError: the same images for making and for measuring.
        SaveError: the output could not be written.
    """
    check_device(device)
    check_one_of("dtype", dtype, DTYPES)
    check_memory(memory)
    check_one_of("Format", format, FORMATS)
    check_apart(data, data_split, eval_data, eval_split, "Give --data-split or --eval-split")
    if output is not None:
        check_output(Path(output), size=0)


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
        find_criterion(mask)
    elif not Path(mask).is_file():
        raise MaskError(f"Mask file {mask} does not exist.", "Expected a safetensors file of booleans.")


def check_one_of(what: str, value: str, choices: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: it is none of them.
    """
    if value not in choices:
        raise ConfigError(f"{what} {value!r}: expected one of {', '.join(choices)}.")


def find_dtype(name: str) -> torch.dtype:
    """
    Raises:
        ConfigError: not one to compute in.
    """
    import torch

    check_one_of("dtype", name, DTYPES)
    found: torch.dtype = getattr(torch, name)
    return found


def check_probe(
    data: Name, train_split: str, eval_data: Name | None, test_split: str, samples: int | None, seed: int
) -> None:
    """
    Raises:
        ConfigError: a bad seed, or fewer images than a probe takes.
        DataError: the same images for fitting and for measuring.
    """
    if samples is not None:
        check_count("samples", samples, least=2)
    check_seed(seed)
    measured = data if eval_data is None else eval_data
    check_apart(data, train_split, measured, test_split, "Give --train-split or --test-split")


def check_prompts(prompts: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a prompt without a place for the name of a class.
    """
    for prompt in prompts:
        if "{}" not in prompt:
            raise ConfigError(f"Prompt {prompt!r} has no {{}} for the name of a class.", "As in 'a photo of a {}.'.")


def check_bench(batch_sizes: Sequence[int], dtype: str, smaller: bool = False) -> None:
    """
    Raises:
        ConfigError: a type without 2:4 kernels, unless a ``smaller`` model is timed, or a batch without images.
    """
    if smaller:
        check_one_of("dtype", dtype, ("float32", "float16", "bfloat16"))
    elif dtype not in ("float16", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r}: the 2:4 kernels take float16 or bfloat16.")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"Batch sizes {list(batch_sizes)}: expected whole numbers from 1 on.")


def check_report(model: Name, output: str | Path | None, images: int) -> None:
    """
    Raises:
        ConfigError: no image, or no place for the report.
        SaveError: the output could not be written.
    """
    check_count("images", images)
    if output is None and local_folder(model) is None:
        raise ConfigError(f"{model} is no folder here, in which a report could be put.", "Give --output.")
    if output is not None and not Path(output).is_dir():
        check_output(Path(output), size=0)


def check_attention(images: int, samples: int, seed: int, output: Path) -> None:
    """Refuses, before any work is done, a file that could not be written, and a machine without matplotlib.

    Raises:
        ConfigError: no image, a bad seed, no matplotlib, or a name that does not end in .png.
        SaveError: the file exists, or its folder does not.
    """
    check_count("images", images)
    check_count("samples", samples)
    check_seed(seed)
    check_matplotlib()
    check_file(output, ".png")


def check_count(name: str, count: int, least: int = 1) -> None:
    """
    Raises:
        ConfigError: fewer images than that.
    """
    if count < least:
        raise ConfigError(f"{name} = {count}: expected at least {least}.")


def check_plot(path: Path) -> None:
    """Refuses, before anything is measured, a plot that could not be made.

    Raises:
        ConfigError: matplotlib is not installed, or it does not write such files.
        SaveError: the file's folder does not exist.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise ConfigError(f"Plot {path}: expected a name that ends in one of {', '.join(sorted(kinds))}.")
    if not path.absolute().parent.is_dir():
        raise SaveError(f"Plot {path}: its folder does not exist.", "Make it, or choose another file.")


def check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("Plots need matplotlib, which is not installed.", "pip install 'snows-hf[viz]'") from None
