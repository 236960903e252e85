"""Variations of images that a network should take as it takes the images: mirrored and shifted."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.distributed import Share, whole


def augmented(images: Tensor, seed: int, share: Share | None = None, crop: float = 0.125, flip: bool = True) -> Tensor:
    """Images (n, c, h, w), half of them mirrored left to right with ``flip``, and all shifted along both axes; their
    borders are reflected.

    ``crop`` is the most that they shift, as a share of the shorter side: 4 pixels of 32, as usual for CIFAR (He et
    al., 2015, section 4.2). ``share`` says which of a batch these are; each comes out as it would among all of them.
    """
    share = share or whole(len(images))
    generator = torch.Generator().manual_seed(seed)
    h, w = images.shape[2:]
    most = int(crop * min(h, w))
    mirrored = (torch.rand(share.total, generator=generator) < 0.5 * flip)[share.start : share.stop]
    offsets = torch.randint(2 * most + 1, (share.total, 2), generator=generator)[share.start : share.stop].tolist()
    images = torch.where(mirrored[:, None, None, None].to(images.device), images.flip(3), images)
    padded = F.pad(images, (most,) * 4, mode="reflect")
    shifted = [image[:, i : i + h, j : j + w] for image, (i, j) in zip(padded, offsets, strict=True)]
    return torch.stack(shifted).contiguous(memory_format=torch.channels_last)


def views(images: Tensor, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Images (n, c, h, w), as many times as there are seeds: as they are, mirrored, and then :func:`augmented`."""
    for number, seed in enumerate(seeds):
        if number == 0:
            yield images
        elif number == 1:
            yield images.flip(3).contiguous(memory_format=torch.channels_last)
        else:
            yield augmented(images, seed)
