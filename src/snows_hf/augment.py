"""Variations of calibration images that a network should take as it takes the images: mirrored and shifted."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import Share, whole


REACH = 8
"""An image shifts by at most its side over this."""


def augmented(images: Tensor, seed: int, share: Share | None = None) -> Tensor:
    """Each image (n, c, h, w) mirrored left to right or not, and shifted along both axes; its border is reflected.

    ``share``: which images of a batch these are; each comes out as it would among all of them.
    """
    share = share or whole(len(images))
    generator = torch.Generator().manual_seed(seed)
    h, w = images.shape[2:]
    most = min(h, w) // REACH
    mirrored = (torch.rand(share.total, generator=generator) < 0.5)[share.start : share.stop]
    offsets = torch.randint(2 * most + 1, (share.total, 2), generator=generator)[share.start : share.stop].tolist()
    images = torch.where(mirrored[:, None, None, None].to(images.device), images.flip(3), images)
    padded = F.pad(images, (most,) * 4, mode="reflect")
    shifted = [image[:, i : i + h, j : j + w] for image, (i, j) in zip(padded, offsets, strict=True)]
    return torch.stack(shifted).contiguous(memory_format=torch.channels_last)
