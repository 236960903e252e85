"""What is asked of the machine, and known of the processes, before torch is loaded."""

import math
import os

from ..errors import ConfigError


def launched_rank() -> int:
    """Which of several processes this one was started as; 0 is the main process."""
    return int(os.environ.get("RANK", 0))


def check_device(device: str) -> None:
    """Refuses, with a :class:`ConfigError`, an unknown name; whether the machine has it only torch can tell."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"Device {device!r}: expected auto, cpu or cuda.")


def check_memory(memory: float | None) -> None:
    """Refuses, with a :class:`ConfigError`, what is no budget at all."""
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"Setting memory = {memory}: expected a number of GB above 0.")
