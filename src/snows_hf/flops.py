"""Floating-point operations of a forward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flops(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Operations on one image by module name, ``""`` being the whole model. A multiply-add counts as two.

    Args:
        model: whose parameters say device and type.
        image: (1, 3, height, width).
    """
    parameter = next(model.parameters())
    # MATH: torch does not count the fused attention of CPUs.
    counter: Any = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(image.to(parameter.device, parameter.dtype))
    counts = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    root = f"{type(model).__name__}."
    return {name.removeprefix(root): n for name, n in counts.items() if name != "Global"} | {"": counts["Global"]}
