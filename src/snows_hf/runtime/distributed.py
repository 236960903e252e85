"""Several processes on the same work, as `accelerate launch` starts them; alone, everything here does nothing.

Each has its :class:`Share` of every batch. What is a sum over images is summed over processes, so that all of them
solve the same systems, of the whole batch, and come to the same weights.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch.distributed
from torch import Tensor

from ..errors import ProcessError, SnowsError, one_line
from .memory import out_of_memory


T = TypeVar("T")

_ON_MAIN = ContextVar("_ON_MAIN", default=False)
"""Whether this is work that the other processes wait for."""


@contextmanager
def together() -> Iterator[None]:
    """A call that needs all processes.

    Raises:
        ProcessError: another of them has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise ProcessError(
            f"Another process has ended, and this one cannot go on alone: {one_line(error)}",
            "Its own message says why. The same command goes on from what is finished.",
        ) from error


def processes() -> int:
    """How many work together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, also before they have met; 0 is the main process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ.get("RANK", 0))


def local_processes() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if processes() > 1 else 1


@dataclass(frozen=True)
class Share:
    """Images ``start`` to ``stop`` of a batch of ``total``: what one process has.

    Attributes:
        weight: 1, or 0 for a process that a small batch leaves without an image: it borrows one, which counts nothing.
        alone: there are no others to sum with.
    """

    total: int
    start: int
    stop: int
    weight: float = 1.0
    alone: bool = True

    def every(self, count: int, place: int) -> "Share":
        """This process's share of each ``count``-th image of the batch, from ``place`` on: there must be one."""
        before = [len(range(place, end, count)) for end in (self.total, self.start, self.stop)]
        return replace(self, total=before[0], start=before[1], stop=before[2])

    def sum(self, tensor: Tensor) -> Tensor:
        """Σ tensor over the processes, see :func:`together`, the same on all; half precision is summed in float32."""
        if self.alone:
            return tensor
        total = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True).contiguous()
        with together():
            torch.distributed.all_reduce(total)
        return total.to(tensor.dtype)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the whole batch, of ``tensor``'s that are means over the images of each process."""
        return self.sum(tensor * (self.weight * (self.stop - self.start) / self.total))

    def variance(self, y: Tensor) -> float:
        """The variance of all entries of a tensor that has the images along its first dimension; of entries that do
        not vary, their mean square, and 1 where all are zero."""
        n = y[0].numel() * self.total
        if n == 1:
            variance = 0.0
        elif self.alone:
            variance = float(y.to(torch.promote_types(y.dtype, torch.float32)).var())
        else:
            mean = self.mean(y.double().mean())
            variance = float(self.mean((y.double() - mean).square().mean())) * n / (n - 1)
        return variance or float(self.mean(y.double().square().mean())) or 1.0


def whole(total: int) -> Share:
    """All images of a batch, with nobody to share them with."""
    return Share(total, 0, total)


def own_part(total: int) -> slice:
    """This process's part of so many things: as many as any other's, but for one."""
    n, place = processes(), rank()
    return slice(total * place // n, total * (place + 1) // n) if n > 1 else slice(0, total)


def share(total: int) -> Share:
    """This process's part of a batch."""
    own = own_part(total)
    start = min(own.start, total - 1)
    return Share(total, start, max(own.stop, start + 1), float(own.start < own.stop), alone=processes() == 1)


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives on the main process, on all of them (see :func:`together`); an error of ours there is raised
    on all. What ``make`` itself asks of the main process it gets at once."""
    if processes() == 1 or _ON_MAIN.get():
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        within = _ON_MAIN.set(True)
        try:
            outcome[0] = make()
        except SnowsError as error:
            outcome[1] = error
        finally:
            _ON_MAIN.reset(within)
    with together():
        torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])
