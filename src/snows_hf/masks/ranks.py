"""In which bases the heads of an attention can lose dimensions at the least cost (turn.py): the last ones go.

Queries and keys: of products qᵀk, over pairs of positions drawn independently, ranks cost the least that are last in

    Σ_q^½ Σ_k^½ = U S Vᵀ,  q' = S^½ Uᵀ Σ_q^-½ q,  k' = S^½ Vᵀ Σ_k^-½ k,

where q'ᵀk' = qᵀk, and E(Σ q'ᵢk'ᵢ)² over dimensions i that go is Σ Sᵢ² (Eckart and Young). Σ_q is around zero, Σ_k
around the mean: what all keys share, a softmax takes out.

Values: group OBS for directions in place of units. With C the covariance of what the out-projection W reads, and
C_h = [(C⁻¹)_hh]⁻¹ what a head has of it that the others do not, a direction costs as W's outputs by it vary: the
eigenvalues of C_h^½ W_hᵀ W_h C_h^½, largest first. The basis is orthonormal.
"""

from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor

from ..adapters.turn import bias_of, turned
from ..adapters.widths import Slot, Width
from .aims import damped
from .evidence import Evidence
from .group_obs import covariance


def turned_for(evidence: Evidence, widths: Iterable[Width]) -> dict[str, Tensor]:
    """The tensors of the attentions whose ranks these widths are, in bases with the dimensions that count in front;
    the network with these computes what it did.

    Args:
        evidence: of the dense network, with images.
    """
    found: dict[str, Tensor] = {}
    names = {w: list(dict.fromkeys(slot.name for slot in (*w.makers[:2], *w.readers))) for w in widths}
    totals = evidence.moments([name for own in names.values() for name in own])
    for width, own in names.items():
        grams = dict(islice(totals, len(own)))
        tensors = {slot.name: evidence.network.tensor(slot.name) for slot in width.slots}
        A = of_products(*(second_moments(tensors, width, slot, grams[slot.name]) for slot in width.makers[:2]))
        name = width.readers[0].name
        C = damped(covariance(grams[name], name in evidence.network.biases)[None])[0]
        found |= turned(tensors, width, A, of_values(tensors[name].detach().double(), C, width))
    return found


def second_moments(tensors: Mapping[str, Tensor], width: Width, maker: Slot, gram: Tensor) -> Tensor:
    """Of each head's queries around zero, or of its keys around their mean, (heads, d, d), with a ridge; from
    Σ [x, 1][x, 1]ᵀ of what the layer reads."""
    slots = (maker, *bias_of(width, maker))
    parts = [slot.part(tensors[slot.name].detach().double(), width.units) for slot in slots]
    W, *bias = (part.reshape(maker.times, width.units, -1) for part in parts)
    moments = W @ covariance(gram, centred=True) @ W.mT
    if maker is width.makers[0]:
        mean = W @ (gram[:-1, -1:] / gram[-1, -1]).double() + (bias[0] if bias else 0)
        moments = moments + mean @ mean.mT
    return damped(moments)


def of_products(queries: Tensor, keys: Tensor) -> Tensor:
    """A (heads, d, d) from the second moments of both."""
    (q, q_inverse), (k, _) = roots(queries), roots(keys)
    U, S, _ = torch.linalg.svd(q @ k)
    return S.sqrt()[:, :, None] * (U.mT @ q_inverse)


def of_values(W: Tensor, C: Tensor, width: Width) -> Tensor:
    """B (heads, d, d) from the out-projection W (rows, heads·d) and the covariance of what it reads."""
    heads, d = width.readers[0].times, width.units
    inverse = torch.linalg.inv(C).unflatten(0, (heads, d)).unflatten(2, (heads, d)).diagonal(dim1=0, dim2=2)
    root, root_inverse = roots(torch.linalg.inv(inverse.movedim(-1, 0)))
    by_head = W.unflatten(1, (heads, d)).movedim(1, 0)
    _, vectors = torch.linalg.eigh(root @ by_head.mT @ by_head @ root)
    return torch.linalg.qr(root_inverse @ vectors.flip(-1)).Q.mT


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """M^½ and M^-½ of positive definite matrices (heads, d, d)."""
    values, vectors = torch.linalg.eigh(moments)
    root = values.sqrt()[:, None]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
