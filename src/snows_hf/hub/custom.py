"""Models that no configuration of their class describes: that of a wider configuration, narrowed to the tensors that
there are.

What a module notes of its own widths follows its tensors. A module that is not known here, and holds no parameter of
torch's own layers, is believed to read them as they are; whether that is so, running the model tells.
"""

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError


Shapes = Mapping[str, torch.Size]

HEADS = ("num_heads", "num_attention_heads")
"""What attention calls its number of heads."""

ALL_HEADS = ("all_head_size", "attn_dim", "inner_dim")
"""What it calls the width of all heads together, where it notes that."""


@torch.no_grad()
def narrow(model: nn.Module, shapes: Shapes) -> None:
    """Gives tensors of a model smaller shapes, by their names, in place; their values are no matter.

    Raises:
        ConfigError: a tensor that the model does not have or that would grow, or a module that cannot be narrowed.
    """
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    changed = {name: shape for name, shape in shapes.items() if before.get(name) != shape}
    for name, shape in changed.items():
        _check(model, name, before.get(name), shape)
    for name, shape in changed.items():
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor: Tensor = getattr(module, own)
        smaller = tensor.new_empty(shape)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(module, own, nn.Parameter(smaller, tensor.requires_grad) if is_parameter else smaller)
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in changed):
        _note_widths(owner, model.get_submodule(owner))
    for name, module in model.named_modules():
        _note_heads(name, module, before)


def _check(model: nn.Module, name: str, before: torch.Size | None, shape: torch.Size) -> None:
    fits = before is not None and len(before) == len(shape)
    if before is None or not fits or not all(0 < after <= size for size, after in zip(before, shape, strict=True)):
        had = "no such tensor" if before is None else str(tuple(before))
        raise ConfigError(f"{name}: {tuple(shape)} is no narrower shape; {type(model).__name__} has {had}.")
    module: Any = model.get_submodule(name.rpartition(".")[0])
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels
    known = isinstance(module, nn.Linear | _BatchNorm) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    if not (depthwise or known) and type(module).__module__.startswith("torch.nn."):
        grouped = " of several groups" if isinstance(module, nn.Conv2d) else ""
        raise ConfigError(
            f"{name}: a {type(module).__name__}{grouped} cannot be narrowed to {tuple(shape)}.",
            "Linear, Conv2d, plain or depthwise, BatchNorm and parameters of their own can.",
        )


def _note_widths(name: str, module: nn.Module) -> None:
    """Lets a layer say of itself what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d) and module.groups > 1:
        module.groups = module.in_channels = module.out_channels = module.weight.shape[0]
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, _BatchNorm):
        entries = {tensor.shape for tensor in module.state_dict().values() if tensor.dim()}
        if len(entries) > 1:
            raise ConfigError(f"{name}: parts of a batch norm are of different sizes: {sorted(map(tuple, entries))}.")
        module.num_features = entries.pop()[0]


def _note_heads(name: str, module: nn.Module, before: Shapes) -> None:
    """Lets an attention whose queries, keys and values are narrower count its heads anew."""
    count = next((own for own in HEADS if isinstance(getattr(module, own, None), int)), None)
    rows = set[tuple[int, int]]()
    for child, layer in module.named_children():
        old = before.get(f"{name}.{child}.weight" if name else f"{child}.weight")
        if isinstance(layer, nn.Linear) and old is not None and layer.out_features != old[0]:
            rows.add((old[0], layer.out_features))
    if count is None or not rows:
        return
    heads = getattr(module, count)
    left = {heads * after / old for old, after in rows}
    if len(left) > 1 or not left.copy().pop().is_integer():
        raise ConfigError(f"{name}: its rows {sorted(rows)} are not those of whole heads, of which it has {heads}.")
    setattr(module, count, int(left.pop()))
    width, after = rows.pop()
    for own in ALL_HEADS:
        if isinstance(getattr(module, own, None), int):
            setattr(module, own, getattr(module, own) * after // width)


def narrowed_class(kind: Any, shapes: Shapes) -> Any:
    """A class whose models are those of ``kind``, a class of transformers, but narrow from the beginning, so that
    transformers' own loading meets tensors of the shapes that the file has."""

    @wraps(kind.__init__)
    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        kind.__init__(self, *arguments, **options)
        narrow(self, shapes)

    return type(kind.__name__, (kind,), {"__init__": begin, "__module__": kind.__module__})
