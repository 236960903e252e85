"""Variations of calibration images that a network should take as it takes the images: mirrored and shifted."""

import torch
import torch.nn.functional as F
from torch import Tensor


REACH = 8
"""An image shifts by at most its side over this."""


def augmented(images: Tensor, seed: int) -> Tensor:
    """Each image (n, c, h, w) mirrored left to right or not, and shifted along both axes; its border is reflected."""
    generator = torch.Generator().manual_seed(seed)
    n, _, h, w = images.shape
    mirrored = torch.rand(n, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None].to(images.device), images.flip(3), images)
    most = max(min(h, w) // REACH, 0)
    padded = F.pad(images, (most,) * 4, mode="reflect")
    offsets = torch.randint(2 * most + 1, (n, 2), generator=generator).tolist()
    shifted = [image[:, i : i + h, j : j + w] for image, (i, j) in zip(padded, offsets, strict=True)]
    return torch.stack(shifted).contiguous(memory_format=torch.channels_last)
