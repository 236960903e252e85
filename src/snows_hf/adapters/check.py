"""What a user asks for of a model, and the chain that it was cut into, held against the model itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, MaskError, one_line
from ..runtime.memory import out_of_memory
from .base import Chain, Group
from .frozen import frozen
from .outputs import outputs_of


T = TypeVar("T")

TOLERANCE = 1e-3
"""Of an output's spread between images. Rounding in float32 makes up to 1e-5 of it in trained networks (DINOv2)."""

ROUNDING = 30
"""Units in the last place of the largest number, where the spread is next to nothing. Seen: up to 6 there."""


@torch.no_grad()
def check_chain(chain: Chain, images: Tensor) -> dict[str, Tensor]:
    """Makes sure that the chain computes what the model does, before anything is built on it.

    The untouched model is compared with the frozen chain, in float32 or wider, on real images and one of noise, which
    tells outputs apart where the real ones are alike.

    Returns:
        The model's outputs by name for the preprocessed images (n, 3, height, width).

    Raises:
        AdapterError: an output differs by more than rounding, or images of this size fail in the chain, or already in
            the model.
    """
    name = type(chain.model).__name__
    noise = torch.randn(images[:1].shape, generator=torch.Generator().manual_seed(0)).to(images)
    with widened(chain.model):
        images = torch.cat([images, noise]).to(next(chain.model.parameters()))
        expected = _tried(name, lambda: outputs_of(chain.model, images))
        with frozen(chain.model):
            got = _tried(f"The chain of {name}", lambda: chain.results_of(images.to(chain.device)))
    for output, values in expected.items():
        _check_output(name, output, got[output].to(values.device), values)
    return {output: values[:-1] for output, values in expected.items()}


def _check_output(name: str, output: str, got: Tensor, expected: Tensor) -> None:
    eps, got, expected = torch.finfo(expected.dtype).eps, got.double(), expected.double()
    difference, spread = (got - expected).abs().max(), expected.var(0).mean().sqrt()
    tolerance = TOLERANCE * spread + ROUNDING * eps * expected.abs().max()
    if not difference <= tolerance:  # nor where one is NaN
        raise AdapterError(
            f"The chain of {name} does not reproduce this model: {output} differ by {float(difference):.2g}, "
            f"{float(difference / spread):.2g} of their spread between images; expected at most "
            f"{float(tolerance):.2g}.",
            "The model does something that its trace does not show: please report it with the model's name.",
        )


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """For the time of the block: evaluation mode, and weights and buffers in float32 where they are narrower."""
    training = {module: module.training for module in model.modules()}
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [(tensor, tensor.dtype) for tensor in tensors if tensor.is_floating_point() and tensor.itemsize < 4]
    model.eval()
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)  # the very bits that it was
        for module, mode in training.items():
            module.training = mode


def _tried(what: str, run: Callable[[], T]) -> T:
    try:
        return run()
    except Exception as error:  # a library's, of any type
        if out_of_memory(error):
            raise
        raise AdapterError(
            f"{what} cannot run these images: {type(error).__name__}: {one_line(error)}",
            "Give images of the size that the model's configuration says.",
        ) from error


def select_layers(chain: Chain, globs: tuple[str, ...]) -> list[Group]:
    """Groups whose name, or that of one of their parameters, matches one of the wildcards; all for none.

    Raises:
        MaskError: a wildcard matches nothing.
    """
    found = []
    for glob in globs or ("*",):
        matches = [g for _, g in chain.groups() if any(fnmatchcase(name, glob) for name in (g.name, *g.parameters))]
        if globs and not matches:
            raise MaskError(
                f"--layers {glob!r} matches no prunable layer.", "`snows-hf inspect MODEL` lists their names."
            )
        found += matches
    return [group for _, group in chain.groups() if group in found]
