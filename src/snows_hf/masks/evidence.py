"""What a mask criterion may look at: weights, and, where they were given, the network, images and labels."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..adapters.base import Chain, Operation, State
from ..adapters.frozen import frozen
from ..errors import MaskError, NumericsError
from ..method.augment import views
from ..method.newton import Expansion
from ..method.objective import ActiveWeights, KStepObjective, Segment, hessian_expansion
from ..method.preconditioner import gram, recorded
from ..method.streams import through
from ..patterns import Full, Pattern
from ..runtime.memory import Images, Kept, Shelf
from ..runtime.run import Run
from ..settings import PruneConfig


GRAM_ENTRIES = 2**26
"""Most numbers in the Gram matrices that are there at a time (256 MB in float32), but for one layer that has more."""

REMEDY = "Use --dtype float32 or float64, or a criterion that reads weights alone, such as magnitude."


@dataclass(frozen=True)
class Linearisation:
    """A batch's K-step loss around the dense weights w (m,): its share of all images, and every operation's output,
    attached to w, with the loss's second derivative in each of its entries (C)."""

    share: float
    w: Tensor
    outputs: list[tuple[float, Tensor]]


@dataclass(frozen=True)
class Evidence:
    """The dense network before any layer is pruned. Criteria read it and never change it.

    Attributes:
        weights: those to choose from, by parameter name: those that the pattern fits.
        chain: None where a criterion has weights only.
        images: preprocessed (n, 3, h, w), or None.
        labels: the model's class of each image (n,), or None.
        run: its journal keeps masks that are chosen layer by layer.
        record: under which name.
        free: weights of layers that stay dense, which criteria that fit layers may move; others leave them alone.
        teacher: the dense network, where the chain is of a smaller one that was cut out of it.
    """

    weights: Mapping[str, Tensor]
    pattern: Pattern
    config: PruneConfig
    chain: Chain | None = None
    images: Tensor | Images | None = None
    labels: Tensor | None = None
    run: Run = field(default_factory=Run)
    record: str = "choice"
    free: Mapping[str, Tensor] = field(default_factory=dict)
    teacher: Chain | None = None

    @property
    def network(self) -> Chain:
        """The chain, where there must be one.

        Raises:
            MaskError: there is none.
        """
        if self.chain is None:
            raise MaskError(f"Mask criterion {self.config.mask!r} needs the network, and only weights were given.")
        return self.chain

    def fitted_in(self, operation: Operation) -> list[str]:
        """Those of ``weights`` and ``free`` that act in an operation, by name."""
        own = operation.group.parameters if operation.group else ()
        return [name for name in own if name in self.weights or name in self.free]

    @property
    def fitted(self) -> dict[str, Tensor]:
        """``weights`` and ``free``, by name, in the order in which they act."""
        names = (name for operation in self.network.operations for name in self.fitted_in(operation))
        return {name: self.weights[name] if name in self.weights else self.free[name] for name in names}

    def loses_weights(self, name: str) -> bool:
        """Whether zeros come into a layer, by its weight's name."""
        return name in self.weights and not isinstance(self.pattern.of(name), Full)

    @property
    def title(self) -> str:
        """What is chosen, in words."""
        return "units" if isinstance(self.pattern, Full) else f"{Path(self.config.mask).name} masks"

    @property
    def everything(self) -> ActiveWeights:
        """All of ``weights`` as one vector θ (m,)."""
        return ActiveWeights({name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()})

    def theta(self) -> Tensor:
        """θ (m,), in the precision in which the network computes."""
        return self.everything.within(self.network)

    def ranked(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masks (True: kept) that the pattern makes of scores.

        Raises:
            NumericsError: a score is no number.
        """
        for name, score in scores.items():
            if score.isnan().any():
                raise NumericsError(
                    f"Mask criterion {self.config.mask!r} gives scores for {name} that are no numbers.", REMEDY
                )
        return self.pattern.masks(scores)

    @property
    def calibration(self) -> Tensor | Images:
        """The calibration images, where there must be some.

        Raises:
            MaskError: there are none.
        """
        if self.images is None:
            raise MaskError(f"Mask criterion {self.config.mask!r} needs calibration images, and none were given.")
        return self.images

    def batches(self, size: int | None = None) -> Iterator[Tensor]:
        """All calibration images on the network's device, ``size`` at a time (the solver's batch size for None).

        Raises:
            MaskError: there are none.
        """
        images, size = self.calibration, size or self.config.batch_size
        batches = self.run.track(images.split(size), f"Images for {self.title}", -(-len(images) // size))
        yield from (batch.to(self.network.device) for batch in batches)

    def states(self, size: int | None = None, count: int = 1) -> tuple[Shelf, list[Kept]]:
        """What enters the chain, of :meth:`batches`, each in so many views (augment.py), and the shelf where it rests:
        the images' own, as the cascade's streams."""
        shelf = self.images.shelf if isinstance(self.images, Images) else Shelf()
        seeds = (range(start, start + count) for start in itertools.count(1000 * self.config.seed, count))
        batches = zip(self.batches(size), seeds, strict=False)  # of seeds there is no end
        return shelf, [shelf.keep((view,)) for batch, own in batches for view in views(batch.cpu(), own)]

    def task(self, size: int | None = None) -> Iterator[tuple[float, Expansion]]:
        """The task loss, mean cross-entropy over a batch of labelled images, expanded at θ; batch after batch.

        Each comes with its share of all images, so that Σ share · loss is the loss over all of them. An expansion is
        good until the next one is asked for. Every image is a batch of its own for ``size`` 1.

        Raises:
            MaskError: there are no labels.
        """
        if self.labels is None:
            raise MaskError(
                f"Mask criterion {self.config.mask!r} needs labels, and the calibration images have none.",
                "Use labelled images, or a criterion without labels such as magnitude, wanda or obc.",
            )
        chain, theta, everything = self.network, self.theta().requires_grad_(), self.everything
        done = 0
        with frozen(chain.model):
            for batch in self.batches(size):
                labels = self.labels[done : done + len(batch)].to(batch.device)
                done += len(batch)
                logits = chain.outputs((batch,), 0, len(chain.operations), everything.scatter(theta))[-1]
                yield len(batch) / len(self.labels), hessian_expansion(F.cross_entropy(logits, labels), theta)

    def gradient(self) -> Tensor:
        """g = ∂L/∂θ (m,) of the task loss over all images."""
        start = torch.zeros_like(self.theta())
        return sum((share * expansion.gradient for share, expansion in self.task()), start)

    def k_step(self) -> Iterator[tuple[ActiveWeights, Iterator[Linearisation]]]:
        """Group after group: its weights, and its K-step loss (Eq. 3) around the dense weights, batch by batch.

        There the residuals vanish: the loss has no gradient, and its Hessian is Gauss-Newton's JᵀCJ.
        """
        chain, config = self.network, self.config
        shelf, states = self.states()

        def advance(operation: Operation, states: list[Kept]) -> list[Kept]:
            for i, kept in enumerate(states):
                states[i] = shelf.keep(through(operation, kept.get(), chain.device))
            return states

        walk = self.run.track(chain.walk(states, advance), f"K-step losses for {self.title}", len(chain.operations))
        with frozen(chain.model):
            for index, operation, _ in walk:
                names = [n for n in (operation.group.parameters if operation.group else ()) if n in self.weights]
                if names:
                    active = ActiveWeights({n: torch.ones_like(chain.weight(n), dtype=torch.bool) for n in names})
                    yield active, self._linearised(Segment.cut(chain, index, config.k), active, states)

    def _linearised(self, segment: Segment, active: ActiveWeights, states: list[Kept]) -> Iterator[Linearisation]:
        assert self.images is not None
        dense = active.within(segment.chain)
        for kept in states:
            w, state = dense.clone().requires_grad_(), send_to_device(kept.get(), segment.chain.device)
            outputs = segment.outputs(state, active.scatter(w))
            targets = [o.detach() for o in outputs]
            objective = KStepObjective(segment, active, state, self.config, targets)
            moving = [(2 * c, o) for c, o in zip(objective.weights, outputs, strict=True) if o.requires_grad]
            yield Linearisation(len(state[0]) / len(self.images), w, moving)

    def grams(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """H = X Xᵀ of each of the weights, or of those of these names, (groups, d, d), over all images and positions.

        X (d, …) is what the dense layer reads, so that ‖WX − ŴX‖² = Σ_r (w_r − ŵ_r)ᵀ H (w_r − ŵ_r) for the rows of
        :func:`matrix`. The images pass through the network as often as ``GRAM_ENTRIES`` takes.

        Raises:
            MaskError: a layer that is neither a Linear nor a Conv2d as torch computes it.
            NumericsError: an input is not finite.
        """
        for portion in self._portions(list(self.weights if names is None else names)):
            for name, H in self._grams(portion).items():
                yield name, channels_last(H, self.weights[name]).to(self.network.device)

    def moments(
        self, names: Sequence[str], weights: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Σ s [x, 1][x, 1]ᵀ of what each of these layers reads, (d + 1, d + 1) with d as ``weight.flatten(1)`` counts,
        over all images and positions; as :meth:`grams`. ``weights`` has s of each layer's (positions,); None: 1."""
        for portion in self._portions(names):
            for name, total in self._grams(portion, True, weights).items():
                yield name, total[0].to(self.network.device)

    def _portions(self, names: Sequence[str]) -> list[list[str]]:
        """Names whose Gram matrices are there at a time."""
        portions, entries = [list[str]()], 0
        for name in names:
            size = self.network.weight(name)[0].numel() ** 2
            if portions[-1] and entries + size > GRAM_ENTRIES:
                portions.append([])
                entries = 0
            portions[-1].append(name)
            entries += size
        return portions

    @torch.no_grad()
    def _grams(
        self, names: Sequence[str], constant: bool = False, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        chain, totals = self.network, dict[str, Tensor]()

        def advance(operation: Operation, state: State) -> State:
            own = operation.group.parameters if operation.group else ()
            with recorded(chain, [name for name in own if name in names]) as seen:
                state = operation.run(state)
            for name, (module, x, _) in seen.items():
                g = self.gram(name, module, x, constant, weights[name] if weights else None)
                g = g.to(chain.weight(name).device)  # of an offloaded network's weights: main memory
                totals[name] = totals[name] + g if name in totals else g
            return state

        last = max((place for place, group in chain.groups() if set(group.parameters) & set(names)), default=-1)
        with frozen(chain.model):
            for batch in self.batches():
                state: State = (batch,)
                deque(chain.walk(state, advance, stop=last + 1), maxlen=0)  # no output is kept, as forward would
        return {name: totals[name] for name in names}

    def gram(
        self, name: str, module: nn.Module, x: Tensor, constant: bool = False, weights: Tensor | None = None
    ) -> Tensor:
        """:func:`~snows_hf.method.preconditioner.gram` of what the layer of a weight reads.

        Raises:
            MaskError: it is neither a Linear nor a Conv2d as torch computes it.
            NumericsError: an input is not finite.
        """
        g = gram(module, x, constant, weights)
        if g is None:
            raise MaskError(
                f"Mask criterion {self.config.mask!r}: {name} belongs to a {type(module).__name__}, and only "
                "Linear and Conv2d are understood.",
                "Leave it out with --layers, or use a criterion that reads no inputs, such as magnitude.",
            )
        if not g.isfinite().all():
            raise NumericsError(f"The inputs of {name} are not all finite numbers.", REMEDY)
        return g


def matrix(weight: Tensor) -> Tensor:
    """(out, in, kh, kw) → (out, kh·kw·in): input channels innermost, so that the groups of an N:M pattern, along input
    channels at one kernel position, are consecutive columns. A Linear's weight stays as it is."""
    return weight.movedim(1, -1).flatten(1)


def unmatrix(rows: Tensor, shape: torch.Size) -> Tensor:
    """:func:`matrix` undone, for a weight of ``shape``."""
    return rows.unflatten(1, (*shape[2:], shape[1])).movedim(-1, 1).contiguous()


def channels_last(g: Tensor, weight: Tensor) -> Tensor:
    """A Gram matrix (groups, d, d) whose columns are counted as ``weight.flatten(1)`` does, with :func:`matrix`'s."""
    order = matrix(torch.arange(weight[0].numel(), device=g.device).view(1, *weight.shape[1:]))[0]
    return g[:, order][:, :, order]
