"""Training with a fixed mask, at initialisation or after pruning: held zeros, SGD, one pass over the images."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericsError
from ..settings import FinetuneConfig, TrainConfig


@contextmanager
def fixed(network: nn.Module, gone: Mapping[str, Tensor]) -> Iterator[None]:
    """For the time of the block, weights (by parameter name, where ``gone`` is true) are zero and have no gradient:
    then momentum and weight decay, of zero, leave them where they are, bit for bit."""
    handles = []
    for name, zero in gone.items():
        weight = network.get_parameter(name).requires_grad_(True)
        zero = zero.to(weight.device)
        weight.data.masked_fill_(zero, 0.0)
        handles.append(weight.register_hook(partial(torch.masked_fill, mask=zero, value=0.0)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sgd(network: nn.Module, config: TrainConfig | FinetuneConfig) -> torch.optim.SGD:
    """SGD with momentum on all parameters."""
    return torch.optim.SGD(
        network.requires_grad_(True).parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def set_rate(optimizer: Any, lr: float) -> None:
    """Sets the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def train_epoch(
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: Any,
    epoch: int,
) -> float:
    """One SGD step a batch; returns the mean loss over the images.

    Args:
        batches: images (b, 3, h, w) and classes (b,).
        loss_of: the mean loss of a batch.
        optimizer: of the network in training mode.
        epoch: from 1, for messages.

    Raises:
        NumericsError: a loss is not finite.
    """
    total, seen = 0.0, 0
    for images, classes in batches:
        loss = loss_of(images, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericsError(f"The training loss became {value} in epoch {epoch}.", "Lower --lr.")
        total, seen = total + value * len(classes), seen + len(classes)
    return total / seen


def seed_of(seed: int, number: int) -> int:
    """The seed of an epoch or a step by its number, so that no generator's state needs keeping."""
    return (1_000_003 * seed + number) % 2**63
