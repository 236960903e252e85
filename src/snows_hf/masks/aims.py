"""What layers are fitted to, one after the other, once those before them are pruned.

Pruned layers hand on x̂ where the dense network had x. A layer that keeps to W x̂ adds its own loss to theirs; one that
keeps to W x makes up for theirs, and for noise of these very images, too. Halfway between does best (docs/results.md):

    a layer whose output makes the       z* = W x̂ + b + the shift that takes that output, with the residual stream
    operation's one to one               where it ends there, half of the way to the dense network's
    Q, K and V, and whatever is mixed    z* = (W x̂ + W x) / 2 + b

Positions count as the network's outputs depend on them: a class token for far more than a patch in late layers.

It is Eq. 3 for K = 0 with targets halfway (method/streams.py), whose solution needs no step: ‖Ŵ x̂ + b - z*‖² is, but
for a constant, ‖(Ŵ - W*) x̂‖² with W* = W + Σ (z* - W x̂ - b) x̂ᵀ (Σ x̂ x̂ᵀ)⁻¹.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.autograd import grad

from ..adapters.base import Chain, Operation, State
from ..adapters.frozen import frozen
from ..method.preconditioner import channels_in_end, cotangents, mean_square, recorded
from ..method.streams import holding, through
from ..runtime.distributed import whole
from ..runtime.memory import Kept
from .evidence import Evidence, channels_last, matrix


DAMPING = 0.01
"""What is added to the diagonal of X Xᵀ, as a share of its mean (SparseGPT's and OBC's code)."""

AT_ONCE = 32
"""Images whose graph of an operation is there at a time, at most."""

PROBED, COUPLED = 32, 256
"""Images, at most, from which it is estimated what positions weigh; and channels, where weights go, for each view that
is read of an image."""

GRAPHS = 8
"""Images whose graph of the whole network is there at a time, at most."""

EVENLY = 0.2
"""Share of the weight that all positions have alike."""

APART = 0.1
"""Share of the weight by which each channel of a layer's output counts by itself."""

HEAVIEST = 30.0
"""Most that a position weighs, as a multiple of the mean."""


class Aim(NamedTuple):
    """W* (rows, d), input channels innermost, and H = X Xᵀ + damping (groups, d, d), both in float64.

    Where the layer's bias moves, X is around its mean (groups, d), and z* is by ``above`` (rows,) over the layer's
    output, on average. ``G`` (rows, rows) says what errors of the output weigh together: see :class:`Importance`.
    """

    name: str
    W: Tensor
    H: Tensor
    mean: Tensor | None = None
    above: Tensor | None = None
    G: Tensor | None = None


class Importance(NamedTuple):
    """How much the network's outputs depend on a layer's.

    Attributes:
        positions: what its positions weigh, (positions,), 1 on average.
        channels: G (rows, rows), with a diagonal of 1 on average: an error e of the layer's output (rows,) costs
            eᵀ G e at the network's end; None of a layer that keeps all of its weights.
    """

    positions: Tensor
    channels: Tensor | None


class Fit(NamedTuple):
    """Σ s [x̂, 1][x̂, 1]ᵀ, (groups, d + 1, d + 1), and Σ s (z* - W x̂ - b)[x̂, 1]ᵀ, (rows, d + 1), over images and
    positions of weight s, of a layer's weight (rows, …), whose columns count as ``weight.flatten(1)`` does; G (rows,
    rows) of its :class:`Importance`."""

    name: str
    gram: Tensor
    shift: Tensor
    G: Tensor | None = None


class Terms(NamedTuple):
    """What some images add to a layer's :class:`Fit`: its gram; its shift, too large in each row by its sensitivity
    (rows,); and how many inputs these are, (), which the sensitivity counts."""

    gram: Tensor
    shift: Tensor
    sensitivity: Tensor
    inputs: Tensor

    def and_those(self, other: "Terms | None") -> "Terms":
        return self if other is None else Terms(*map(torch.add, self, other))

    def fit(self, name: str, G: Tensor | None) -> Fit:
        return Fit(name, self.gram, self.shift.double() * (self.inputs / self.sensitivity)[:, None], G)


def damped(H: Tensor) -> Tensor:
    """H (groups, d, d) in float64 with DAMPING of its mean on its diagonal, so that inputs which never fire, or always
    together, leave it invertible; with more where sums in float32 have left nothing of small variances around large
    means (pooled channels)."""
    H = H.to(torch.float64)
    scale = H.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = DAMPING * torch.diag_embed(torch.where(scale > 0, scale, 1.0)[:, None].expand(H.shape[:2]))
    for _ in range(10):
        if not torch.linalg.cholesky_ex(H + ridge).info.any():
            break
        ridge = 10 * ridge
    return H + ridge


def dense_aims(evidence: Evidence, done: Mapping[str, Tensor]) -> Iterator[Aim]:
    """The dense weights, with what they read in the dense network, of all layers that are not ``done``."""
    for name, H in evidence.grams([name for name in evidence.weights if name not in done]):
        yield Aim(name, matrix(evidence.weights[name]).to(H.device, torch.float64), damped(H))


def halfway_aims(evidence: Evidence, done: Mapping[str, Tensor]) -> Iterator[Aim]:
    """Those of :func:`halfway_fits`."""
    return (aim_of(evidence, fit) for fit in halfway_fits(evidence, done))


def aim_of(evidence: Evidence, fit: Fit) -> Aim:
    """Where a fit leads while all weights are there; biases move by ``evidence.config.biases``."""
    weight = evidence.network.weight(fit.name).detach()
    gram = channels_last(fit.gram[:, :-1, :-1], weight).double()
    lacking = matrix(fit.shift[:, :-1].view_as(weight)).to(gram).unflatten(0, (len(gram), -1))
    mean = above = None
    if evidence.config.biases and fit.name in evidence.network.biases:
        count = fit.gram[0, -1, -1].double()
        sums = matrix(fit.gram[:, -1, :-1].reshape(-1, *weight.shape[1:])).to(gram)
        mean, above = sums / count, fit.shift[:, -1].to(gram) / count
        gram = gram - sums[:, :, None] * mean[:, None]
        lacking = lacking - above.view(len(gram), -1, 1) * sums[:, None]
    H = damped(gram)
    W = matrix(weight).to(H) + torch.linalg.solve(H, lacking, left=False).flatten(0, 1)
    return Aim(fit.name, W, H, mean, above, fit.G)


def bias_for(evidence: Evidence, aim: Aim, updated: Tensor) -> dict[str, Tensor]:
    """The bias, where it moves, of a layer whose weights became ``updated``, as W*."""
    if aim.mean is None or aim.above is None:
        return {}
    dense = matrix(evidence.network.weight(aim.name).detach()).to(updated)
    lost = (dense - updated).unflatten(0, (len(aim.mean), -1)) @ aim.mean.to(updated)[:, :, None]
    return shifted(evidence.network, aim.name, aim.above + lost.flatten())


def shifted(chain: Chain, weight: str, shift: Tensor) -> dict[str, Tensor]:
    """What is there in place of a layer's bias once its output is higher by a shift (rows,): the bias, or, of a
    convolution's batch norm, the mean."""
    bias = chain.biases[weight]
    owner = bias.rpartition(".")[0]
    if owner == weight.rpartition(".")[0]:
        own = chain.weight(bias).detach()
        return {bias: (own + shift).to(own)}
    mean = chain.model.get_buffer(f"{owner}.running_mean")
    return {f"{owner}.running_mean": (mean - shift).to(mean)}


def halfway_fits(
    evidence: Evidence, done: Mapping[str, Tensor], weights: Mapping[str, Importance] | None = None
) -> Iterator[Fit]:
    """In forward order those of the layers that are ``evidence.fitted`` and not ``done``, on what they read where the
    network has all that is: a layer's new weight (and its bias) is there by the time that the next one is asked for.

    Args:
        weights: what each layer's output weighs; None: :func:`importance`.

    Raises:
        MaskError: a layer that is neither a Linear nor a Conv2d as torch computes it.
        NumericsError: an input is not finite.
    """
    chain, teacher = evidence.network, evidence.teacher or evidence.network
    theirs = {operation.name: operation for operation in teacher.operations}
    shelf, dense = evidence.states(min(AT_ONCE, evidence.config.batch_size), evidence.config.views)
    pruned, ahead = list(dense), ""

    def advance(operation: Operation, flow: None) -> None:
        for i in range(len(dense)):
            if operation.name != ahead:
                dense[i] = shelf.keep(through(theirs[operation.name], dense[i].get(), chain.device))
            with holding(chain, done):
                pruned[i] = shelf.keep(through(operation, pruned[i].get(), chain.device))

    fitted = [place for place, operation in enumerate(chain.operations) if evidence.fitted_in(operation)]
    with frozen(chain.model), frozen(teacher.model):
        weights = weights or importance(evidence)
        for place, operation, _ in chain.walk(None, advance, stop=max(fitted, default=-1) + 1):
            if names := [name for name in evidence.fitted_in(operation) if name not in done]:
                own_weights, sums = {name: weights[name].positions for name in names}, dict[str, Terms]()
                for i, state in enumerate(pruned):
                    y, found = terms(evidence, place, own_weights, dense[i], state, done)
                    dense[i] = shelf.keep(y)
                    sums = {name: part.and_those(sums.get(name)) for name, part in found.items()}
                ahead = operation.name
                yield from (part.fit(name, weights[name].channels) for name, part in sums.items())


def importance(evidence: Evidence) -> dict[str, Importance]:
    """Of each layer's output, by one random cotangent u an image: g = Jᵀu, J the network's derivative by that output.
    Positions weigh by the mean square of g; G is the mean of g gᵀ (K-FAC; Martens and Grosse, 2015)."""
    chain, names = evidence.network, list(evidence.fitted)
    squares, products = dict[str, Tensor](), dict[str, Tensor]()
    for part in evidence.calibration[: probed(evidence)].split(min(GRAPHS, evidence.config.batch_size)):
        state: State = (part.to(chain.device).requires_grad_(),)
        with recorded(chain, names) as found:
            for operation in chain.operations:
                state = operation.run(state)
        results = [(1 / (float(y.detach().float().square().mean()) + 1e-12) / y[0].numel(), y) for y in state]
        u, z = cotangents(results, whole(len(part))), [found[name][2] for name in names]
        sensitivities = grad([y for _, y in results], z, u, materialize_grads=True)
        for name, cotangent in zip(names, sensitivities, strict=True):
            g = channels_in_end(found[name][0], cotangent.float())
            squares[name] = squares.get(name, 0.0) + g.square().mean(-1).reshape(len(part), -1).sum(0)
            if evidence.loses_weights(name):
                g = g.flatten(0, -2)
                total = products.get(name)
                products[name] = g.T @ g if total is None else total.addmm_(g.T, g)
    return {name: Importance(weighed(own), coupled(products.get(name))) for name, own in squares.items()}


def probed(evidence: Evidence) -> int:
    """How many images say what is important."""
    coupled = any(map(evidence.loses_weights, evidence.fitted))
    return min(COUPLED * evidence.config.views if coupled else PROBED, len(evidence.calibration))


def weighed(squares: Tensor) -> Tensor:
    return EVENLY + (1 - EVENLY) * relative(squares).clamp_max(HEAVIEST)


def coupled(products: Tensor | None) -> Tensor | None:
    if products is None:
        return None
    mean, apart = products.diagonal().mean(), torch.eye(len(products)).to(products)
    return torch.lerp(products / mean, apart, APART) if 0 < mean < torch.inf else apart


def relative(total: Tensor) -> Tensor:
    """As multiples of the mean; 1 where all are zero."""
    mean = total.mean()
    return total / mean if mean > 0 else torch.ones_like(total)


def terms(
    evidence: Evidence, place: int, names: Mapping[str, Tensor], dense: Kept, pruned: Kept, done: Mapping[str, Tensor]
) -> tuple[State, dict[str, Terms]]:
    """The dense state after the operation at a place, on the CPU, and what some images add to the fits of its layers
    ``names``, with what their positions weigh, from the states before it. What is ``done`` may be part of the
    operation: the batch norm of the layer before is, where nothing else follows that layer."""
    chain, added = evidence.network, dict[str, Terms]()
    before, given = (send_to_device(state.get(), chain.device) for state in (dense, pruned))
    state, targets, wanted = wanted_of(evidence, place, names, before, [tensor.shape for tensor in given])
    weights = {name: chain.weight(name).detach().to(chain.device).requires_grad_() for name in names}
    with holding(chain, done), recorded(chain, names) as found:
        (output,) = chain.outputs(given, place, place + 1, weights)
    target = next((y for y in targets if y.shape == output.shape), output.detach())
    for name in names:
        module, x, z = found[name]
        gram = evidence.gram(name, module, x, constant=True, weights=names[name])
        slope = slope_of(output, z) if len(names) == 1 else None
        if slope is None:
            lacking, squares = (wanted.get(name, z).detach() - z.detach()) / 2, torch.ones_like(z)
        else:
            lacking, squares = grad(output, z, (target - output.detach()) / 2, retain_graph=True)[0], slope
        rows = channels_in_end(module, lacking)  # a view
        rows *= names[name].to(rows).repeat(len(before[0])).view(*rows.shape[:-1], 1)
        (shift,) = grad(z, weights[name], lacking, retain_graph=True)
        constant = rows.flatten(0, -2).sum(0)
        sensitivity = mean_square(module, squares, whole(len(x)), torch.float64) * len(x)
        shift, inputs = torch.cat([shift.flatten(1), constant[:, None]], 1), sensitivity.new_tensor(len(x))
        added[name] = Terms(gram, shift, sensitivity, inputs)
    return send_to_device(state, torch.device("cpu")), added


@torch.no_grad()
def wanted_of(
    evidence: Evidence, place: int, names: Iterable[str], before: State, shapes: list[torch.Size]
) -> tuple[State, list[Tensor], dict[str, Tensor]]:
    """From the dense state before the operation at a place: that after it; the outputs that the chain's may be taken
    to, the dense one first; and those of its layers ``names``. What is of other ``shapes``, since units are gone, the
    chain's own operation does not read."""
    chain, teacher = evidence.network, evidence.teacher
    states = [] if teacher is None else [teacher.operations[place].run(before)]
    with recorded(chain, names) as found:
        if [tensor.shape for tensor in before] == shapes:
            states.append(chain.operations[place].run(before))
    return states[0], [state[0] for state in states], {name: z for name, (_, _, z) in found.items()}


def slope_of(output: Tensor, z: Tensor) -> Tensor | None:
    """The derivative of each entry of an operation's output by the entry of a layer's output z in its place, but for
    the sign; None where it depends on others, too: then its size depends on the signs of what is derived."""
    if z.shape != output.shape:
        return None
    slope = grad(output, z, torch.ones_like(output), retain_graph=True)[0].abs()
    first, (signs,) = slope[:1], cotangents([(1.0, output[:1])], whole(1))
    other = grad(output[:1], z, signs, retain_graph=True)[0][:1].abs()  # one image tells
    return slope if torch.allclose(first, other, rtol=1e-3, atol=1e-6 * float(first.max())) else None
