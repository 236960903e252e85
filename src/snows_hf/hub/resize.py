"""A smaller model of the same class: what its configuration must say, and the model that is made of it.

Nothing of a class is known here. Fields that name a width in one library or the other are tried, and what builds a
model with exactly the tensors that there are is right. Where none does, a custom model may be made (custom.py).
"""

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from operator import le
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .custom import narrow
from .load import Checkpoint


Path = tuple[str, ...]
Fields = dict[Path, Any]
"""What a configuration is to say otherwise: paths of keys, and the values there."""


@dataclass(frozen=True)
class Size:
    """What is known of one structure: how many units each layer had and has, the first one's entries per unit, and
    the width of what that reads; and the same stage by stage: units that were there, that are left, and their
    entries."""

    before: int
    after: int
    each: int
    reads: int
    stages: tuple[tuple[int, int, int], ...]

    def shares(self) -> Iterator[float]:
        """Shares of the units of all stages that leave what is left of each, rounded down or to the nearest number."""
        exact = max(after / before for before, after, _ in self.stages)
        yield exact
        yield (exact + min((after + 1) / before for before, after, _ in self.stages)) / 2
        nearest = [(after + half) / before for before, after, _ in self.stages for half in (-0.5, 0.5)]
        yield (max(nearest[::2]) + min(nearest[1::2])) / 2


def resized(
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    sizes: Mapping[str, Size],
    allow_custom: bool = False,
    unread: Collection[str] = (),
) -> Checkpoint:
    """The checkpoint with these tensors, of which structures (``mlp``, ``heads``, …) have new sizes; where
    no configuration says so, a custom one, if that is allowed. Tensors that are ``unread`` (no output depends on them)
    become smaller where the configuration has them so.

    Raises:
        ConfigError: no configuration of its class builds a model with tensors of these shapes, or, of a custom one, it
            cannot be narrowed to them.
    """
    fields = fields_for(checkpoint, state, sizes, unread)
    if fields is None and allow_custom:
        return _narrowed(checkpoint, state)
    if fields is None:
        what = " and ".join(f"{name} of {size.after} in place of {size.before}" for name, size in sizes.items())
        raise ConfigError(
            f"{type(checkpoint.model).__name__}: no configuration says {what}.",
            "Stock libraries could not load the result. Try another share, such as 0.5, zeros, such as 2:4, or "
            "--allow-custom, which makes a model that only this package loads.",
        )
    model = built(checkpoint, fields)
    assert model is not None
    sizes_there = {name: tensor.shape for name, tensor in model.state_dict().items()}
    fitting = {name: tensor[tuple(map(slice, sizes_there[name]))].contiguous() for name, tensor in state.items()}
    model.load_state_dict(fitting, assign=True)
    _with_constants_of(checkpoint.model, model)
    model.eval().requires_grad_(True)
    return replace(checkpoint, model=model, config=with_fields(checkpoint, fields))


def fields_for(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], sizes: Mapping[str, Size], unread: Collection[str] = ()
) -> Fields | None:
    """What the configuration must say for a model with tensors of the shapes of ``state``, of which nothing else is
    read, but for the ``unread`` ones, that may be smaller; None where there is nothing that it could say."""
    shapes, fitting = {name: tensor.shape for name, tensor in state.items()}, None
    for fields in candidates(checkpoint, sizes):
        with torch.device("meta"):
            trial = built(checkpoint, fields)
        own = {name: tensor.shape for name, tensor in trial.state_dict().items()} if trial is not None else {}
        if own.keys() != shapes.keys():
            continue
        others = [name for name in own if own[name] != shapes[name]]
        if not others:
            return fields
        smaller = all(all(map(le, own[name], shapes[name])) for name in others)
        if fitting is None and smaller and set(others) <= set(unread):
            fitting = fields
    return fitting


def _narrowed(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> Checkpoint:
    """A custom checkpoint with these tensors: its own model, narrowed."""
    model = copy.deepcopy(checkpoint.model)
    narrow(model, {name: tensor.shape for name, tensor in state.items()})
    model.load_state_dict(dict(state), assign=True)
    model.eval().requires_grad_(True)
    return replace(checkpoint, model=model, custom=True)


def _with_constants_of(source: nn.Module, model: nn.Module) -> None:
    """Gives a model the buffers that no file holds (tables of positions), where they are as large as in ``source``,
    and what timm has noted of it."""
    own = dict(model.named_buffers())
    for name, buffer in source.named_buffers():
        if name not in model.state_dict() and name in own and own[name].shape == buffer.shape:
            own[name].data = buffer.detach().clone()
    for noted in ("pretrained_cfg", "default_cfg"):
        if hasattr(source, noted):
            setattr(model, noted, getattr(source, noted))


def candidates(checkpoint: Checkpoint, sizes: Mapping[str, Size]) -> Iterator[Fields]:
    """What the configuration might have to say."""
    config: Any = checkpoint.model.config if checkpoint.library == "transformers" else None
    places = [((), config), *_inner(config)] if config is not None else [((), None)]
    for path, own in places:
        said = {} if own is not None else checkpoint.config.get("model_args", {})
        choices = [list(_fields(name, size, own, path, said)) for name, size in sizes.items()]
        for several in product(*choices):
            yield {key: value for fields in several for key, value in fields.items()}


def _inner(config: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The configurations within one, with their paths."""
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield (*path, name), value
            yield from _inner(value, (*path, name))


def _fields(name: str, size: Size, config: Any, path: Path, said: Mapping[str, Any]) -> Iterator[Fields]:
    """Ways to say the size of one structure, in a configuration of transformers or (None) in timm's arguments, of
    which some are ``said``."""
    if name == "mlp":
        if config is not None and hasattr(config, "intermediate_size"):
            yield {(*path, "intermediate_size"): size.after}
        before = getattr(config, "mlp_ratio", None) if config is not None else size.before / size.reads
        number: type = int if isinstance(before, int) else float  # as the class may insist
        for ratio in [before * share for share in size.shares()] if isinstance(before, int | float) else ():
            yield {(*path, "mlp_ratio"): number(ratio) if ratio == int(ratio) else ratio}
            yield {(*path, "mlp_ratio"): 2 * ratio}  # of gated units whose two halves count
        if config is None and len(size.stages) > 1:
            whole = size.before / size.reads
            for more in (0, 0.25):  # of a unit, which rounding down takes off again
                yield {("mlp_ratio",): [whole * (after + more) / units for units, after, _ in size.stages]}
    elif name == "heads" and config is not None:
        yield {(*path, "num_attention_heads"): size.after, (*path, "head_dim"): size.each}
    elif name == "heads":
        _, heads, each = zip(*size.stages, strict=True)
        yield {("num_heads",): list(heads), ("head_dim",): list(each)}
    elif name == "ranks" and config is not None:
        yield {(*path, "head_dim"): size.after}
    elif name == "ranks":
        yield {("head_dim",): size.after if len(size.stages) == 1 else [after for _, after, _ in size.stages]}
    elif name == "channels" and config is None:
        for (key, full), share in product({"base_width": 64, "inner": 1.0}.items(), size.shares()):
            yield {(key,): said.get(key, full) * share}


def built(checkpoint: Checkpoint, fields: Fields) -> nn.Module | None:
    """A model of the checkpoint's class, with weights as they are drawn, whose configuration says ``fields``; None
    where it takes no such value."""
    try:
        if checkpoint.library == "timm":
            given = checkpoint.config
            arguments = given.get("model_args", {}) | {path[-1]: value for path, value in fields.items()}
            classes: Any = checkpoint.model.num_classes
            return timm.create_model(given["architecture"], **{"num_classes": classes, **arguments})
        config = copy.deepcopy(checkpoint.model.config)
        for path, value in fields.items():
            owner: Any = config
            for name in path[:-1]:
                owner = getattr(owner, name)
            setattr(owner, path[-1], value)
        kind: Any = type(checkpoint.model)
        known = inspect.signature(kind.__init__).parameters
        return kind(config, **{name: value for name, value in checkpoint.options.items() if name in known})
    except Exception:  # a library's, of any type: this value is not the one
        return None


def with_fields(checkpoint: Checkpoint, fields: Fields) -> dict[str, Any]:
    """The contents of config.json, with ``fields``."""
    config = copy.deepcopy(checkpoint.config)
    for path, value in fields.items():
        owner = config.setdefault("model_args", {}) if checkpoint.library == "timm" else config
        for name in path[:-1]:
            owner = owner.setdefault(name, {})
        owner[path[-1]] = value
    return config
