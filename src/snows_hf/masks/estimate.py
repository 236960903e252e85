"""How long it will take to fit layers and to choose what they keep, from a few images and layers that are timed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..adapters.frozen import frozen
from ..method.estimate import MORE, WORTH_SAYING, in_words, pass_seconds, timed
from ..runtime.run import Run
from .aims import AT_ONCE, Fit, halfway_fits, importance, probed
from .evidence import Evidence


PASSES = 10
"""What fitting all layers to one view of the images takes at the least, in passes of these through the network."""

Settle = Callable[[Evidence, Fit], object]
"""What is done with a layer's fit, as it is timed."""


@dataclass(frozen=True)
class Times:
    """Seconds of what comes before the layers, and of each layer: for its fit to one view of the images, of which
    several take as many times as long, and for what is done with that."""

    probing: float
    fitting: dict[str, float]
    settling: dict[str, float]

    def of_layers(self, views: int) -> dict[str, float]:
        return {name: views * seconds + self.settling[name] for name, seconds in self.fitting.items()}

    def in_words(self, views: int) -> str:
        return in_words(self.probing + sum(self.of_layers(views).values()))


def tell_estimate(evidence: Evidence, settle: Settle, what: str) -> dict[str, float]:
    """Says how long it will take to fit layers halfway (aims.py), to masks or repairs, before the work begins; not of
    work that goes on.

    Returns:
        The seconds of each layer, by its weight's name, if the work is long.
    """
    run, views = evidence.run, evidence.config.views
    if any(name.startswith(f"{evidence.record}-layer-") for name in run.journal.names()):
        return {}
    times = estimated_times(evidence, settle)
    if times is None:
        return {}
    once = f"; with --effort quick, one view of each image, about {times.in_words(1)}" if views > 1 else ""
    run.say(f"The {what} will take about {times.in_words(views)} on this machine{once}")
    return times.of_layers(views)


def estimated_times(evidence: Evidence, settle: Settle) -> Times | None:
    """None where the work is not long. Of groups of layers with the same shapes the first is timed."""
    chain, count, layers = evidence.network, len(evidence.calibration), evidence.fitted
    images = evidence.calibration[: min(AT_ONCE, evidence.config.batch_size)]  # as many as are fitted at a time
    few = replace(evidence, images=images, run=Run(), config=evidence.config.updated(views=1))
    fewer = images[:MORE].to(chain.device)
    if evidence.config.views * PASSES * pass_seconds(chain, fewer, count) < WORTH_SAYING:
        return None
    with frozen(chain.model):
        weights, probing = timed(chain, lambda: importance(replace(few, images=fewer)))
    own = map(evidence.fitted_in, chain.operations)
    kinds = {tuple(names): tuple(layers[name].shape for name in names) for names in own if names}
    known, done = dict[tuple[torch.Size, ...], tuple[float, float]](), dict[str, Tensor]()
    fits = halfway_fits(few, done, weights)

    for names, kind in kinds.items():
        if len(known) == len(set(kinds.values())):
            break
        waited = decided = 0.0
        for name in names:
            fit, seconds = timed(chain, lambda: next(fits))
            waited += seconds
            if kind not in known:
                decided += timed(chain, partial(settle, few, fit))[1]
            done[name] = layers[name]
        known.setdefault(kind, (waited * count / len(images), decided))
    each = {name: [part / len(names) for part in known[kind]] for names, kind in kinds.items() for name in names}
    fitting, settling = ({name: parts[i] for name, parts in each.items()} for i in (0, 1))
    return Times(probing * probed(evidence) / len(fewer), fitting, settling)
