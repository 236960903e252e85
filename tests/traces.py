"""Traces that are shared: what ``torch.export`` says of an architecture, asked once for all models that have it.

Traces are nine tenths of what a test with a tiny network takes. Tests of traces use the fixture ``own_traces``.
"""

import copy
from collections.abc import Callable
from functools import wraps

from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedConfig

from snows_hf.adapters.trace import ImagePart


NAMES = ("_name_or_path", "name_or_path", "architectures", "id2label", "label2id", "snows", "transformers_version")
"""What libraries and this package write beside settings: it computes nothing."""

Export = Callable[[ImagePart, Tensor], GraphModule]


def shared(export: Export) -> Export:
    """``export``, which gives copies of the graph that it has found for another model of the same architecture."""
    found: dict[str, tuple[GraphModule, list[str]]] = {}
    models: list[nn.Module] = []  # which stay, so that nothing else comes to have the address of what is in them

    @wraps(export)
    def exported(part: ImagePart, image: Tensor) -> GraphModule:
        own = architecture(part.model, image)
        if own not in found:
            names: list[str] = []
            found[own] = export(ImagePart(part.model, names.extend), image), names
            models.append(part.model)
        module, names = found[own]
        part.tell(names)
        return GraphModule(module, copy.deepcopy(module.graph))

    return exported


def architecture(model: nn.Module, image: Tensor) -> str:
    """All that decides what a model computes but for the values of its tensors: its modules, their settings and what
    was put in their places, the shapes and types of tensors, and the images."""
    said: list[object] = [image.shape, image.dtype, image.device]
    for name, module in model.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(module).items() if k not in ("training", *NAMES) and not k.startswith("_")}
        said += [name, type(module), {k: settings(v) for k, v in own.items() if not isinstance(v, Tensor | nn.Module)}]
        said += [(hook, len(hooks)) for hook, hooks in vars(module).items() if hook.endswith("hooks") and hooks]
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        said += [name, tensor.shape, tensor.dtype, tensor.device]
    return str(said)


def settings(value: object) -> object:
    """A configuration without the names in it; what is none as it is."""
    if not isinstance(value, PreTrainedConfig):
        return value
    said = {key: entry for key, entry in value.to_dict().items() if key not in NAMES}
    return said, value._attn_implementation
