"""Where a model's graph is cut into operations, and which of its weights are solved for together.

An operation ends with an output that counts as a k in Eq. 3: that of a convolution or Linear (A.3.2), an activation
with the norm before it absorbed, the stream after a residual addition, and, of attention, its output before the
out-projection, to which queries, keys and values are solved for jointly (A.3.8).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.fx import Node

from ..errors import AdapterError
from .base import Group, Operation
from .engine import Engine, Part, Value
from .trace import FUSED_ATTENTION, NORMS, PRODUCTS, Graph, Layer, kind, reached, value_of


ATTENTION = PRODUCTS | {"softmax", FUSED_ATTENTION}
STEM, HEAD = "it reads the images", "it makes the model's output"
SHARED = "its weight is used more than once, or is another layer's, too"
STANDARDISED = "not its weight, but what is computed from it (weight standardisation, say), is multiplied"
UNREAD = "nothing that depends on the images is multiplied by its weight"


@dataclass
class Cuts:
    """Operations by the nodes that end them, with their names; groups by the layers that they hold; and layers that
    no group holds, with the reason."""

    ends: dict[Node, str] = field(default_factory=dict)
    groups: dict[Node, Group] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)

    def end(self, node: Node, name: str) -> None:
        """Ends an operation; names that are there already get a number."""
        if node not in self.ends:
            taken = sum(other == name or other.startswith(f"{name} (") for other in self.ends.values())
            self.ends[node] = f"{name} ({taken + 1})" if taken else name


def find_cuts(graph: Graph) -> Cuts:
    """Cuts of a graph by the rules above."""
    cuts = Cuts(dense=_not_pruned(graph))
    joint = _cut_attention(graph, cuts)
    for node, layer in graph.layers.items():
        if node in joint or cuts.dense.get(layer.name) == HEAD:
            continue
        addition = residual_after(graph, layer)
        if addition is not None and addition not in cuts.ends:
            cuts.end(addition, f"{layer.name} > residual")
        else:
            cuts.end(node, layer.name)
        if layer.name not in cuts.dense:
            cuts.groups[node] = Group.of(layer.name, kind_of(graph, layer), bias_of(graph, layer))
    for node in filter(graph.moving.__contains__, graph.nodes):
        if (event := _event(graph, node)) and (before := graph.layers_before(node)):
            cuts.end(node, f"{before[-1].name} > {event}")
    for name, node in graph.results.items():
        heads = [layer.name for layer in graph.layers_before(node) if cuts.dense.get(layer.name) == HEAD]
        cuts.end(node, heads[0] if len(heads) == 1 else name)
    return cuts


def _cut_attention(graph: Graph, cuts: Cuts) -> set[Node]:
    """Cuts at the output of each attention; the layers that make its queries, keys and values."""
    joint: set[Node] = set()
    for product, layers in graph.attentions:
        nodes = [layer.node for layer in layers]
        if not 1 <= len(layers) <= 4 or joint & {*nodes} or any(layer.name in cuts.dense for layer in layers):
            continue
        joint |= {*nodes}
        name = layers[0].name if len(layers) == 1 else f"{layers[0].name.rpartition('.')[0]}.qkv"
        biases = {layer.weight: bias for layer in layers if (bias := bias_of(graph, layer))}
        group = Group(name, tuple(dict.fromkeys(layer.weight for layer in layers)), "qkv", tuple(biases.items()))
        cuts.groups |= dict.fromkeys(nodes, group)
        cuts.end(output_of_attention(graph, product), f"{name} > attention")
    return joint


def output_of_attention(graph: Graph, product: Node) -> Node:
    """What the out-projection reads; the product itself where none follows."""
    node = product
    for after in graph.follow(product):
        if after in graph.layers:
            return node
        if after in graph.residuals:
            break
        node = after
    return product


def residual_after(graph: Graph, layer: Layer) -> Node | None:
    """The addition that a layer's output goes into with nothing between that counts; None for a convolution that a
    batch norm follows, whose output counts itself (A.3.2)."""
    for after in graph.follow(layer.node):
        if after in graph.residuals:
            return after
        nonlinear = graph.is_activation(after) or graph.is_gate(after) or kind(after) in ATTENTION
        norm = kind(after) in NORMS and isinstance(layer.module, nn.Conv2d)
        if after in graph.layers or nonlinear or norm:
            return None
    return None


def _event(graph: Graph, node: Node) -> str:
    """``activation`` or ``residual`` where a node's output counts as one."""
    users = graph.users(node)
    if graph.is_activation(node):
        return "" if len(users) == 1 and users[0] in graph.residuals else "activation"
    if node in graph.residuals:
        absorbed = any(map(graph.is_activation, users))
        return "" if absorbed or (len(users) == 1 and users[0] in graph.residuals) else "residual"
    return ""


def kind_of(graph: Graph, layer: Layer) -> str:
    """What a layer is to its architecture, in the paper's words where it has one."""
    module = layer.module
    if isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels > 1:
            return "depthwise"
        return "pointwise" if module.kernel_size == (1, 1) else "conv"
    if any(output_of_attention(graph, product) is layer.reads for product, _ in graph.attentions):
        return "proj"

    def ends(node: Node) -> bool:
        return node in graph.layers or node in graph.residuals or graph.is_activation(node)

    if any(map(graph.is_activation, reached(graph.users(layer.node), graph.users, stop=ends))):
        return "mlp0"
    return "mlp3" if residual_after(graph, layer) else "linear"


def bias_of(graph: Graph, layer: Layer) -> str:
    """The parameter (rows,) that shifts a layer's output and does nothing else: its own bias, or, where a batch norm
    is all that reads a convolution, that one's; empty where there is none."""
    users = graph.users(layer.node)
    norms = [node for node in users if kind(node) == "batch_norm" and isinstance(layer.module, nn.Conv2d)]
    for node in (layer.node, *(norms if len(users) == 1 else ())):
        bias = node.args[2] if len(node.args) > 2 else None
        name = graph.name_of(bias) if isinstance(bias, Node) else ""
        owner = graph.modules.get(name.rpartition(".")[0])
        if name in graph.unshared and (owner is layer.module or isinstance(owner, nn.BatchNorm2d)):
            return name
    return ""


def _not_pruned(graph: Graph) -> dict[str, str]:
    """Names of the Linear and Conv2d layers that no group may hold, each with the reason."""
    modules = {n: m for n, m in graph.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    times = Counter(layer.name for layer in graph.layers.values())
    owners = Counter(id(module.weight) for module in modules.values())
    dense = {}
    for node, layer in graph.layers.items():
        if times[layer.name] > 1 or owners[id(layer.module.weight)] > 1:
            dense[layer.name] = SHARED
        elif not reached(graph.sources(node), graph.sources, graph.products.__contains__) & graph.products:
            dense[layer.name] = STEM
        elif not graph.is_within(layer):
            dense[layer.name] = HEAD
    for name, module in modules.items():
        if name not in times and owners[id(module.weight)] > 1:
            dense[name] = SHARED
        elif name not in times:
            dense[name] = STANDARDISED if f"{name}.weight" in graph.factors else UNREAD
    return dense


def operations_of(graph: Graph, cuts: Cuts, engine: Engine) -> tuple[list[Operation], list[Node]]:
    """The graph as operations, each computing what its end needs and no earlier one has computed; and the nodes of the
    last state."""
    operations = list[Operation]()
    entering = [Value(graph.images, 0, 1)]
    known = {graph.images}
    kept = {*graph.results.values()}
    for end, name in _ends(graph, cuts):
        nodes = _needed(graph, end, known)
        if not nodes:
            continue
        moving = [node for node in nodes if node in graph.moving]
        known |= {*moving}
        leaving = [_resting(engine, end, name)]
        for node in [*(value.node for value in entering), *moving]:
            read = node in kept or any(user not in known for user in graph.users(node))
            if node is not end and read and isinstance(value_of(node), Tensor):
                leaving.append(_resting(engine, node, name))
        groups = list(dict.fromkeys(cuts.groups[node] for node in moving if node in cuts.groups))
        layers = tuple(graph.layers[node].name for node in moving if node in graph.layers)
        part = Part(engine, nodes, entering, leaving)
        operations.append(Operation(name, part, groups[0] if groups else None, layers))
        entering = leaving
    return operations, [value.node for value in entering]


def _ends(graph: Graph, cuts: Cuts) -> Iterator[tuple[Node, str]]:
    """The ends of operations in the model's order, with those besides that keep two groups from being in one, and
    without those that would part the layers of one group."""
    known, done = {graph.images}, set[str]()
    members = defaultdict[Group, set[Node]](set)
    for node, group in cuts.groups.items():
        members[group].add(node)
    for end in sorted(cuts.ends, key=graph.place.__getitem__):
        nodes = _needed(graph, end, known)
        layers = [node for node in nodes if node in cuts.groups and cuts.groups[node].name not in done]
        if any(not members[cuts.groups[node]] <= known | {*nodes} for node in layers):
            continue
        for node in layers:
            if cuts.groups[node].name != cuts.groups[layers[-1]].name:
                yield node, graph.layers[node].name
        done |= {cuts.groups[node].name for node in layers}
        known |= {node for node in nodes if node in graph.moving}
        yield end, cuts.ends[end]


def _needed(graph: Graph, end: Node, known: set[Node]) -> list[Node]:
    """What computes a node from those that are known, in order; constants are computed anew. Of what has parts, all
    of them."""
    todo, found = [end], set[Node]()
    while todo:
        node = todo.pop()
        if node in found or node in known:
            continue
        found.add(node)
        if not (kind(node).startswith("sym_size")):
            todo += node.all_input_nodes
        if node in graph.moving and not isinstance(value_of(node), Tensor):
            todo += graph.users(node)
    return sorted(found, key=graph.place.__getitem__)


def _resting(engine: Engine, node: Node, operation: str) -> Value:
    value = engine.value(node)
    if value is None:
        shape = tuple(map(str, value_of(node).shape))
        raise AdapterError(
            f"{type(engine.model).__name__} mixes images: after {operation}, {node.name} is of shape {shape}."
        )
    return value
