"""Two streams of activations side by side: what the dense network computes, and what the network pruned so far does.

The first gives the targets, the second enters each layer. With dense targets every layer also repairs what earlier
ones broke; with cascaded targets (the paper's) the dense layer runs on the pruned stream. What earlier layers broke
is partly of these very images, and to make up for it fits others less: halfway between both is less of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..adapters import Chain, Group, Operation, State, frozen
from ..adapters.base import run_operation
from ..patterns import Masks
from ..runtime.distributed import share
from ..runtime.memory import Images, Kept, Shelf, halves, in_parts
from ..settings import PruneConfig
from .augment import augmented
from .objective import ActiveWeights, KStepObjective, Segment


@dataclass
class Streams:
    """Activations before one operation, per batch of images (of this process's share of them): of the dense network,
    and of the one pruned so far. The last batch only judges. ``halvings``: how often batches were halved."""

    shelf: Shelf
    dense: list[Kept]
    pruned: list[Kept]
    batches: list[slice]
    halvings: int = 0

    @classmethod
    def start(cls, images: Tensor | Images, batches: Sequence[slice], shelf: Shelf) -> "Streams":
        parts = [(batch.start, share(batch.stop - batch.start)) for batch in batches]
        states = [shelf.keep((images[first + part.start : first + part.stop],)) for first, part in parts]
        return cls(shelf, states, list(states), list(batches))

    def size(self, index: int) -> int:
        """Images of a batch, of all processes together."""
        return self.batches[index].stop - self.batches[index].start

    @property
    def largest(self) -> int:
        """Images of the largest batch."""
        return max(map(self.size, range(len(self.batches))))

    def halve(self) -> None:
        """Cuts every batch in two; of the one that judges, only the first half stays."""
        parts = [halves(batch) for batch in self.batches]
        parts[-1] = parts[-1][:1]
        for states in (self.dense, self.pruned):
            states[:] = [
                self.shelf.keep(tuple(t[part.start - batch.start : part.stop - batch.start] for t in state))
                for batch, own, state in zip(self.batches, parts, map(Kept.get, states), strict=True)
                for part in own
            ]
        self.batches = [part for own in parts for part in own]
        self.halvings += 1

    def advance(self, operation: Operation, which: str, device: torch.device) -> None:
        """Moves one stream through an operation, batch by batch."""
        states: list[Kept] = getattr(self, which)
        for i in range(len(states)):
            states[i] = self.shelf.keep(through(operation, states[i].get(), device))


def through(operation: Operation, state: State, device: torch.device) -> State:
    """A state that rests on the CPU after an operation that runs on a device, in halves where memory runs out."""

    def there_and_back(part: State) -> State:
        return send_to_device(run_operation(operation, send_to_device(part, device)), torch.device("cpu"))

    return in_parts(there_and_back, state)


def split_images(n: int, batch_size: int, held_out: float) -> list[slice]:
    """n images as slices: mini-batches of equal size but for one image, and last the held-out batch; each of at most
    ``batch_size``. A single image serves as both batch and judge."""
    judges = min(max(1, round(held_out * n)), max(n - 1, 1), batch_size)
    learners = max(n - judges, 1)
    count = -(-learners // batch_size)
    ends = [learners * i // count for i in range(count + 1)]
    return [*(slice(*pair) for pair in pairwise(ends)), slice(n - judges, n)]


@contextmanager
def holding(chain: Chain, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """For the time of the block the chain's model computes with ``weights``, or buffers; nothing is copied."""
    tensors = {name: chain.tensor(name) for name in weights}
    own = {name: tensor.data for name, tensor in tensors.items()}
    for name, weight in weights.items():
        tensors[name].data = weight
    try:
        yield
    finally:
        for name, weight in own.items():
            tensors[name].data = weight


@dataclass(frozen=True)
class Teacher:
    """The dense network that a smaller one, cut out of it, is fitted to: its chain has the same operations.

    Attributes:
        alike: of each operation, whether its output has the same shape in both: only these are compared.
    """

    chain: Chain
    alike: tuple[bool, ...]

    @classmethod
    def of(cls, chain: Chain, smaller: Chain, images: Tensor) -> "Teacher":
        """The dense ``chain`` as the teacher of a ``smaller`` one, both run on some images."""
        shapes = []
        for each in (chain, smaller):
            state: State = (images.to(each.device),)
            with torch.no_grad(), frozen(each.model):
                shapes.append([output.shape for output in each(state)])
        return cls(chain, tuple(one == other for one, other in zip(*shapes, strict=True)))

    def targets(self, segment: Segment, state: State) -> list[Tensor | None]:
        """Outputs of a segment of the smaller chain, from what enters it here; None of those that are not alike."""
        outputs = replace(segment, chain=self.chain).outputs(state)
        alike = self.alike[segment.start : segment.stop]
        return [output if same else None for output, same in zip(outputs, alike, strict=True)]


def halfway(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The mean of two outputs, where there are two."""
    return None if one is None or other is None else torch.lerp(one, other, 0.5)


@dataclass(frozen=True)
class Batches:
    """The objectives of one layer, each made when its turn comes and freed after. ``dense`` stand in for the model's
    own weights where targets are computed, or the ``teacher`` computes them; ``order`` is of steps, with the batch of
    each."""

    segment: Segment
    dense: Mapping[str, Tensor]
    active: ActiveWeights
    streams: Streams
    config: PruneConfig
    order: Sequence[tuple[int, int]]
    teacher: Teacher | None = None

    def objective(self, index: int, step: int | None = None) -> KStepObjective:
        """That of one batch at a step: there images may be augmented, and half precision may do. None: as it is."""
        joint = self.segment.group.kind == "joint"
        part = share(self.streams.size(index))
        pruned: State = send_to_device(self.streams.pruned[index].get(), self.segment.chain.device)
        source = pruned
        if self.config.augment and joint and step is not None:  # elsewhere what comes in is not images
            source = pruned = (augmented(pruned[0], 1000 * self.config.seed + step, part),)
        elif self.config.targets != "cascaded":
            source = self.streams.dense[index].get()
        targets = self.targets(send_to_device(source, self.segment.chain.device))
        if self.config.targets == "halfway" and not joint and step is not None:
            targets = list(map(halfway, targets, self.targets(pruned)))
        autocast = self.config.autocast and step is not None
        return KStepObjective(self.segment, self.active, pruned, self.config, targets, part, autocast, step or 0)

    @torch.no_grad()
    def targets(self, state: State) -> Sequence[Tensor | None]:
        """What the outputs of the segment should be, from what enters it in the dense network."""
        if self.teacher is not None:
            return self.teacher.targets(self.segment, state)
        with holding(self.segment.chain, self.dense):
            return self.segment.outputs(state)

    def __iter__(self) -> Iterator[KStepObjective]:
        return (self.objective(index, step) for step, index in self.order)


def masked_operations(chain: Chain, masks: Masks) -> list[int]:
    """Operations whose group has a mask."""
    return [i for i, group in chain.groups() if any(name in masks for name in group.parameters)]


def moved(chain: Chain, masks: Masks, biases: bool) -> list[str]:
    """Names of all parameters that a prune with these masks moves: weights and, where they move too, their biases."""
    return [*masks, *(bias for weight, bias in chain.biases.items() if biases and weight in masks)]


def whole_network(chain: Chain, masks: Masks, name: str = "all layers") -> Segment:
    """The network from its images on, with all pruned weights as one group."""
    names = tuple(name for _, group in chain.groups() for name in group.parameters if name in masks)
    biases = tuple((weight, bias) for weight, bias in chain.biases.items() if weight in masks)
    return Segment(chain, Group(name, names, "joint", biases), 0, len(chain.operations))
