"""2:4 layers on sparse tensor cores: which layers can run there, and putting them there."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from ..patterns import NM


MULTIPLE = 16
"""What both dimensions of a weight must divide by (cuSPARSELt, half precision)."""


@dataclass(frozen=True)
class Acceleration:
    """What became of a model's Linear layers: names of those that run on sparse tensor cores, and the others, each
    with the reason."""

    sparse: tuple[str, ...]
    dense: dict[str, str]


def accelerate(model: nn.Module) -> Acceleration:
    """Turns the valid 2:4 Linear layers of a model into torch's semi-structured tensors, in place.

    The model must be on a CUDA device and in float16 or bfloat16. Do it last: such a model can be neither saved nor
    trained. Layers that do not qualify stay as they are. Whether it is faster depends on the GPU, the widths and the
    batch: measure it (``snows-hf bench``).

    >>> model = AutoModelForImageClassification.from_pretrained("me/vit-2to4").half().cuda().eval()
    >>> snows_hf.accelerate(model).dense
    {'classifier': 'its weights are not 2:4'}
    """
    sparse: list[str] = []
    dense: dict[str, str] = {}
    for name, layer in linear_layers(model).items():
        reason = device_obstacle(layer.weight.device) or obstacle(layer.weight)
        try:
            if reason is None:
                layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
                sparse.append(name)
        except RuntimeError as error:  # a build of torch without the kernels, or with narrower ones
            reason = f"torch refuses it: {str(error).splitlines()[0]}"
        if reason is not None:
            dense[name] = reason
    return Acceleration(tuple(sparse), dense)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by name. Subclasses may use their weight in ways of their own (nn.MultiheadAttention does)."""
    return {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}


def obstacle(weight: Tensor) -> str | None:
    """Why a weight (out, in) cannot be a semi-structured tensor on any device, or None."""
    if isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
        return "it is one already"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"its type is {str(weight.dtype).removeprefix('torch.')}, and the kernels take float16 or bfloat16"
    if any(size % MULTIPLE for size in weight.shape):
        return f"its shape {tuple(weight.shape)} does not divide by {MULTIPLE}"
    if not NM(2, 4).holds(weight):
        return "its weights are not 2:4"
    if not weight.is_contiguous():
        return "its weights are not contiguous"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why a device has no 2:4 kernels, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"2:4 kernels need an NVIDIA GPU, and this is {'a CPU' if device.type == 'cpu' else device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"2:4 kernels need compute capability 8.0 (Ampere), and this GPU has {major}.{minor}"
    return None
