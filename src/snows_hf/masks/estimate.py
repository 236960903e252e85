"""How long it will take to fit layers and to choose what they keep, from a few images and layers that are timed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..adapters.frozen import frozen
from ..method.estimate import MORE, WORTH_SAYING, in_words, pass_seconds, timed
from ..runtime.run import Run
from .aims import AT_ONCE, PROBED, Fit, halfway_fits, importance
from .evidence import Evidence


PASSES = 10
"""What fitting all layers to one view of the images takes at the least, in passes of these through the network."""

Settle = Callable[[Evidence, Fit], object]
"""What is done with a layer's fit, as it is timed."""


def tell_estimate(evidence: Evidence, settle: Settle, what: str) -> None:
    """Says how long it will take to fit layers halfway (aims.py), to masks or repairs, before the work begins; not of
    work that goes on."""
    run, views = evidence.run, evidence.config.views
    if any(name.startswith(f"{evidence.record}-layer-") for name in run.journal.names()):
        return
    found = estimated_seconds(evidence, settle)
    if found is not None:
        fixed, each = found
        once = f"; with --effort quick, one view of each image, about {in_words(fixed + each)}" if views > 1 else ""
        run.say(f"The {what} will take about {in_words(fixed + views * each)} on this machine{once}")


def estimated_seconds(evidence: Evidence, settle: Settle) -> tuple[float, float] | None:
    """Seconds however many images there are, and seconds for one view of each; None where it is not long. Of groups
    of layers with the same shapes the first is timed."""
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
        known.setdefault(kind, (decided, waited * count / len(images)))
    fixed, each = (sum(costs) for costs in zip(*(known[kind] for kind in kinds.values()), strict=True))
    return fixed + probing * min(PROBED[0], count) / len(fewer), each
