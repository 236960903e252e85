"""Input channels of layers in an order in which N:M costs less (Pool and Yu, 2021), the network staying what it is.

Groups of M are consecutive input channels. Where nothing else reads the channels between two layers, they may come in
any order, if what makes them and what reads them are ordered alike. That is an ordinary checkpoint again.
"""

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters import Chain, State, build_chain, outputs_of
from ..patterns import NM


ROUNDS = 300
"""Most rounds of swaps in one layer."""

STALE = 20
"""Rounds without a gain that end the search."""

TOLERANCE = 1e-9
"""Most that values may differ in float64, relative to the largest, for two orders to count as the same network."""


@dataclass(frozen=True)
class Channels:
    """The channels between two layers: from operation ``start``, which makes them, to the one before ``stop``, which
    reads them.

    Attributes:
        reader: the weight whose dimension 1 they are.
        makers: the tensors whose dimension 0 they are: weight and bias of the layer before, and of the norms and
            depthwise convolutions between.
    """

    reader: str
    makers: tuple[str, ...]
    start: int
    stop: int

    def order(self, model: nn.Module, permutation: Tensor) -> None:
        """Puts them in a new order, in place: first comes channel ``permutation[0]``."""
        tensors = model.state_dict()  # shares memory with the model
        for name in self.makers:
            tensors[name].copy_(tensors[name][permutation])
        tensors[self.reader].copy_(tensors[self.reader][:, permutation])


@torch.no_grad()
def free_channels(chain: Chain, images: Tensor, names: Collection[str]) -> list[Channels]:
    """All channels before the layers of these weights that nothing else reads, in forward order.

    Which layer comes before another is seen in a forward pass. Whether something else reads what is between them is
    not known from that: each candidate is put in a random order, in float64, and counts if everything that comes
    out of the operations from the first layer to the second stays the same, for two or more ``images`` (n, 3, h, w).
    """
    found, free = candidates(chain, images, names), []
    twin = build_chain(copy.deepcopy(chain.model).cpu().double().eval(), images[:1].cpu().double())
    states: dict[int, State] = {}  # before each operation, as far as they are still needed
    generator = torch.Generator().manual_seed(0)
    for place, operation, state in twin.walk((images.cpu().double(),)):
        states[place] = state
        for channels in [channels for channels in found if channels.stop == place + 1]:
            permutation = torch.randperm(twin.weight(channels.reader).shape[1], generator=generator)
            channels.order(twin.model, permutation)
            ordered = states[channels.start]
            for passed in twin.operations[channels.start : channels.stop]:
                ordered = passed.run(ordered)
            channels.order(twin.model, permutation.argsort())
            both = zip(ordered, operation.run(state), strict=True)
            if all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in both):
                free.append(channels)
        needed = min((channels.start for channels in found if channels.stop > place + 1), default=place + 1)
        states = {start: kept for start, kept in states.items() if start >= needed}
    return free


def candidates(chain: Chain, images: Tensor, names: Collection[str]) -> list[Channels]:
    """Pairs of layers of which the second, one of these weights, is called next after the first, and whose widths
    fit."""
    model, calls = chain.model, list[str]()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.LayerNorm)
    ]
    outputs_of(model, images.to(next(chain.parameters())))
    for handle in handles:
        handle.remove()
    tensors, modules, found = model.state_dict(), dict(model.named_modules()), []
    places = {name: place for place, operation in enumerate(chain.operations) for name in operation.layers}
    times = Counter(calls)
    maker, start, between = "", 0, list[str]()
    for name in calls:
        module, place = modules[name], places.get(name, 0)
        if by_channel(module):
            between.append(name)
            continue
        if f"{name}.weight" in names and type(modules[maker]) is type(module):
            makers = tuple(
                f"{owner}.{tensor}"
                for owner in (maker, *between)
                for tensor, value in modules[owner].state_dict().items()
                if value.dim() > 0
            )
            widths = {len(tensors[tensor]) for tensor in makers}
            grouped = max(getattr(module, "groups", 1), getattr(modules[maker], "groups", 1)) > 1
            once = all(times[called] == 1 for called in (maker, *between, name))
            if once and not grouped and widths == {tensors[f"{name}.weight"].shape[1]}:
                found.append(Channels(f"{name}.weight", makers, start, place + 1))
        maker, start, between = name, place, []
    return found


def by_channel(module: nn.Module) -> bool:
    """Whether a module has nothing but a share of its own for each channel: norms, and depthwise convolutions."""
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels
    return isinstance(module, nn.BatchNorm2d | nn.LayerNorm)


@torch.no_grad()
def order_channels(
    chain: Chain, pattern: NM, images: Tensor, names: Collection[str], device: torch.device | str = "cpu"
) -> dict[str, tuple[float, float]]:
    """Puts the input channels of layers in a better order for the pattern, in place, where their order is free.

    Args:
        images: two or more, (n, 3, h, w).
        names: of the weights that will be pruned; the input channels of others stay.
        device: where orders are searched for; the network stays where it is.

    Returns:
        By parameter name: the share of the weights' magnitudes that the pattern keeps, before and after.
    """
    gains = {}
    for channels in free_channels(chain, images, names):
        weight = chain.weight(channels.reader).detach()
        if not pattern.fits(weight.shape):
            continue
        magnitudes = weight.to(device).float().abs().movedim(1, 0).flatten(1)
        permutation = better_order(magnitudes, pattern)
        both = (columns.unflatten(0, (-1, pattern.m)) for columns in (magnitudes, magnitudes[permutation]))
        before, after = (float(kept(groups, pattern.n).sum()) / float(magnitudes.sum()) for groups in both)
        gains[channels.reader] = before, after
        channels.order(chain.model, permutation.to(weight.device))
    return gains


@torch.no_grad()
def order_like(chain: Chain, other: Mapping[str, Tensor], images: Tensor, names: Collection[str]) -> bool:
    """Puts the input channels of layers in the order that they have in another state of the model, in place.

    Args:
        other: the dense model's tensors after :func:`order_channels`, whatever has become of the weights of two or
            more dimensions since.
        images: one or more, (n, 3, h, w).
        names: of the weights whose input channels have moved.

    Returns:
        Whether that order could be told: all vectors along the channels are there again, and no two channels have
        the same in them.
    """
    tensors, told = chain.model.state_dict(), set()
    for channels in candidates(chain, images, names):
        vectors = [name for name in channels.makers if tensors[name].dim() == 1 and name in other]
        before, after = (list(zip(*(t[name].tolist() for name in vectors), strict=True)) for t in (tensors, other))
        place = {values: channel for channel, values in enumerate(before)}
        if len(place) == len(tensors[channels.makers[0]]) and sorted(before) == sorted(after):
            channels.order(chain.model, torch.tensor([place[values] for values in after]))
            told.add(channels.reader)
    return told == set(names)


def kept(groups: Tensor, n: int) -> Tensor:
    """What the n largest of each row keep: (…, m, rows) → (…)."""
    return groups.topk(n, dim=-2).values.sum((-2, -1))


def left_out(groups: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a group (…, m, rows) keeps, as :func:`kept`; and of its columns each left out: above what another in its
    place would be kept in each row, (…, m, rows), and what the group keeps less as long as there is none, (…, m)."""
    top = groups.topk(n + 1, dim=-2).values
    last, following = top[..., n - 1 : n, :], top[..., n:, :]
    largest = groups >= last
    loss = (groups - following).where(largest, 0).sum(-1)
    return top[..., :n, :].sum((-2, -1)), following.where(largest, last), loss


def better_order(magnitudes: Tensor, pattern: NM) -> Tensor:
    """An order of the columns of magnitudes (columns, rows) in which groups of M, which divides them, keep more: from
    the given one, swaps of two columns between two groups, as long as some gain.

    In each round the groups are paired at random, and of each pair's M² swaps the best is made if it gains.
    """
    n, m, device = pattern.n, pattern.m, magnitudes.device
    groups = torch.arange(len(magnitudes), device=device).unflatten(0, (-1, m))
    generator = torch.Generator().manual_seed(0)
    half, stale = len(groups) // 2, 0
    for _ in range(ROUNDS if half else 0):
        order = torch.randperm(len(groups), generator=generator).to(device)
        first, second = order[:half], order[half : 2 * half]
        a, b = groups[first], groups[second]  # (pairs, m) columns
        ours, theirs = magnitudes[a], magnitudes[b]
        our_sum, our_bar, our_loss = left_out(ours, n)
        their_sum, their_bar, their_loss = left_out(theirs, n)
        gains = -our_loss[:, :, None] - their_loss[:, None]
        for i in range(m):
            for j in range(m):
                gains[:, i, j] += (theirs[:, j] - our_bar[:, i]).relu_().sum(-1)
                gains[:, i, j] += (ours[:, i] - their_bar[:, j]).relu_().sum(-1)
        best, swap = gains.flatten(1).max(1)
        better = (best > 1e-6 * (our_sum + their_sum)).nonzero()[:, 0]
        at, to = swap[better] // m, swap[better] % m
        groups[first[better], at], groups[second[better], to] = b[better, to], a[better, at]
        stale = 0 if len(better) else stale + 1
        if stale == STALE:
            break
    return groups.flatten()
