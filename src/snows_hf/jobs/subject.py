"""The model that is pruned, or measured layer by layer: loaded, cut into operations, and what of it is asked for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Chain, Group, build_chain
from ..adapters.base import chain_for
from ..adapters.check import select_layers
from ..data.names import Name
from ..errors import AdapterError, ConfigError, shortened
from ..hub.load import Checkpoint, buffers_follow_weights, load
from ..masks.choose import split_by_fit
from ..patterns.plan import Candidate
from ..runtime.run import Run
from ..settings import PruneConfig, settings_for


@dataclass(frozen=True)
class Subject:
    """A model, and what of it is to be pruned.

    Attributes:
        checkpoint: as it was loaded; its network is changed in place.
        config: all settings, those of the model's family included.
        original: every tensor of the network as the checkpoint has it, by name.
    """

    checkpoint: Checkpoint
    chain: Chain
    config: PruneConfig
    layers: list[Group]
    original: dict[str, Tensor]

    @property
    def network(self) -> nn.Module:
        return self.checkpoint.model

    def for_images(self, images: Tensor) -> "Subject":
        """The same for images (n, 3, height, width) of the size that they really have."""
        return replace(self, chain=chain_for(self.chain, images))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The dense weights of the layers, by name."""
        return {name: self.original[name] for group in self.layers for name in group.parameters}


@torch.no_grad()
def restore_untouched(network: nn.Module, original: Mapping[str, Tensor], moved: Collection[str]) -> list[str]:
    """Casts every tensor back to its checkpoint's dtype, and puts back the very bits of those that were not ``moved``.

    Returns:
        Names of those with weights beyond the range of their dtype: these are now the largest that it has.
    """
    beyond = []
    for name, tensor in network.state_dict(keep_vars=True).items():
        source = original[name]
        if name not in moved:
            tensor.data = source.to(tensor.device, copy=True)  # biases may move yet
            continue
        largest = torch.finfo(source.dtype).max
        if float(tensor.abs().max()) > largest:
            beyond.append(name)
            tensor.data = tensor.data.double().clamp(-largest, largest)
        tensor.data = tensor.data.to(source.dtype)
    buffers_follow_weights(network)
    return beyond


def weights_of(chain: Chain) -> dict[str, Tensor]:
    """All prunable weights, by name."""
    return {name: chain.weight(name).detach() for _, group in chain.groups() for name in group.parameters}


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """All tensors of a network, by name."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def listed(models: Name | Sequence[Name]) -> list[str]:
    """Names of one model or of several.

    Raises:
        ConfigError: of none.
    """
    names = [fspath(model) for model in ([models] if isinstance(models, str | PathLike) else models)]
    if not names:
        raise ConfigError("No model is named.", "Name at least one Hub id or folder.")
    return names


def load_told(run: Run, model: Name, revision: str | None = None) -> Checkpoint:
    """:func:`~snows_hf.hub.load.load`, with a word about it."""
    run.say(f"Loading {model}")
    return load(model, revision, run=run)


def tell_dense(run: Run, chain: Chain) -> None:
    """Says which layers no pruning reaches, and how many weights they have.

    Raises:
        AdapterError: all.
    """
    names = shortened(list(chain.dense), 3)
    if not chain.groups():
        reasons = "; ".join(dict.fromkeys(chain.dense.values()))
        what = f"{type(chain.model).__name__} has no layer that can be pruned: {reasons}."
        raise AdapterError(what, "`snows-hf inspect MODEL` names its layers.")
    if chain.dense:
        dense = sum(chain.model.get_parameter(f"{name}.weight").numel() for name in chain.dense)
        share = dense / (dense + sum(weight.numel() for weight in weights_of(chain).values()))
        run.say(f"Never pruned: {names}, {100 * share:.1f} % of the weights (`snows-hf inspect` says why)")


def load_subject(
    run: Run,
    model: Name,
    revision: str | None,
    candidates: Sequence[Candidate],
    effort: str,
    pattern: str,
    settings: dict[str, Any],
) -> Subject:
    """Loads a model, and finds the layers that are asked for, of which each of the candidates must fit some; the
    settings are changes to what the effort has for the model's family.

    Raises:
        SnowsError: no such model, no adapter for it, no such layer, or a pattern that fits none.
    """
    checkpoint = load_told(run, model, revision)
    chain = build_chain(checkpoint.model, checkpoint.image())
    tell_dense(run, chain)
    config = settings_for(effort, chain.family, pattern, settings)
    layers = select_layers(chain, config.layers)
    subject = Subject(checkpoint, chain, config, layers, copy_of(checkpoint.model))
    for candidate in candidates:
        if candidate is not None:
            split_by_fit(subject.weights, candidate)
    return subject
