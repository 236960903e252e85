"""How much has to go for a model to be so many times as fast: shares of structures are timed until they reach that,
and of those that do the one is taken that costs least."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.offload import Whole
from ..adapters.widths import Width
from ..data.fidelity import Outputs, agreements, compared
from ..errors import ConfigError, MemoryLimitError
from ..method.streams import split_images
from ..patterns import split_structures
from ..runtime.device import describe_hardware
from ..runtime.distributed import from_main
from ..runtime.journal import Journal, Record
from ..runtime.memory import Images, Tensors, in_parts, out_of_memory
from ..runtime.run import Run
from .bench import ROUNDS, in_turns
from .measure import outputs_on_device
from .smaller import can_be_said, counts_left, resized_to_first, widths_asked_for
from .structure import cut_checkpoint
from .subject import Subject, restore_untouched


Mix = Mapping[str, float]
"""Structures that go together: the share of each, as a multiple of the first one's."""

MIXES: tuple[Mix, ...] = (
    {"mlp": 1},
    {"mlp": 1, "ranks": 1 / 3},
    {"mlp": 1, "ranks": 2 / 3},
    {"ranks": 1},
    {"channels": 1},
    {"mlp": 1, "channels": 1},
)

PARTS = 96
"""Shares are counted in 96ths: halves, thirds, quarters and eighths, which are all that some configurations can say,
are among them; and widths of 192, 384 … stay multiples of what processors like."""

COARSE = (48, 24, 72, 32, 64)
"""Shares, in these parts, one of which a configuration can say that can say any."""

ABOVE = 0.03
"""By how much a time may be better than what was asked for, as a share, before a smaller share is tried."""

PROBES = 7
"""Shares of a mix that are timed, at most."""

DTYPE = torch.float32
"""In which models are timed, as ``snows-hf bench --dense`` does."""


@dataclass(frozen=True)
class Speed:
    """A pattern, and how many times as fast as the dense network it was."""

    pattern: str
    ratio: float


@dataclass(frozen=True)
class Search:
    """What was timed of a mix, and of that the least share that was fast enough, if one was."""

    timed: list[Speed]
    found: Speed | None


def check_can_be_smaller(subject: Subject) -> None:
    """
    Raises:
        ConfigError: no configuration of the model's class says a smaller one.
    """
    if mixes_of(subject):
        return
    there = ", ".join(dict.fromkeys(width.kind for width in widths_asked_for(subject)))
    found = f"its {there} could be cut, but no configuration says so" if there else "it has no units that could be cut"
    raise ConfigError(
        f"{type(subject.network).__name__} cannot be made smaller, which --faster is about: {found}.",
        "Patterns of zeros, such as --pattern 2:4, fit any layer. docs/structured.md names the models.",
    )


def mixes_of(subject: Subject) -> list[list[str]]:
    """Of each mix that a configuration of the model can say, its patterns, from the smallest share on."""
    widths = widths_asked_for(subject)
    kinds = {width.kind for width in widths}
    found = []
    for mix in MIXES:
        if kinds.issuperset(mix):
            few = patterns_of(mix, widths, COARSE)
            if any(can_be_said(subject, counts_left(subject, widths, shares_of(pattern))) for pattern in few):
                found.append(patterns_of(mix, widths, range(1, PARTS)))
    return found


def patterns_of(mix: Mix, widths: Sequence[Width], parts: Sequence[int]) -> list[str]:
    """Patterns of a mix whose first structure loses so many 96ths, each share rounded to whole units of the layer that
    has fewest; without those that leave a structure whole, or nothing of it."""
    fewest = {kind: min(width.units for width in widths if width.kind == kind) for kind in mix}
    found = dict[str, None]()
    for part in parts:
        gone = {kind: round(relation * part / PARTS * fewest[kind]) for kind, relation in mix.items()}
        if all(0 < gone[kind] < fewest[kind] for kind in mix):
            found["+".join(f"{kind}:{count / fewest[kind]:.4g}" for kind, count in gone.items())] = None
    return list(found)


def shares_of(pattern: str) -> dict[str, float]:
    return split_structures(pattern)[0]


def search(patterns: Sequence[str], ratio_of: Callable[[str], float | None], asked: float) -> Search:
    """The least share of a mix that is ``asked`` times as fast, to within :data:`ABOVE` or to the next pattern.

    Times are taken to fall evenly from one timed pattern to the next, which says what to time between them; every
    third time it is the middle.

    Args:
        patterns: from the slowest to the fastest.
        ratio_of: how many times as fast as the dense network one is; None where no configuration says it.
    """
    left, timed, ratio = list(patterns), list[Speed](), None
    while left and (ratio := ratio_of(left[-1])) is None:
        left.pop()
    if ratio is None:
        return Search([], None)
    timed.append(Speed(left[-1], ratio))
    if ratio < asked:
        return Search(timed, None)
    low, slow, high, fast = -1, 1.0, len(left) - 1, ratio
    while high - low > 1 and fast > asked * (1 + ABOVE) and len(timed) < PROBES:
        wanted = 1 / (asked * (1 + ABOVE / 2))
        way = 0.5 if len(timed) % 3 == 0 else (1 / slow - wanted) / (1 / slow - 1 / fast)
        at = min(max(low + round(way * (high - low)), low + 1), high - 1)
        ratio = ratio_of(left[at])
        if ratio is None:
            del left[at]
            high -= 1
            continue
        timed.append(Speed(left[at], ratio))
        if ratio < asked:
            low, slow = at, ratio
        else:
            high, fast = at, ratio
    return Search(timed, Speed(left[high], fast))


def search_all(
    run: Run, mixes: Sequence[Sequence[str]], ratio_of: Callable[[str], float | None], asked: float
) -> Record:
    """:func:`search` of every mix: what was ``timed``, and what was ``found`` and is worth a comparison.

    Raises:
        ConfigError: none is fast enough.
    """
    timed, found = dict[str, Speed](), list[Speed]()
    for mix in run.track(mixes, "Timing smaller models", len(mixes), lambda mix: structures_of(mix[0])):
        one = search(mix, ratio_of, asked)
        timed |= {speed.pattern: speed for speed in one.timed}
        found += [one.found] if one.found is not None else []
    if not found:
        best = max(timed.values(), key=lambda speed: speed.ratio, default=None)
        most = (
            f"the fastest that was measured is {best.ratio:.2f} times as fast, {best.pattern}" if best else "none runs"
        )
        raise ConfigError(
            f"--faster {asked:g}: no smaller model that its configuration can say is so fast here; {most}.",
            "Ask for less.",
        )
    return Record({}, {"timed": list(map(asdict, timed.values())), "found": list(map(asdict, not_beaten(found)))})


def structures_of(pattern: str) -> str:
    return "+".join(shares_of(pattern))


def not_beaten(found: Sequence[Speed]) -> list[Speed]:
    """Without those that lose at least as much as another of every structure, and more of one."""
    shares = {speed.pattern: shares_of(speed.pattern) for speed in found}

    def loses_more(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        return one != other and all(one.get(kind, 0.0) >= share for kind, share in other.items())

    return [
        speed
        for speed in {speed.pattern: speed for speed in found}.values()
        if not any(loses_more(shares[speed.pattern], other) for other in shares.values())
    ]


def timer(run: Run, subject: Subject, batch: int) -> Callable[[str], float | None]:
    """Times a smaller network of a pattern's shape and the dense one in turns, on ``batch`` random images: see
    :func:`search`, whose ``ratio_of`` it is. Each pattern is timed once.

    Raises:
        MemoryLimitError: memory does not suffice for so many images.
    """
    widths, shape = widths_asked_for(subject), subject.checkpoint.image().shape[1:]
    dense = deepcopy(subject.network).to(run.device, DTYPE)
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(run.device)

    @cache
    def ratio_of(pattern: str) -> float | None:
        keep = counts_left(subject, widths, shares_of(pattern))
        if not can_be_said(subject, keep):
            return None
        smaller = resized_to_first(subject, keep).model.to(run.device, DTYPE)
        try:
            with torch.inference_mode():
                found = in_turns({"dense": partial(dense, images), "smaller": partial(smaller, images)})
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            fault = f"Timing {batch} images at a time: memory does not suffice."
            raise MemoryLimitError(fault, "Give a smaller --faster-batch.") from error
        turns = f"{found['least']:.2f} to {found['most']:.2f} in {ROUNDS} turns"
        run.say(f"{pattern}: {found['ratio']:.2f} times as fast ({turns}, {found['smaller_ms']:.1f} ms)")
        return found["ratio"]

    return ratio_of


def choose_pattern(
    run: Run, subject: Subject, asked: float, batch: int, images: Images, labels: Tensor | None
) -> tuple[str, dict[str, Any]]:
    """The pattern that makes a model ``asked`` times as fast at the least loss, and what the report says of it; as an
    earlier run has timed and compared, where there was one.

    Args:
        asked: above 1.
        batch: images at a time.
        images: that units are chosen by; held-out ones compare the patterns.
        labels: the model's class of each image (n,), if the criterion of units needs them.

    Raises:
        ConfigError: no smaller model is so fast.
        MemoryLimitError: memory does not suffice for so many images at a time.
    """

    def decide() -> Record:
        run.say(f"Timing smaller models, {images_in_words(batch)} at a time, to find what is {asked:g} times as fast")
        return search_all(run, mixes_of(subject), timer(run, subject, batch), asked)

    speeds = run.journal.once("faster", decide).facts
    choices = []
    for i, speed in enumerate(run.track(speeds["found"], "Comparing patterns", len(speeds["found"]), pattern_in)):
        choice = speed | loss_once(run, subject, f"faster-{i}", speed["pattern"], images, labels)
        loss = f"{choice['by']} {choice['loss']:.4g} on {images_in_words(choice['images'])} held out"
        run.say(f"{choice['pattern']}: {choice['ratio']:.2f} times as fast, {loss}")
        choices.append(choice)
    restore_untouched(subject.network, subject.original, [])
    best = min(choices, key=lambda choice: choice["loss"])
    run.say(f"Chosen: {best['pattern']}")
    facts = {"asked": asked, "measured": best["ratio"], "batch": batch, "dtype": str(DTYPE).removeprefix("torch.")}
    facts |= {"hardware": describe_hardware(run.device), "choices": choices, "timed": speeds["timed"]}
    return best["pattern"], facts


def images_in_words(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"


def pattern_in(speed: Mapping[str, Any]) -> str:
    return str(speed["pattern"])


def loss_once(
    run: Run, subject: Subject, record: str, pattern: str, images: Images, labels: Tensor | None
) -> dict[str, Any]:
    """:func:`loss_of` the network that a pattern leaves, its units chosen and repaired by all images but those held
    out, which judge; with their number. Kept under the name of a ``record``."""
    kept = run.journal.get(record)
    if kept is not None:
        return kept.facts
    *learners, judges = split_images(len(images), subject.config.batch_size, subject.config.held_out)
    count = learners[-1].stop
    keep = counts_left(subject, widths_asked_for(subject), shares_of(pattern))
    alone = replace(run, journal=Journal())  # these units are not those of the result
    one_view = replace(subject, config=subject.config.updated(views=1))
    labels = None if labels is None else labels[:count]
    checkpoint, _ = cut_checkpoint(alone, one_view, keep, images.first(count), labels)
    smaller = checkpoint.model.to(run.device, run.dtype)
    network = subject.network if subject.chain.offloaded is None else Whole(subject.chain)
    models = outputs_on_device(network), outputs_on_device(smaller)
    facts = from_main(lambda: loss_of(*models, images[judges], checkpoint.is_classifier))
    facts |= {"images": judges.stop - judges.start}
    run.journal.put(record, **facts)
    return facts


@torch.no_grad()
def loss_of(dense: Outputs, smaller: Outputs, images: Tensor, classifier: bool) -> dict[str, Any]:
    """How far a smaller model is from the dense one on images (n, 3, height, width): ``loss``, and ``by`` what it is
    counted: ``divergence`` of a classifier's probabilities from the dense one's, the mean in nats; else the
    ``error``, the norm of the difference of the last outputs over that of the dense one."""

    def compare(state: Tensors) -> Tensors:
        expected, found = dense(state[0]), smaller(state[0])
        name = "logits" if classifier else list(expected)[-1]
        return ((agreements if classifier else compared)(expected[name], found[name]).cpu(),)

    (rows,) = in_parts(compare, (images,))
    if classifier:
        return {"loss": float(rows[:, 1].mean()), "by": "divergence"}
    difference, own, _ = rows.sum(0).tolist()
    return {"loss": (difference / own) ** 0.5 if own else difference**0.5, "by": "error"}
