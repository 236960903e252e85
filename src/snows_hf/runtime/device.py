"""Where a job computes, and what that is."""

import os
import platform
from datetime import timedelta

import accelerate
import torch
from accelerate import InitProcessGroupKwargs

from ..errors import ConfigError
from .launch import check_device


def find_device(device: str) -> torch.device:
    """``auto`` is CUDA where torch finds it, else the CPU; of several processes each gets a device of its own.

    Raises:
        ConfigError: an unknown name, or a device that this machine has not.
    """
    check_device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("Device cuda was asked for, and torch finds none here.", "Use --device cpu.")
    # Never another accelerator by itself: Apple's has no float64, in which masks are chosen.
    cuda = device != "cpu" and torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # accelerate would keep to the first device that was asked for
        return torch.device("cuda" if cuda else "cpu")
    # While the main process measures or saves, the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    own = accelerate.Accelerator(cpu=not cuda, kwargs_handlers=[patience]).device
    return own if cuda else torch.device("cpu")


def make_reproducible(device: torch.device) -> None:
    """For a job whose seed decides the bits of its result: from here on torch leaves out, on CUDA, what adds in the
    order of the moment, and warns where it cannot."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def describe_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''} ({platform.machine()})"
