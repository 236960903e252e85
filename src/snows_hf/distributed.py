"""Several processes on the same work, as `accelerate launch` starts them; alone, everything here does nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed

from .errors import SnowsError


T = TypeVar("T")


def processes() -> int:
    """How many work together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 is the main process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives on the main process, on all of them; an error of ours there is raised on all of them."""
    if processes() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except SnowsError as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    made: T = outcome[0]
    return made
