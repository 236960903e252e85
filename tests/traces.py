"""Traces that are shared: what ``torch.export`` says of an architecture, asked once for all models that have it.

Traces are nine tenths of what a test with a tiny network takes. Tests of traces use the fixture ``own_traces``.
"""

import copy
from collections.abc import Callable
from functools import wraps

from torch import Tensor, nn
from torch.fx import GraphModule

from snows_hf.adapters.trace import ImagePart


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
    said: list[object] = [image.shape, image.dtype, image.device, str(getattr(model, "config", ""))]
    for name, module in model.named_modules(remove_duplicate=False):
        settings = {k: v for k, v in vars(module).items() if k != "training" and not k.startswith("_")}
        said += [name, type(module), {k: v for k, v in settings.items() if not isinstance(v, Tensor | nn.Module)}]
        said += [(hook, len(hooks)) for hook, hooks in vars(module).items() if hook.endswith("hooks") and hooks]
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        said += [name, tensor.shape, tensor.dtype, tensor.device]
    return str(said)
