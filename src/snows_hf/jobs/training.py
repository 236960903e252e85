"""Training with a fixed mask, at initialisation or after pruning: held zeros, SGD, one pass over the images."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericsError
from ..runtime.run import Run
from ..settings import FinetuneConfig, TrainConfig


@contextmanager
def fixed(network: nn.Module, gone: Mapping[str, Tensor]) -> Iterator[None]:
    """For the time of the block, weights (by parameter name, where ``gone`` is true) are zero and have no gradient:
    then momentum and weight decay, of zero, leave them where they are, bit for bit."""
    with ExitStack() as hooks:
        for name, zero in gone.items():
            weight = network.get_parameter(name).requires_grad_(True)
            zero = zero.to(weight.device)
            weight.data.masked_fill_(zero, 0.0)
            hooks.enter_context(weight.register_hook(partial(torch.masked_fill, mask=zero, value=0.0)))
        yield


def sgd(network: nn.Module, config: TrainConfig | FinetuneConfig) -> torch.optim.SGD:
    """SGD with momentum on all parameters."""
    parameters = network.requires_grad_(True).parameters()
    return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay)


def train_epoch(
    run: Run,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: Any,
    rate: Callable[[int], float],
    epoch: int,
    epochs: int,
) -> float:
    """One SGD step for each of the ``steps`` batches, images (b, 3, h, w) and classes (b,), at a learning rate by the
    number of the step over all ``epochs``; returns the mean over the images of ``loss_of``, which is that of a batch.
    The network is in training mode, and ``epoch`` counts from 0.

    Raises:
        NumericsError: a loss is not finite.
    """
    total, seen = 0.0, 0
    tracked = run.track(batches, f"Batches of epoch {epoch + 1}/{epochs}", steps)
    for step, (images, classes) in enumerate(tracked, epoch * steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(images, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericsError(f"The training loss became {value} in epoch {epoch + 1}.", "Lower --lr.")
        total, seen = total + value * len(classes), seen + len(classes)
    return total / seen


def seed_of(seed: int, number: int) -> int:
    """The seed of an epoch or a step by its number, so that no generator's state needs keeping."""
    return (1_000_003 * seed + number) % 2**63
