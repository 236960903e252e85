"""Wanda: |W_rj|·‖X_j‖₂, compared within each output row (Sun et al., 2024, Eq. 1).

‖X_j‖ is over all images and positions that the dense layer reads; for a convolution j is an input channel at a kernel
position, and of a grouped one the channels are those of the row's own group.
"""

import torch
from torch import Tensor

from ...patterns import NM
from ..evidence import Evidence, matrix, unmatrix


def wanda(evidence: Evidence) -> dict[str, Tensor]:
    scores = {}
    for name, H in evidence.grams():
        weight = evidence.weights[name]
        norms = H.diagonal(dim1=-2, dim2=-1).sqrt().to(weight.device)  # (groups, d)
        rows = matrix(weight).abs() * norms.repeat_interleave(len(weight) // len(norms), 0)
        if not isinstance(evidence.pattern.of(name), NM):
            # Ranks within the row, as a share of it: every row loses the same share, in whatever scope.
            rows = rows.argsort(dim=1, stable=True).argsort(dim=1).to(torch.float64) / rows.shape[1]
        scores[name] = unmatrix(rows, weight.shape)
    return scores
