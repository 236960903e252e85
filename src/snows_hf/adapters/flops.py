"""Floating-point operations of a forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from . import Chain, frozen, outputs_of


@torch.no_grad()
def count_flops(chain: Chain, image: Tensor) -> dict[str, int]:
    """Operations on one image (1, 3, height, width) by the model's module names, ``""`` being the whole model. A
    multiply-add counts as two.

    Modules are counted on the chain, which calls all that own a prunable weight; a model may use the weight alone.
    """
    parameter = next(chain.parameters())
    image = image.to(parameter.device, parameter.dtype)

    def counted(run: Callable[[], object]) -> dict[str, int]:
        # MATH: torch does not count the fused attention of CPUs. Frozen: the counter's hooks need no gradients.
        counter: Any = FlopCounterMode(display=False)
        with frozen(chain.model), counter, sdpa_kernel(SDPBackend.MATH):
            run()
        return {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}

    root = f"{type(chain).__name__}.model."
    modules = {name.removeprefix(root): n for name, n in counted(lambda: chain((image,))).items()}
    return modules | {"": counted(lambda: outputs_of(chain.model, image))["Global"]}
