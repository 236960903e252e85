"""Augmented images against every variation that there is, by brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snows_hf.augment import REACH, augmented
from snows_hf.distributed import Share


def variations(image: Tensor, most: int) -> list[Tensor]:
    h, w = image.shape[1:]
    found = []
    for version in (image, image.flip(2)):
        padded = F.pad(version[None], (most,) * 4, mode="reflect")[0]
        found += [padded[:, i : i + h, j : j + w] for i in range(2 * most + 1) for j in range(2 * most + 1)]
    return found


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (5, 5)])
def test_each_image_is_one_of_its_own_variations(size):
    images = torch.rand(40, 3, *size, generator=torch.Generator().manual_seed(0))
    results = augmented(images, seed=3)
    most = min(size) // REACH
    chosen = []
    for image, result in zip(images, results, strict=True):
        chosen.append([i for i, v in enumerate(variations(image, most)) if torch.equal(v, result)])
    assert all(len(found) == 1 for found in chosen)
    assert len({found[0] for found in chosen}) > min(most * 10, 1)  # not the same for all


def test_the_seed_decides():
    images = torch.rand(20, 3, 16, 16)
    assert torch.equal(augmented(images, 1), augmented(images, 1))
    assert not torch.equal(augmented(images, 1), augmented(images, 2))


def test_a_share_of_a_batch_comes_out_as_it_does_among_all():
    images = torch.rand(9, 3, 16, 16)
    expected = augmented(images, 5)
    parts = [augmented(images[a:b], 5, Share(9, a, b)) for a, b in ((0, 3), (3, 4), (4, 9))]
    assert torch.equal(torch.cat(parts), expected)
