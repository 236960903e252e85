"""Which weights stay: criteria, what they may look at, and how a pattern is shared out among the layers."""

from .choose import choose, choose_masks, load_masks, split_by_fit
from .evidence import Evidence
from .scores import Choice


__all__ = ["Choice", "Evidence", "choose", "choose_masks", "load_masks", "split_by_fit"]
