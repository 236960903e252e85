"""How far an operation's output o is from its target y, as one term of the loss: what Eq. 4 to 7 need to know of it.

Each term has a value, a gradient u in o, a positive semi-definite second derivative C in o (of Gauss-Newton), and a
square root of C: √C s has the covariance C for random signs s, which is how diagonals are estimated.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.functional import kl_div


class Distance(Protocol):
    """One term of the loss, on outputs o (n, …) of n images."""

    def value(self, o: Tensor) -> Tensor: ...

    def gradient(self, o: Tensor) -> Tensor: ...

    def curvature(self, o: Tensor, t: Tensor) -> Tensor: ...

    def root(self, o: Tensor, s: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SquaredError:
    """c ‖o - y‖²."""

    y: Tensor
    c: float

    def value(self, o: Tensor) -> Tensor:
        return self.c * (o - self.y).square().sum()

    def gradient(self, o: Tensor) -> Tensor:
        return 2 * self.c * (o - self.y)

    def curvature(self, o: Tensor, t: Tensor) -> Tensor:
        return 2 * self.c * t

    def root(self, o: Tensor, s: Tensor) -> Tensor:
        return (2 * self.c) ** 0.5 * s


@dataclass(frozen=True)
class Divergence:
    """c Σ KL(softmax(y) ‖ softmax(o)) over images, for logits (n, classes). C: c (diag(p) - p pᵀ), p = softmax(o)."""

    y: Tensor
    c: float

    def value(self, o: Tensor) -> Tensor:
        return self.c * kl_div(o.log_softmax(-1), self.y.log_softmax(-1), reduction="sum", log_target=True)

    def gradient(self, o: Tensor) -> Tensor:
        return self.c * (o.softmax(-1) - self.y.softmax(-1))

    def curvature(self, o: Tensor, t: Tensor) -> Tensor:
        p = o.softmax(-1)
        return self.c * p * (t - (p * t).sum(-1, keepdim=True))

    def root(self, o: Tensor, s: Tensor) -> Tensor:
        p = o.softmax(-1)
        scaled = p.sqrt() * s
        return self.c**0.5 * (scaled - p * scaled.sum(-1, keepdim=True))
