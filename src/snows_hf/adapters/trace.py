"""A model's own graph, as ``torch.export`` gives it, and what can be asked of it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..errors import AdapterError, SnowsError, one_line
from .outputs import outputs_of


ACTIVATIONS = frozenset(("relu", "relu6", "leaky_relu", "prelu", "hardtanh", "hardswish"))
ACTIVATIONS |= {"gelu", "silu", "mish", "elu", "selu", "softplus"}
NORMS = frozenset(("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm"))
PRODUCTS = frozenset(("matmul", "bmm", "einsum"))
FUSED_ATTENTION = "scaled_dot_product_attention"
VIEWS = frozenset(("slice", "select", "view", "narrow", "split", "chunk", "unbind", "getitem", "transpose", "permute"))


def kind(node: Node) -> str:
    """What a node computes: the name of ATen's operation, without the underscore of those that work in place."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1].strip("_") if schema else getattr(node.target, "__name__", "")


def works_in_place(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def value_of(node: Node) -> Any:
    """What the export computed with in the node's place: a tensor without values, or a number of images."""
    return node.meta.get("val")


@dataclass(frozen=True)
class Layer:
    """A call of a Linear or a Conv2d that reads its own weight."""

    node: Node
    name: str
    module: nn.Linear | nn.Conv2d

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def reads(self) -> Node:
        return self.node.all_input_nodes[0]


class ImagePart(nn.Module):
    """A model as a function of images alone, which tells the names of its outputs."""

    def __init__(self, model: nn.Module, tell: Callable[[list[str]], None]) -> None:
        super().__init__()
        self.model, self.tell = model, tell

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = outputs_of(self.model, images)
        self.tell(list(outputs))
        return tuple(outputs.values())


class Graph:
    """The exported graph of a model for images (n, 3, height, width) of one size, n being any.

    A value *moves* if it depends on the images; all others are constants, to be computed where they are read.

    Attributes:
        nodes: all that compute something, in the order of the model.
        results: the nodes of the model's outputs, by their names.
        layers: the calls of Linear and Conv2d on what moves.
        modules: those of the model, by all of their names.
        padded: convolutions to whose input the modules themselves add what is not in the graph.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.model = model
        names: list[str] = []
        self.module = exported(ImagePart(model, names.extend), image.to(next(model.parameters())))
        computing = ("call_function", "placeholder", "get_attr")
        self.nodes = [node for node in self.module.graph.nodes if node.op in computing]
        self.place = {node: i for i, node in enumerate(self.nodes)}
        _write_anew(self.nodes, self.place)
        (self.images,) = (node for node in self.nodes if node.op == "placeholder")
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        found: list[Node] = []
        map_arg(output.args, found.append)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.first_names = {module: name for name, module in model.named_modules()}
        self.padded = {*self._leave_padding()}
        self.results = dict(zip(names, found, strict=True))
        self.count = value_of(self.images).shape[0]
        self.moving = {self.images}
        for node in self.nodes:
            tensors = isinstance(value_of(node), Tensor | tuple | list)
            if tensors and any(source in self.moving for source in node.all_input_nodes):
                self.moving.add(node)
        self.moving &= reached(found, lambda node: node.all_input_nodes, stop=lambda node: False)
        self.layers: dict[Node, Layer] = {}
        for node in self.nodes:
            if node in self.moving and kind(node) in ("linear", "conv2d") and isinstance(node.args[1], Node):
                name, _, own = self.name_of(node.args[1]).rpartition(".")
                module = self.modules.get(name)
                if own == "weight" and isinstance(module, nn.Linear | nn.Conv2d) and own in module._parameters:
                    self.layers[node] = Layer(node, name, module)

    def name_of(self, node: Node) -> str:
        """The live name of the model's tensor that a node reads, the first of its module's; empty where it reads
        none."""
        target = str(node.target)
        if node.op != "get_attr" or not target.startswith("model."):
            return ""
        path, _, own = target.removeprefix("model.").rpartition(".")
        first = self.first_names.get(self.modules.get(path), path)
        return f"{first}.{own}" if first else own

    def _leave_padding(self) -> Iterator[Node]:
        """Convolutions that pad by another value than zero read what has no padding yet, as their modules do."""
        for node in self.nodes:
            if kind(node) != "conv2d" or not all(isinstance(arg, Node) for arg in node.args[:2]):
                continue
            padded, weight = node.all_input_nodes[:2]
            module: Any = self.modules.get(self.name_of(weight).rpartition(".")[0])
            if isinstance(module, nn.Conv2d) and kind(padded) == "pad":
                x, padding, mode = (*padded.args, None)[:3]
                if mode == module.padding_mode and padding == [*module._reversed_padding_repeated_twice]:
                    node.replace_input_with(padded, x)
                    yield node

    def users(self, node: Node) -> list[Node]:
        return [user for user in node.users if user in self.moving]

    def sources(self, node: Node) -> list[Node]:
        return [source for source in node.all_input_nodes if source in self.moving]

    def follow(self, node: Node) -> Iterator[Node]:
        """One value after the other, as long as each is read by one node alone."""
        while len(users := self.users(node)) == 1:
            (node,) = users
            yield node

    def layers_before(self, node: Node) -> list[Layer]:
        """The layers that a value comes from, with no other layer between, in the model's order."""
        found = reached([node], self.sources, stop=self.layers.__contains__)
        return [self.layers[n] for n in sorted(found, key=self.place.__getitem__) if n in self.layers]

    @cached_property
    def products(self) -> set[Node]:
        """What a Linear or a convolution computes of what moves, whatever its weight is."""
        return {node for node in self.moving if kind(node) in ("linear", "conv2d")}

    @cached_property
    def factors(self) -> set[str]:
        """Names of the model's tensors that the weights of these products are, or are computed from."""
        weights = [node.args[1] for node in self.products if isinstance(node.args[1], Node)]
        return {self.name_of(node) for node in reached(weights, lambda n: n.all_input_nodes, lambda n: False)}

    @cached_property
    def unshared(self) -> set[str]:
        """Names of the parameters that one node alone reads, and that have no other name."""
        names = Counter(id(parameter) for _, parameter in self.model.named_parameters(remove_duplicate=False))
        reads = Counter[str]()
        for node in self.nodes:
            reads[self.name_of(node)] += len(node.users)
        return {name for name, own in self.model.named_parameters() if names[id(own)] == reads[name] == 1}

    @cached_property
    def residuals(self) -> set[Node]:
        """The additions of two values of the same shape (n, …, …) that come from different layers."""
        found = set()
        for node in self.nodes:
            both = [arg for arg in node.args[:2] if isinstance(arg, Node) and arg in self.moving]
            if kind(node) == "add" and len(both) == 2 and node in self.moving and value_of(node).dim() > 2:
                same = value_of(both[0]).shape == value_of(both[1]).shape
                if same and self.layers_before(both[0]) != self.layers_before(both[1]):
                    found.add(node)
        return found

    def is_activation(self, node: Node) -> bool:
        """Whether a node ends a nonlinearity: one of ATen's, or x times a function of x alone, as in quick GELU."""
        if kind(node) in ACTIVATIONS:
            return True
        both = [arg for arg in node.args if isinstance(arg, Node) and arg in self.moving]
        if kind(node) != "mul" or len(both) != 2 or both[0] is both[1]:
            return False
        x, factor = sorted(both, key=self.place.__getitem__)
        between = reached([factor], self.sources, stop=lambda n: n is x or n in self.layers)
        ends = {n for n in between if n in self.layers or n is self.images}
        return x in between and ends <= {x} and any(kind(n) in ("sigmoid", "tanh", "erf") for n in between)

    @cached_property
    def attentions(self) -> list[tuple[Node, list[Layer]]]:
        """Of every attention the product of its probabilities with the values, and the layers that queries, keys and
        values come from."""
        found = []
        for node in self.nodes:
            if node not in self.moving:
                continue
            if kind(node) == FUSED_ATTENTION:
                found.append((node, self._side_by_side(node)))
            elif kind(node) == "softmax":
                product = next((n for n in self.follow(node) if kind(n) in PRODUCTS or n in self.layers), node)
                if kind(product) in PRODUCTS:
                    found.append((product, self._side_by_side(product)))
        return found

    def _side_by_side(self, product: Node) -> list[Layer]:
        """The layers before a product that none of the others reads: of those that a residual stream brings along, and
        from which queries, keys or values are made, none."""
        layers = self.layers_before(product)
        own = {layer.node for layer in layers}

        def later(node: Node) -> bool:
            return self.place[node] >= self.place[product]

        return [n for n in layers if not own & reached(self.users(n.node), self.users, stop=later)]

    def is_within(self, layer: Layer) -> bool:
        """Whether something between a layer and the model's outputs is not linear, or is added to a stream: what
        follows a classifier is not."""

        def ends(node: Node) -> bool:
            own = node in self.layers or node in self.residuals or kind(node) in NORMS | {"softmax"}
            return own or self.is_activation(node)

        after = reached(self.users(layer.node), self.users, stop=ends)
        return any(map(ends, after))

    def is_gate(self, node: Node) -> bool:
        """Whether two values that move are multiplied."""
        return kind(node) == "mul" and len(self.sources(node)) == 2


def reached(start: Iterable[Node], step: Callable[[Node], list[Node]], stop: Callable[[Node], bool]) -> set[Node]:
    """All nodes that steps lead to, with those that stop them."""
    todo, seen = list(start), set[Node]()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [] if stop(node) else step(node)
    return seen


def _write_anew(nodes: list[Node], place: dict[Node, int]) -> None:
    """Whatever reads a value after it was overwritten reads what was written, for operations run out of place."""
    for node in nodes:
        if works_in_place(node) and isinstance(node.args[0], Node):
            own = place[node]
            after = {user for user in node.args[0].users if place.get(user, len(nodes)) > own}
            node.args[0].replace_all_uses_with(node, delete_user_cb=after.__contains__)


def _overwrites_a_view(node: Node) -> bool:
    source = node.args[0] if node.args else None
    return works_in_place(node) and isinstance(source, Node) and kind(source) in VIEWS


def exported(part: ImagePart, image: Tensor) -> GraphModule:
    """The graph of a model's evaluation mode.

    Raises:
        AdapterError: it cannot be traced, or its operations depend on the number of images.
    """
    name = type(part.model).__name__
    training = {module: module.training for module in part.modules()}
    try:
        with torch.no_grad():
            program = export(
                part.eval(), (image.expand(2, -1, -1, -1).clone(),), strict=False, dynamic_shapes=({0: Dim.AUTO},)
            )
            module = _without_aliases(program)
    except SnowsError:
        raise
    except Exception as error:  # a library's, of any type
        raise AdapterError(
            f"{name} cannot be traced on images of {tuple(image.shape[1:])}: "
            f"{type(error).__name__}: {one_line(error)}",
            "Its forward pass must not depend on what the images show, and must take images of this size.",
        ) from error
    finally:
        for each, mode in training.items():
            each.training = mode
    (images,) = (node for node in module.graph.nodes if node.op == "placeholder")
    count = value_of(images).shape[0]
    if isinstance(count, int) or count.node.expr.is_number:
        raise AdapterError(f"{name} cannot be traced: what it computes depends on the number of images.")
    return module


def _without_aliases(program: ExportedProgram) -> GraphModule:
    """The graph; where a part of a tensor is overwritten in place, one that says so in other operations."""
    module: GraphModule = _inlined(program.module())
    if any(_overwrites_a_view(node) for node in module.graph.nodes):
        module = _inlined(program.run_decompositions({}).module())
    return module


def _inlined(module: GraphModule) -> GraphModule:
    """The graph with the parts that it would run under another autocast, or with other gradients, in their places."""
    for node in list(module.graph.nodes):
        given = [arg for arg in node.args if isinstance(arg, Node) and arg.op == "get_attr"]
        parts = [(arg, getattr(module, str(arg.target), None)) for arg in given]
        inner = next(((arg, part) for arg, part in parts if isinstance(part, GraphModule)), None)
        if node.op != "call_function" or inner is None:
            continue
        arg, part = inner
        part = _inlined(part)
        inputs: Any = node.args[node.args.index(arg) + 1 :]
        values = dict(zip((n for n in part.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        with module.graph.inserting_before(node):
            returned: Any = module.graph.graph_copy(part.graph, values)
        for user in list(node.users):
            user.replace_all_uses_with(cast(Any, returned)[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not arg.users:
            module.graph.erase_node(arg)
    return module
