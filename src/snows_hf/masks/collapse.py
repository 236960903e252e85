"""Layer collapse: masks through which a layer can no longer be reached, and with it perhaps the whole network."""

import torch
from torch import Tensor

from ..adapters import Chain, frozen
from ..patterns import Masks
from .scores.synflow import positive


EMPTY = "no weight is left"
CUT = "weights are left, but no path from the images to the logits leads through them"


def find_collapse(chain: Chain, masks: Masks, images: Tensor) -> tuple[dict[str, str], bool]:
    """Parameters that the masks have cut off, each with the reason, and whether the logits still depend on the images.

    A weight lies on a path if it has a gradient in the network of absolute weights without shifts (SynFlow's), on an
    input that is positive everywhere: there nothing cancels and every ReLU is open. In float64. ``images`` is one,
    (1, 3, h, w), for its shape.
    """
    other = positive(chain)
    for name, parameter in other.model.named_parameters():
        if parameter.ndim == 1 and not name.endswith("bias") and not parameter.any():
            parameter.data.fill_(1.0)  # norms that begin at zero, as a residual branch's last may: a start, no cut
    generator = torch.Generator().manual_seed(0)
    x = (0.5 + torch.rand(images.shape, generator=generator, dtype=torch.float64)).to(images.device).requires_grad_()
    weights = {
        name: (other.weight(name).detach() * mask.to(images.device)).requires_grad_() for name, mask in masks.items()
    }
    with frozen(other.model):
        logits = other.outputs((x,), 0, len(other.operations), dict(weights))[-1]
    gradients = torch.autograd.grad(logits.sum(), [x, *weights.values()], allow_unused=True)
    cut = {}
    for (name, mask), gradient in zip(masks.items(), gradients[1:], strict=True):
        if not mask.any():
            cut[name] = EMPTY
        elif gradient is None or not (gradient * mask.to(gradient.device)).any():
            cut[name] = CUT
    return cut, gradients[0] is not None and bool(gradients[0].any())
