"""How operations run: a part of a model's graph on a state, with the model's own tensors as they are at the time.

Layers are called as the model's own modules, so that hooks see what goes in and out. All else is written in a form
that can be differentiated twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from .attention import fused_attention, note_attention
from .base import State
from .frozen import convolve, normalise
from .trace import FUSED_ATTENTION, Graph, Layer, kind, value_of, works_in_place


Values = dict[Node, Any]
Call = Callable[[Values, Tensor], Any]
"""Computes a node's value from those before it; the tensor is the state's first, which tells the device and how many
images there are."""


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, by_batch: bool, momentum: float, eps: float, *_: Any
) -> Tensor:
    """With the mean and variance of x itself ``by_batch``, as weights are standardised."""
    if by_batch:
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    return normalise(x, weight, bias, mean, var, eps)


SUBSTITUTES: dict[str, Callable[..., Any]] = {
    FUSED_ATTENTION: fused_attention,
    "hardsigmoid": lambda x: (x / 6 + 0.5).clamp(0, 1),  # ATen's has no second derivative
    "batch_norm": _batch_norm,
    "view": lambda x, shape: x.reshape(shape),  # a value that has rested in a state may lie otherwise in memory
    "copy": lambda x, values, *_: values.to(x.dtype).expand_as(x),  # ATen's has no derivative
    "dropout": lambda x, *_: x,
    "feature_dropout": lambda x, *_: x,
}


class Geometry(NamedTuple):
    """Where a convolution puts its kernel."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: Node) -> "Geometry | None":
        """That of a ``conv2d`` node; None where it pads by a word, such as "same"."""
        given: list[Any] = [*node.args[3:], *((1, 1), (0, 0), (1, 1), 1)[max(len(node.args) - 3, 0) :]]
        if isinstance(given[1], str):
            return None
        stride, padding, dilation = (tuple(each) if len(each) == 2 else (*each, *each) for each in given[:3])
        return cls(stride, padding, dilation, given[3])


@dataclass(frozen=True)
class Value:
    """How a value that moves rests in a state: the dimension that holds the images, and how many entries each has
    there, one after the other (windows, say)."""

    node: Node
    dim: int
    each: int

    def rest(self, value: Tensor) -> Tensor:
        value = value.movedim(self.dim, 0) if self.dim else value
        return value.unflatten(0, (-1, self.each)) if self.each > 1 else value

    def back(self, value: Tensor) -> Tensor:
        value = value.flatten(0, 1) if self.each > 1 else value
        return value.movedim(0, self.dim) if self.dim else value


class Engine:
    """Turns nodes of a graph into calls, and values into what rests in a state."""

    def __init__(self, graph: Graph, substitutes: Mapping[str, Callable[..., Any]]) -> None:
        self.graph, self.model = graph, graph.model
        self.substitutes = {**SUBSTITUTES, **substitutes}
        self.dtype = self.width()
        products = {product for product, _ in graph.attentions}
        self.probabilities = {
            node for node in graph.nodes if kind(node) == "softmax" and products & {*graph.follow(node)}
        }

    def width(self) -> torch.dtype:
        """The type in which the model computes now."""
        return next(self.model.parameters()).dtype

    def times(self, size: Any) -> int | None:
        """How many times the number of images a size is; None if it is no multiple."""
        ratio = (size.node.expr / self.graph.count.node.expr).simplify()
        return int(ratio) if ratio.is_Integer else None

    def value(self, node: Node) -> Value | None:
        """How a node's value rests in a state; None if no dimension of it, or more than one, holds the images."""
        shape = value_of(node).shape
        dims = [dim for dim, size in enumerate(shape) if not isinstance(size, int)]
        each = self.times(shape[dims[0]]) if len(dims) == 1 else None
        return Value(node, dims[0], each) if each else None

    def call(self, node: Node) -> Call:
        """What computes a node."""
        if node.op == "get_attr":
            return self._tensor(node)
        if isinstance(value_of(node), torch.SymInt) and (times := self.times(value_of(node))) is not None:
            return lambda values, like: times * len(like)
        if node in self.graph.layers:
            return self._layer(self.graph.layers[node])
        run = self._function(node)
        if node in self.probabilities:
            return lambda values, like: note_attention(run(values, like))
        return run

    def _tensor(self, node: Node) -> Call:
        """The model's own tensor as it is now, or a constant that the export has found."""
        name = self.graph.name_of(node)
        path, _, own = name.rpartition(".")
        if name and hasattr(self.graph.modules.get(path), own):
            owner = self.graph.modules[path]
            return lambda values, like: getattr(owner, own)
        path, _, own = str(node.target).rpartition(".")
        constant: Tensor = getattr(self.graph.module.get_submodule(path), own)
        floating = constant.is_floating_point()
        return lambda values, like: constant.to(like.device, self.width() if floating else constant.dtype)

    def _layer(self, layer: Layer) -> Call:
        """A layer by its module: as it is where the node is all that it does, else with the node in its place."""
        node, module = layer.node, layer.module
        x, bias = layer.reads, node.args[2] if len(node.args) > 2 else None
        own_bias = self.graph.name_of(bias) == f"{layer.name}.bias" if isinstance(bias, Node) else module.bias is None
        if isinstance(module, nn.Linear):
            if type(module) is nn.Linear and own_bias:
                return lambda values, like: module(values[x])

            def linear(values: Values, like: Tensor) -> Any:
                offset = values[bias] if isinstance(bias, Node) else None
                return called_as(module, lambda x: F.linear(x, module.weight, offset), values[x])

            return linear
        geometry = Geometry.of(node)
        pads = geometry is None or node in self.graph.padded

        def convolution(values: Values, like: Tensor) -> Any:
            offset = values[bias] if isinstance(bias, Node) else None
            if pads:  # by itself
                return called_as(module, lambda x: module._conv_forward(x, module.weight, offset), values[x])
            return called_as(module, lambda x: convolve(x, module.weight, offset, geometry), values[x])

        return convolution

    def _function(self, node: Node) -> Call:
        name, target = kind(node), cast(Any, node.target)
        arguments, kwargs = node.args, node.kwargs
        if name == "conv2d" and (geometry := Geometry.of(node)) is not None:
            target, arguments = convolve, (*node.args[:2], node.args[2] if len(node.args) > 2 else None, geometry)
        elif name in self.substitutes:
            target = self.substitutes[name]
        elif works_in_place(node):
            target = getattr(getattr(torch.ops.aten, name), target._overloadname)

        def run(values: Values, like: Tensor) -> Any:
            width = self.width()

            def now(leaf: Any) -> Any:
                if isinstance(leaf, Node):
                    return values[leaf]
                if isinstance(leaf, torch.dtype):
                    return width if leaf == self.dtype else leaf
                return like.device if isinstance(leaf, torch.device) else leaf

            return target(*map_aggregate(arguments, now), **map_aggregate(kwargs, now))

        return run


def called_as(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> Any:
    """Calls a module, so that its hooks are run, with another ``forward`` for this once."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        return module(x)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class Part:
    """The nodes of one operation, run on a state.

    Args:
        nodes: in the order in which they run; what they read is among them or enters.
        enters: what the state before is made of.
        leaves: what the state after is made of.
    """

    def __init__(
        self, engine: Engine, nodes: Sequence[Node], enters: Sequence[Value], leaves: Sequence[Value]
    ) -> None:
        self.enters, self.leaves = enters, leaves
        last: dict[Node, int] = {}
        for i, node in enumerate(nodes):
            last |= dict.fromkeys(node.all_input_nodes, i)
        kept = {value.node for value in leaves}
        done: list[list[Node]] = [[] for _ in nodes]
        for node, i in last.items():
            if node not in kept:
                done[i].append(node)
        self.steps = [(node, engine.call(node), over) for node, over in zip(nodes, done, strict=True)]

    def __call__(self, state: State) -> State:
        like = state[0]
        values: Values = {}
        for value, tensor in zip(self.enters, state, strict=True):
            values[value.node] = value.back(tensor)
        for node, call, over in self.steps:
            values[node] = call(values, like)
            for past in over:
                values.pop(past, None)
        return tuple(value.rest(values[value.node]) for value in self.leaves)
