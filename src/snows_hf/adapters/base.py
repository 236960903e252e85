"""The model as the paper sees it: a chain of operations, some of which own weights to prune.

An architecture is one file beside this one: a function that cuts a model into operations, and ``@register``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError


State = tuple[Tensor, ...]
"""What flows between operations: first the output that Eq. 3 compares, then what later operations still need
(the residual stream, say). Every tensor has the images along its first dimension."""

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Weights that are solved for jointly.

    Attributes:
        name: the layer's name in the model's own (live) namespace, ``vit.layers.0.attention.qkv`` for example.
        parameters: names of the parameters in ``model.named_parameters()``.
        kind: what the layer is to its architecture: ``qkv``, ``proj``, ``mlp0``, ``mlp3``, ``conv``, ...
        biases: pairs of one of these and the bias that shifts what it makes, row by row, where there is one: the
            layer's own, or that of the batch norm after a convolution.
    """

    name: str
    parameters: tuple[str, ...]
    kind: str
    biases: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, name: str, kind: str, bias: str = "") -> "Group":
        """A layer of one weight, as most are."""
        weight = f"{name}.weight"
        return cls(name, (weight,), kind, ((weight, bias),) if bias else ())


@dataclass(frozen=True)
class Operation:
    """One output that counts as a k in Eq. 3, and how it is computed from the state before it.

    ``group`` holds the weights that act here and can be pruned; None where there are none. ``layers`` names all Linear
    and Conv2d layers that act here, stems and heads, too.
    """

    name: str
    run: Callable[[State], State]
    group: Group | None = None
    layers: tuple[str, ...] = ()


@torch.no_grad()
def run_operation(operation: Operation, state: Any) -> Any:
    """The state after an operation, without a graph."""
    return operation.run(state)


class Chain(nn.Module):
    """A model cut into operations: running all of them gives the model's outputs.

    Segments f^{l:l+k} of Eq. 3 are slices of ``operations``; nothing before or after a slice is run.

    Attributes:
        offloaded: where operations run, if not where the model's weights are (offload.py).
        results: names of the model's outputs, in the order of the last operation's state.
        dense: Linear and Conv2d layers that are in no group, each with the reason.
        image: a blank one (1, 3, height, width) of the size that the chain is for, where that matters.
        graph: the model's own (trace.py), where the operations were cut from it.
    """

    def __init__(
        self,
        model: nn.Module,
        operations: list[Operation],
        family: str,
        offloaded: torch.device | None = None,
        results: tuple[str, ...] = ("logits",),
        dense: Mapping[str, str] | None = None,
        image: Tensor | None = None,
        graph: Any = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.operations = operations
        self.family = family
        self.offloaded = offloaded
        self.results = results
        self.dense = dict(dense or {})
        self.image = image
        self.graph = graph

    @property
    def device(self) -> torch.device:
        """Where operations run."""
        return self.offloaded or next(self.model.parameters()).device

    def forward(self, state: State, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Outputs of ``operations[start:stop]``, in order, from the state before ``start``."""
        outputs = []
        for operation in self.operations[start:stop]:
            state = operation.run(state)
            outputs.append(state[0])
        return outputs

    def walk(
        self, flow: T, advance: Callable[[Operation, T], T] | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, Operation, T]]:
        """Every one of ``operations[:stop]``, in forward order, with its place and what flows into it.

        Args:
            flow: what enters the first operation: a state, or whatever ``advance`` takes.
            advance: what leaves an operation, of what enters it; asked for once the caller is done with that. None:
                the state after it, without a graph.
        """
        for place, operation in enumerate(self.operations[:stop]):
            yield place, operation, flow
            flow = (advance or run_operation)(operation, flow)

    def results_of(self, images: Tensor) -> dict[str, Tensor]:
        """The model's outputs by name for preprocessed images (n, 3, height, width), through the chain."""
        state: State = (images,)
        for operation in self.operations:
            state = operation.run(state)
        return dict(zip(self.results, state, strict=True))

    def logits(self, images: Tensor) -> Tensor:
        """A classifier's logits (n, classes) for preprocessed images (n, 3, height, width), through the chain."""
        return self.results_of(images)["logits"]

    def outputs(self, state: State, start: int, stop: int, weights: dict[str, Tensor]) -> list[Tensor]:
        """Like calling the chain, with the named parameters replaced: differentiable in ``weights``."""
        replaced = {f"model.{name}": value for name, value in weights.items()}
        return torch.func.functional_call(self, replaced, (state, start, stop))

    def groups(self) -> list[tuple[int, Group]]:
        """Every group with the index of the operation it acts in, in forward order."""
        return [(i, operation.group) for i, operation in enumerate(self.operations) if operation.group is not None]

    @property
    def biases(self) -> dict[str, str]:
        """The biases of all groups, by their weights."""
        return {weight: bias for _, group in self.groups() for weight, bias in group.biases}

    def weight(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    def tensor(self, name: str) -> Tensor:
        """A weight or a buffer."""
        tensor: Tensor = attrgetter(name)(self.model)
        return tensor

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrites the model's weights, or buffers, of these names."""
        for name, weight in weights.items():
            self.tensor(name).copy_(weight)


Builder = Callable[[nn.Module], Iterable[Operation]]
_BUILDERS: dict[type[nn.Module], tuple[Builder, str]] = {}


def register(*classes: type[nn.Module], family: str) -> Callable[[Builder], Builder]:
    """Decorator: ``builder(model)`` cuts models of these classes (exact or derived) into operations, where their graph
    does not say how, or there is none.

    ``family`` picks their settings in :data:`snows_hf.settings.EFFORTS`.
    """

    def add(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(classes, (builder, family)))
        return builder

    return add


def build_chain(
    model: nn.Module, image: Tensor | None = None, substitutes: Mapping[str, Callable[..., Tensor]] | None = None
) -> Chain:
    """Cuts a model into its chain of operations.

    Args:
        image: one of the images (1, 3, height, width) that the chain is for. None: of the size that the model's
            configuration says.
        substitutes: functions to compute instead of ATen's, by their names.

    Raises:
        AdapterError: the model cannot be traced, or a weight of it is not its own.
    """
    _check_layers(model)
    registered = next((_BUILDERS[cls] for cls in type(model).__mro__ if cls in _BUILDERS), None)
    if registered is not None:
        builder, family = registered
        chain = Chain(model, list(builder(model)), family)
    else:
        from .traced import traced_chain  # which is made of what is here

        chain = traced_chain(model, example(model) if image is None else image, substitutes or {})
    _check_groups(chain)
    return chain


def chain_for(chain: Chain, images: Tensor) -> Chain:
    """The chain for images (n, 3, height, width): the same, or a new one where they are of another size."""
    if chain.image is None or chain.image.shape[1:] == images.shape[1:]:
        return chain
    return build_chain(chain.model, images[:1])


def example(model: nn.Module) -> Tensor:
    """A blank image (1, 3, height, width) of the size that a model's configuration says; of 224 pixels where it says
    nothing."""
    config: Any = getattr(model, "config", None)
    patches: Any = getattr(model, "patch_embed", None)
    timm: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    candidates: tuple[Any, ...] = (
        getattr(patches, "img_size", None),
        (timm.get("input_size") or (0, None))[1:],
        getattr(config, "image_size", None),
        getattr(getattr(config, "vision_config", None), "image_size", None),
        getattr(getattr(config, "backbone_config", None), "image_size", None),
        224,
    )
    size = next(size for size in candidates if size and size != (None,))
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    parameter = next(model.parameters())
    return torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device)


REMEDY = "Merge or remove parametrisations such as LoRA or weight norm, and untie shared layers, first."


def _check_layers(model: nn.Module) -> None:
    """Makes sure that the weights of all Linear and Conv2d layers are tensors of the model.

    Raises:
        AdapterError: one is computed anew from others whenever it is read.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and "weight" not in module._parameters:
            raise AdapterError(f"Layer {name} of {type(model).__name__}: its weight is parametrised.", REMEDY)


def _check_groups(chain: Chain) -> None:
    """Makes sure that every group names plain weights of the model, and none twice.

    Raises:
        AdapterError: a replaced or shared layer.
    """
    plain = {name for name, parameter in chain.model.named_parameters() if parameter.ndim in (2, 4)}
    seen: set[str] = set()
    for _, group in chain.groups():
        for name in group.parameters:
            if name not in plain or name in seen:
                fault = "in two layers" if name in seen else "not a plain weight (output, input, …) of the model"
                raise AdapterError(f"Layer {group.name} of {type(chain.model).__name__}: {name} is {fault}.", REMEDY)
            seen.add(name)
