"""Random: uniform scores. What every other criterion has to beat."""

import torch
from torch import Tensor

from ..evidence import Evidence


def random(evidence: Evidence) -> dict[str, Tensor]:
    # Drawn on the CPU, so that a seed means the same masks on every device.
    generator = torch.Generator().manual_seed(evidence.config.seed)
    return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in evidence.weights.items()}
