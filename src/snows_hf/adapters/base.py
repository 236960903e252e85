"""The model as the paper sees it: a chain of operations, some of which own weights to prune.

An architecture is one file beside this one: a function that cuts a model into operations, and ``@register``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError


State = tuple[Tensor, ...]
"""What flows between operations: first the output that Eq. 3 compares, then what later operations still need
(the residual stream, say). Every tensor has the images along its first dimension."""

Function = Callable[[Tensor], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Weights that are solved for jointly.

    Attributes:
        name: the layer's name in the model's own (live) namespace, ``vit.layers.0.attention.qkv`` for example.
        parameters: names of the parameters in ``model.named_parameters()``.
        kind: what the layer is to its architecture: ``qkv``, ``proj``, ``mlp0``, ``mlp3``, ``conv``, ...
    """

    name: str
    parameters: tuple[str, ...]
    kind: str

    @classmethod
    def of(cls, name: str, kind: str) -> "Group":
        """A layer of one weight, as most are."""
        return cls(name, (f"{name}.weight",), kind)


@dataclass(frozen=True)
class Operation:
    """One output that counts as a k in Eq. 3, and how it is computed from the state before it.

    ``group`` holds the weights that act here and can be pruned; None where there are none.
    """

    name: str
    run: Callable[[State], State]
    group: Group | None = None

    @classmethod
    def of(cls, name: str, apply: Function, kind: str | None = None) -> "Operation":
        """One that maps the first tensor of the state and passes on the others; with a ``kind``, it is a layer of one
        weight, whose name it has."""
        return cls(name, lambda s: (apply(s[0]), *s[1:]), Group.of(name, kind) if kind else None)


@torch.no_grad()
def run_operation(operation: Operation, state: Any) -> Any:
    """The state after an operation, without a graph."""
    return operation.run(state)


class Chain(nn.Module):
    """A model cut into operations: running all of them gives the model's logits.

    Segments f^{l:l+k} of Eq. 3 are slices of ``operations``; nothing before or after a slice is run.

    Attributes:
        offloaded: where operations run, if not where the model's weights are (offload.py).
    """

    def __init__(
        self, model: nn.Module, operations: list[Operation], family: str, offloaded: torch.device | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.operations = operations
        self.family = family
        self.offloaded = offloaded

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

    def logits(self, images: Tensor) -> Tensor:
        """The model's logits (n, classes) for preprocessed images (n, 3, height, width), through the chain."""
        return self((images,))[-1]

    def outputs(self, state: State, start: int, stop: int, weights: dict[str, Tensor]) -> list[Tensor]:
        """Like calling the chain, with the named parameters replaced: differentiable in ``weights``."""
        replaced = {f"model.{name}": value for name, value in weights.items()}
        return torch.func.functional_call(self, replaced, (state, start, stop))

    def groups(self) -> list[tuple[int, Group]]:
        """Every group with the index of the operation it acts in, in forward order."""
        return [(i, operation.group) for i, operation in enumerate(self.operations) if operation.group is not None]

    def weight(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrites the model's weights of these names."""
        for name, weight in weights.items():
            self.weight(name).copy_(weight)


Builder = Callable[[nn.Module], Iterable[Operation]]
_BUILDERS: dict[type[nn.Module], tuple[Builder, str]] = {}


def register(*classes: type[nn.Module], family: str) -> Callable[[Builder], Builder]:
    """Decorator: ``builder(model)`` cuts models of these classes (exact or derived) into operations.

    ``family`` picks their settings in :data:`snows_hf.settings.PRESETS`.
    """

    def add(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(classes, (builder, family)))
        return builder

    return add


@cache
def _register_all() -> None:
    """Imports every file beside this one: only now, since they need the libraries whole."""
    for module in iter_modules([str(Path(__file__).parent)]):
        import_module(f"{__package__}.{module.name}")


def supported() -> list[str]:
    """Names of the model classes that have an adapter."""
    _register_all()
    return sorted({f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in _BUILDERS})


def build_chain(model: nn.Module) -> Chain:
    """Cuts a model into its chain of operations.

    Raises:
        AdapterError: no adapter knows the model's class, or its parts are not what the adapter expects.
    """
    _register_all()
    for cls in type(model).__mro__:
        if cls in _BUILDERS:
            builder, family = _BUILDERS[cls]
            chain = Chain(model, list(builder(model)), family)
            _check_groups(chain)
            return chain
    raise AdapterError(
        f"No adapter for the architecture {type(model).__module__.split('.')[0]}.{type(model).__name__}.",
        f"Supported: {', '.join(supported())}. A new one is one file in snows_hf/adapters/ (CONTRIBUTING.md).",
    )


def _check_groups(chain: Chain) -> None:
    """Makes sure that every group names plain weights of the model, and none twice.

    Raises:
        AdapterError: a parametrised (LoRA, weight norm), replaced or shared layer.
    """
    plain = {name for name, parameter in chain.model.named_parameters() if parameter.ndim in (2, 4)}
    seen: set[str] = set()
    for _, group in chain.groups():
        for name in group.parameters:
            if name not in plain or name in seen:
                fault = "in two layers" if name in seen else "not a plain weight (output, input, …) of the model"
                raise AdapterError(
                    f"Layer {group.name} of {type(chain.model).__name__}: {name} is {fault}.",
                    "Merge or remove parametrisations such as LoRA or weight norm, and untie shared layers, first.",
                )
            seen.add(name)


def check_kind(module: nn.Module, name: str, *expected: type[nn.Module], model: str) -> None:
    """Makes sure that a part of one of timm's models is of a class that its adapter knows.

    Raises:
        AdapterError: it is not, or of a class derived from it.
    """
    if type(module) not in expected:
        raise AdapterError(
            f"{name} is a {type(module).__name__}; expected timm's {' or '.join(c.__name__ for c in expected)}.",
            f"This variant of timm's {model} has no adapter yet.",
        )


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Live name of every submodule."""
    return {module: name for name, module in model.named_modules()}
