"""Coupled widths: dimensions of weights that can only be made smaller together.

A unit of an MLP is a row of the weight that makes it and a column of the weight that reads it; what lies between (an
activation, a batch norm, a depthwise convolution, a gate) has an entry of its own for the unit. A head of attention is
such rows of queries, keys and values, and such columns of the out-projection.

Found by following each layer's outputs through the graph. A dimension that meets anything else (a residual stream,
whose width all blocks share, a norm over it, an output) is left as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from .base import Chain
from .cut import output_of_attention
from .outputs import is_two_tower
from .trace import ACTIVATIONS, Graph, Layer, kind, reached, value_of


ELEMENTWISE = ACTIVATIONS | frozenset(("add", "sub", "mul", "div", "neg", "pow", "sigmoid", "hardsigmoid", "tanh"))
ELEMENTWISE |= {"erf", "clamp", "dropout", "feature_dropout", "clone", "contiguous", "to", "alias", "detach"}

POOLINGS = frozenset(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "pad", "roll"))


@dataclass(frozen=True)
class Slot:
    """Where the units of a width are in a tensor: from ``offset`` on along ``dim``, each with ``each`` entries; all of
    them so many ``times`` one after the other, as the dimensions of heads are."""

    name: str
    dim: int
    offset: int = 0
    each: int = 1
    times: int = 1

    def entries(self, units: Tensor) -> Tensor:
        """What is said of each unit, (units,), said of each of its entries."""
        return units.repeat_interleave(self.each).repeat(self.times)

    def part(self, tensor: Tensor, units: int) -> Tensor:
        """The entries of so many units, a view."""
        return tensor.narrow(self.dim, self.offset, self.times * units * self.each)


@dataclass(frozen=True)
class Width:
    """Units that are made, kept and read together.

    Attributes:
        name: that of the layer that makes them, the first of several.
        kind: ``mlp`` (between two products without a kernel), ``heads`` (of attention), ``ranks`` (dimensions of each
            of these) or ``channels`` (inside a residual unit or an inverted bottleneck).
        units: how many there are.
        makers: rows of weights.
        along: entries of what lies between: biases, norms, depthwise kernels.
        readers: columns of weights.
    """

    name: str
    kind: str
    units: int
    makers: tuple[Slot, ...]
    along: tuple[Slot, ...]
    readers: tuple[Slot, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (*self.makers, *self.along, *self.readers)

    def marked(self, units: Tensor) -> Tensor:
        """Whether each unit is one of these, (units,), on the CPU."""
        return torch.zeros(self.units, dtype=torch.bool).index_fill_(0, units.cpu(), True)


@dataclass(eq=False)
class Axis:
    """A dimension of some values, while the graph is read; those that prove to be the same have one root.

    Attributes:
        units: its size.
        part: where it is a part of another axis, that one and its first entry there.
        free: whether it may be cut.
        active: whether a nonlinearity acts on it.
        flat: whether every output of the layer that makes it stands for a whole image, as behind a pooling.
    """

    units: int
    part: "tuple[Axis, int] | None" = None
    free: bool = True
    active: bool = False
    flat: bool = False
    makers: list[Slot] = field(default_factory=list)
    along: list[Slot] = field(default_factory=list)
    readers: list[Slot] = field(default_factory=list)
    up: "Axis | None" = None

    @property
    def root(self) -> "Axis":
        return self if self.up is None else self.up.root


Dims = dict[int, tuple[Axis, int]]
"""Of a value's dimensions, the axis in each, and how many entries a unit has there."""


def find_widths(graph: Graph, prunable: Mapping[str, str]) -> list[Width]:
    """All widths that can be cut, in the model's order; ``prunable`` are the weights of groups, by name, with the
    group's name."""
    reading = Reading(graph)
    for node in filter(graph.moving.__contains__, graph.nodes):
        reading.read(node)
    for node in graph.results.values():
        reading.hold(node)
    found = [*_heads(graph, prunable), *_units(reading, prunable)]
    order = {name: i for i, name in enumerate(prunable)}
    return sorted(found, key=lambda width: order[width.makers[0].name])


def _units(reading: "Reading", prunable: Mapping[str, str]) -> Iterator[Width]:
    families: dict[Axis, list[Axis]] = {}
    for axis in reading.axes:
        families.setdefault(axis.root, []).append(axis)
    for family in families.values():
        makers, along, readers = list[Slot](), list[Slot](), list[Slot]()
        for axis in family:
            makers += _of_part(axis, axis.makers, lambda whole: whole.makers)
            along += _of_part(axis, axis.along, lambda whole: whole.along)
            readers += axis.readers
        whole = [axis.part[0] for axis in family if axis.part]
        free = all(axis.free for axis in family) and not any(axis.readers or not axis.free for axis in whole)
        own = makers and readers and all(slot.name in prunable for slot in (*makers, *readers))
        active, flat = any(axis.active for axis in family), all(axis.flat for axis in [*family, *whole] if axis.makers)
        if free and own and active and not flat:
            pointwise = all(reading.is_pointwise(slot.name) for slot in (*makers, *readers))
            pointwise = pointwise and not any(reading.dims_of(slot.name) > 1 for slot in along)
            name = prunable[makers[0].name]
            kind_ = "mlp" if pointwise else "channels"
            yield Width(name, kind_, family[0].units, tuple(makers), tuple(dict.fromkeys(along)), tuple(readers))


def _of_part(axis: Axis, own: list[Slot], slots: Callable[[Axis], list[Slot]]) -> list[Slot]:
    """Slots of an axis, and those of the one that it is a part of, from its first entry there on."""
    if axis.part is None:
        return own
    whole, start = axis.part
    return [*own, *(Slot(slot.name, slot.dim, slot.offset + start * slot.each, slot.each) for slot in slots(whole))]


class Reading:
    """The axes of a graph's values, as its nodes are read one after the other."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.axes: list[Axis] = []
        self.dims: dict[Node, Dims] = {}
        self.parts: dict[Node, list[Dims]] = {}  # of a node that gives several values
        self.tensors: dict[str, Tensor] = {**dict(graph.model.named_parameters()), **dict(graph.model.named_buffers())}

    def dims_of(self, name: str) -> int:
        return self.tensors[name].dim()

    def is_pointwise(self, name: str) -> bool:
        return prod(self.tensors[name].shape[2:]) == 1

    def new(self, units: int, part: tuple[Axis, int] | None = None) -> Axis:
        self.axes.append(Axis(units, part))
        return self.axes[-1]

    def unite(self, one: Axis, other: Axis) -> None:
        if one.units != other.units:
            one.free = other.free = False
        if one.root is not other.root:
            other.root.up = one.root

    def hold(self, node: Any) -> None:
        """What a node gives may not be cut."""
        for axis, _ in self.dims.get(node, {}).values():
            axis.free = False
        for dims in self.parts.get(node, []):
            for axis, _ in dims.values():
                axis.free = False

    def read(self, node: Node) -> None:
        """Finds the axes of what a node gives."""
        name = kind(node)
        if node in self.graph.layers:
            self.dims[node] = self._layer(self.graph.layers[node])
        elif name == "batch_norm":
            self.dims[node] = self._batch_norm(node)
        elif name in ELEMENTWISE:
            self.dims[node] = self._elementwise(node)
        elif name in POOLINGS:
            self.dims[node] = {d: own for d, own in self._of(node.args[0]).items() if self._same(node, d)}
        elif name in ("mean", "amax", "sum"):
            self.dims[node] = self._reduced(node)
        elif name in ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"):
            self.dims[node] = self._viewed(node)
        elif name in ("permute", "transpose"):
            self.dims[node] = self._permuted(node)
        elif name in ("chunk", "split", "split_with_sizes"):
            self.parts[node] = self._split(node)
        elif name == "getitem" and node.args[0] in self.parts:
            self.dims[node] = self.parts[node.args[0]][int(node.args[1])]  # type: ignore[arg-type, index]
        elif name == "layer_norm":
            self.dims[node] = self._layer_norm(node)
        else:
            for source in node.all_input_nodes:
                self.hold(source)

    def _of(self, arg: Any) -> Dims:
        return self.dims.get(arg, {})

    def _same(self, node: Node, dim: int) -> bool:
        """Whether a dimension is as large as in what the node reads; one that is not may not be cut."""
        before: Any = node.args[0]
        same = _size(before, dim) == _size(node, dim)
        if not same:
            self._of(before)[dim][0].free = False
        return same

    def _layer(self, layer: Layer) -> Dims:
        module = layer.module
        x, value = self._of(layer.reads), value_of(layer.node)
        at = value.dim() - 1 if isinstance(module, nn.Linear) else 1
        groups = getattr(module, "groups", 1)
        if groups > 1 and groups == module.weight.shape[0] and at in x:  # depthwise
            axis, _ = x[at]
            axis.along += self._with_bias(layer)
            return {at: x[at]}
        out = self.new(module.weight.shape[0])
        out.makers.append(Slot(layer.weight, 0))
        out.along += self._with_bias(layer)[1:]
        out.flat = value.dim() == 2 or (value.dim() == 4 and tuple(value.shape[2:]) == (1, 1) and at == 1)
        kept = {d: own for d, own in x.items() if d != at} if isinstance(module, nn.Linear) else {}
        if at in x:
            axis, each = x[at]
            axis.readers.append(Slot(layer.weight, 1, each=each))
            axis.free &= groups == 1 and (each == 1 or isinstance(module, nn.Linear))
        out.free &= groups == 1
        return {**kept, at: (out, 1)}

    def _with_bias(self, layer: Layer) -> list[Slot]:
        """Rows of a layer's weight, and the entries of what the node adds as a bias."""
        args = layer.node.args
        bias = self.graph.name_of(args[2]) if len(args) > 2 and isinstance(args[2], Node) else ""
        slots = [Slot(layer.weight, 0)]
        if bias in self.tensors:
            slots.append(Slot(bias, 0))
        elif len(args) > 2 and args[2] is not None:  # computed from several: not followed
            self.new(0).free = False
            slots.append(Slot("", 0))
        return slots

    def _batch_norm(self, node: Node) -> Dims:
        own = self._of(node.args[0])
        if 1 in own:
            axis, _ = own[1]
            axis.free &= not node.args[5]
            names = [self.graph.name_of(arg) for arg in node.args[1:5] if isinstance(arg, Node)]
            axis.along += [Slot(name, 0) for name in names if name]
            axis.free &= all(names)
        return dict(own)

    def _layer_norm(self, node: Node) -> Dims:
        own, normalised = self._of(node.args[0]), len(node.args[1])  # type: ignore[arg-type]
        first = value_of(node).dim() - normalised
        for dim, (axis, _) in own.items():
            axis.free &= dim < first
        return dict(own)

    def _elementwise(self, node: Node) -> Dims:
        rank = value_of(node).dim()
        moving = self.graph.sources(node)
        nonlinear = self.graph.is_activation(node)
        found: Dims = {}
        for source in moving:
            shift = rank - value_of(source).dim()
            for dim, (axis, each) in self._of(source).items():
                axis.active |= nonlinear
                if dim + shift in found:
                    self.unite(found[dim + shift][0], axis)
                    axis.free &= found[dim + shift][1] == each
                else:
                    found[dim + shift] = axis, each
        for dim, (axis, _) in found.items():
            for source in moving:  # one of which nothing is known, and that is as large
                at = dim - rank + value_of(source).dim()
                axis.free &= at in self._of(source) or at < 0 or _size(source, at) == 1
            axis.free &= not (kind(node) in ("add", "sub") and len(moving) > 1)
        for constant in (n for n in node.all_input_nodes if n not in self.graph.moving):
            self._along(constant, rank, found)
        return found

    def _along(self, constant: Node, rank: int, found: Dims) -> None:
        """A constant that is added, or multiplied with."""
        value = value_of(constant)
        if not isinstance(value, Tensor):
            return
        name = self.graph.name_of(constant)
        for dim, (axis, each) in found.items():
            at = dim - rank + value.dim()
            if at < 0 or value.shape[at] == 1:
                continue
            if name and each == 1:
                axis.along.append(Slot(name, at))
            else:
                axis.free = False

    def _reduced(self, node: Node) -> Dims:
        own = self._of(node.args[0])
        rank = value_of(node.args[0]).dim()  # type: ignore[arg-type]
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = {d % rank for d in ([given] if isinstance(given, int) else given or range(rank))}
        keeps = value_of(node).dim() == rank
        found: Dims = {}
        for dim, (axis, each) in own.items():
            if dim in dims:
                axis.free = False
            else:
                found[dim if keeps else dim - sum(d < dim for d in dims)] = axis, each
        return found

    def _viewed(self, node: Node) -> Dims:
        source: Any = node.args[0]
        before, after = _sizes(source), _sizes(node)
        found: Dims = {}
        for dim, (axis, each) in self._of(source).items():
            ahead = prod(before[:dim])
            at = next((i for i in range(len(after)) if prod(after[:i]) - ahead == 0 and after[i] != 1), None)
            behind = [prod(before[dim:end]) for end in range(dim + 1, len(before) + 1)]
            if at is None or after[at] not in behind:
                axis.free = False
            else:
                found[at] = axis, each * int(after[at] / before[dim])
        return found

    def _permuted(self, node: Node) -> Dims:
        source: Any = node.args[0]
        rank = value_of(node).dim()
        order = list(range(rank))
        if kind(node) == "permute":
            order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        else:
            i, j = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
            order[i], order[j] = j, i
        return {order.index(dim): own for dim, own in self._of(source).items()}

    def _split(self, node: Node) -> list[Dims]:
        source: Any = node.args[0]
        values = value_of(node)
        given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        at = cast(int, given) % values[0].dim()
        others = {d: own for d, own in self._of(source).items() if d != at}
        if at not in self._of(source):
            return [dict(others) for _ in values]
        (axis, each), start, parts = self._of(source)[at], 0, list[Dims]()
        axis.free &= each == 1
        for value in values:
            size = int(value.shape[at])
            parts.append({**others, at: (self.new(size, (axis, start)), 1)})
            start += size
        return parts


def _size(node: Any, dim: int) -> Any:
    return _sizes(node)[dim]


def _sizes(node: Any) -> list[Any]:
    """A value's shape, of numbers that can be compared: what depends on the number of images is an expression."""
    return [size if isinstance(size, int) else size.node.expr for size in value_of(node).shape]


def _heads(graph: Graph, prunable: Mapping[str, str]) -> Iterator[Width]:
    """Heads of the attentions whose queries, keys and values are slices of the outputs of one layer, or of three, and
    whose out-projection reads nothing else."""
    for product, layers in graph.attentions:
        end = output_of_attention(graph, product)
        out = next((layer for layer in graph.layers.values() if layer.reads is end), None)
        value = value_of(product)
        if out is None or not isinstance(out.module, nn.Linear) or value.dim() != 4:
            continue
        heads, width = int(value.shape[1]), out.module.in_features
        rows = sum(layer.module.weight.shape[0] for layer in layers)
        linear = all(isinstance(layer.module, nn.Linear) for layer in layers)
        if width % heads or heads < 2 or rows != 3 * width or not linear or len(layers) not in (1, 3):
            continue
        if any(slot not in prunable for slot in (*(layer.weight for layer in layers), out.weight)):
            continue
        each, tables = width // heads, _tables(graph, layers, product, heads)
        if not isinstance(value.shape[1], int) or value.shape[3] != each or tables is None:
            continue
        makers = [Slot(n.weight, 0, i * width, each) for n in layers for i in range(3 // len(layers))]
        biases = [Slot(f"{slot.name.removesuffix('weight')}bias", 0, slot.offset, each) for slot in makers]
        along = [slot for slot in biases if slot.name in dict(graph.model.named_parameters())]
        name, reader = prunable[layers[0].weight], Slot(out.weight, 1, each=each)
        yield Width(name, "heads", heads, tuple(makers), (*along, *tables), (reader,))
        inside = (tuple(replace(slot, each=1, times=heads) for slot in slots) for slots in (makers, along, [reader]))
        yield Width(name, "ranks", each, *inside)


def _tables(graph: Graph, layers: list[Layer], product: Node, heads: int) -> list[Slot] | None:
    """Where an attention's heads are in parameters that act between its layers and its products: columns of tables of
    positions. None where others act there (norms of queries and keys), or a table is another attention's, too."""
    tables, parameters = list[Slot](), dict(graph.model.named_parameters())
    for name in sorted(_between(graph, layers, product) & parameters.keys()):
        if parameters[name].dim() != 2 or parameters[name].shape[1] != heads:
            return None
        tables.append(Slot(name, 1))
    for other, theirs in graph.attentions if tables else ():
        if other is not product and _between(graph, theirs, other) & {slot.name for slot in tables}:
            return None
    return tables


def _between(graph: Graph, layers: list[Layer], product: Node) -> set[str]:
    """Names of the tensors that act between the layers of an attention and its products, and of biases that are
    computed from several."""
    nodes = reached([product], lambda node: node.all_input_nodes, stop=lambda node: node in graph.layers)
    biases = [layer.node.args[2] for layer in layers if len(layer.node.args) > 2]
    computed = [bias for bias in biases if isinstance(bias, Node) and bias.op != "get_attr"]
    nodes = {*nodes, *reached(computed, lambda node: node.all_input_nodes, stop=lambda node: False)}
    names = {graph.name_of(node) for node in nodes if node.op == "get_attr" and node not in graph.layers}
    return names - {""}


def widths_of(chain: Chain) -> list[Width]:
    """The widths of a chain's model that can be cut; none of a model whose graph is not known."""
    groups = {name: group.name for _, group in chain.groups() for name in group.parameters}
    return find_widths(chain.graph, groups) if chain.graph is not None else []


def unread(chain: Chain) -> set[str]:
    """Parameters that no output depends on, such as those of a pooling that a classifier does without; of two towers
    the one for text is read, by other inputs."""
    if chain.graph is None or is_two_tower(chain.model):
        return set()
    graph = chain.graph
    nodes = reached(graph.results.values(), lambda node: node.all_input_nodes, stop=lambda node: False)
    return {name for name, _ in chain.model.named_parameters()} - {graph.name_of(node) for node in nodes}


def cut(state: Mapping[str, Tensor], kept: Mapping[Width, Tensor]) -> dict[str, Tensor]:
    """Copies of a model's tensors, by name, without the units that are not among the ``kept`` of each width."""
    stays: dict[tuple[str, int], Tensor] = {}
    for width, units in kept.items():
        for slot in width.slots:
            size = state[slot.name].shape[slot.dim]
            entries = stays.setdefault((slot.name, slot.dim), torch.ones(size, dtype=torch.bool))
            own = slot.entries(width.marked(units))
            entries[slot.offset : slot.offset + len(own)] = own
    smaller = {name: tensor.detach().clone() for name, tensor in state.items()}
    for (name, dim), entries in stays.items():
        smaller[name] = smaller[name].index_select(dim, entries.nonzero().flatten().to(smaller[name].device))
    return smaller
