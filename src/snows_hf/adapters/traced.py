"""The chain of any model of images: traced, cut, and given the settings of its family."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .base import Chain
from .cut import find_cuts, kind_of, operations_of
from .engine import Engine
from .trace import Graph, kind


FAMILIES = {"CifarResNet": "cifar_resnet"}
"""Settings (snows_hf.settings.EFFORTS) of classes that the graph does not tell."""


def traced_chain(model: nn.Module, image: Tensor, substitutes: Mapping[str, Callable[..., Tensor]]) -> Chain:
    """The chain of a model on images of the size of ``image`` (1, 3, height, width); ``substitutes`` are functions to
    compute instead of ATen's.

    Raises:
        AdapterError: it cannot be traced.
    """
    with torch.no_grad():
        graph = Graph(model, image)
        cuts = find_cuts(graph)
        operations, ends = operations_of(graph, cuts, Engine(graph, substitutes))
    names = {node: name for name, node in graph.results.items()}
    results = tuple(names[end] for end in ends)
    blank = torch.zeros_like(image)
    return Chain(model, operations, family_of(graph), results=results, dense=cuts.dense, image=blank, graph=graph)


def family_of(graph: Graph) -> str:
    """``vit`` for attention, or MLPs with layer norms (ConvNeXt); ``mobilenet`` for depthwise convolutions, else
    ``resnet``."""
    own = next((FAMILIES[c.__name__] for c in type(graph.model).__mro__ if c.__name__ in FAMILIES), None)
    if own is not None:
        return own
    kinds = {kind(node) for node in graph.nodes}
    if graph.attentions or ("batch_norm" not in kinds and "layer_norm" in kinds):
        return "vit"
    depthwise = any(kind_of(graph, layer) == "depthwise" for layer in graph.layers.values())
    return "mobilenet" if depthwise else "resnet"
