"""What a mask criterion is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..evidence import Evidence


@dataclass(frozen=True)
class Choice:
    """What a criterion decided.

    Attributes:
        masks: parameter name → bool mask (True: kept) of the parameter's shape.
        weights: full weights, zero where masked, of a criterion that updates what it keeps; empty for the others. Of
            layers without a mask, too, where it moves such.
        facts: what the report should say about how it was decided.
        scores: what the masks were ranked by, where a criterion has both scores and facts.
    """

    masks: dict[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def free(self) -> dict[str, Tensor]:
        """The weights of layers without a mask."""
        return {name: weight for name, weight in self.weights.items() if name not in self.masks}


Score = Callable[[Evidence], dict[str, Tensor] | Choice]
"""Evidence → scores by parameter name, of the weights' shapes, of which the pattern keeps the highest; or a whole
:class:`Choice`, where a criterion makes its masks itself."""
