"""What is asked of the machine, and known of the processes, before torch is loaded."""

import math
import os

from ..errors import ConfigError


def launched_rank() -> int:
    """Which of several processes this one was started as; 0 is the main process."""
    return int(os.environ.get("RANK", 0))


def check_device(device: str) -> None:
    """
    Raises:
        ConfigError: an unknown name. Whether the machine has the device only torch can tell.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"Device {device!r}: expected auto, cpu or cuda.")


def check_memory(memory: float | None) -> None:
    """
    Raises:
        ConfigError: not a budget at all.
    """
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"Setting memory = {memory}: expected a number of GB above 0.")
