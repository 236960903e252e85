"""SNIP: |θ·g|, the change of the task loss to first order (Lee et al., 2019, Eq. 6; it normalises by the sum, which
ranks the same)."""

from torch import Tensor

from ..evidence import Evidence


def snip(evidence: Evidence) -> dict[str, Tensor]:
    return evidence.everything.scatter((evidence.theta() * evidence.gradient()).abs())
