"""What a user asks for of a model, held against the model itself."""

import fnmatch

import torch
from torch import Tensor

from ..adapters import Chain, Group, frozen
from ..adapters.base import logits_of
from ..errors import AdapterError, MaskError


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
