"""Augmented images against every variation that there is, by brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snows_hf.method.augment import augmented, views
from snows_hf.runtime.distributed import Share


def variations(image: Tensor, most: int) -> list[Tensor]:
    h, w = image.shape[1:]
    found = []
    for version in (image, image.flip(2)):
        padded = F.pad(version[None], (most,) * 4, mode="reflect")[0]
        found += [padded[:, i : i + h, j : j + w] for i in range(2 * most + 1) for j in range(2 * most + 1)]
    return found


@pytest.mark.parametrize("size, crop, most", [((8, 8), 0.125, 1), ((16, 24), 0.25, 4), ((5, 5), 0.125, 0)])
def test_each_image_is_one_of_its_own_variations(size, crop, most):
    images = torch.rand(40, 3, *size, generator=torch.Generator().manual_seed(0))
    results = augmented(images, seed=3, crop=crop)
    chosen = []
    for image, result in zip(images, results, strict=True):
        chosen.append([i for i, v in enumerate(variations(image, most)) if torch.equal(v, result)])
    assert all(len(found) == 1 for found in chosen)
    assert len({found[0] for found in chosen}) > min(most * 10, 1)  # not the same for all


def test_nothing_is_mirrored_or_shifted_where_none_is_wanted():
    images = torch.rand(20, 3, 16, 16)
    assert torch.equal(augmented(images, 1, crop=0.0, flip=False), images)
    shifted = augmented(images, 1, flip=False)
    chosen = [i for x, y in zip(images, shifted, strict=True) for i, v in enumerate(variations(x, 2)) if v.equal(y)]
    assert len(chosen) == 20 and max(chosen) < 25  # the first 25 are those of the image as it is


def test_the_seed_decides():
    images = torch.rand(20, 3, 16, 16)
    assert torch.equal(augmented(images, 1), augmented(images, 1))
    assert not torch.equal(augmented(images, 1), augmented(images, 2))


def test_a_share_of_a_batch_comes_out_as_it_does_among_all():
    images = torch.rand(9, 3, 16, 16)
    expected = augmented(images, 5)
    parts = [augmented(images[a:b], 5, Share(9, a, b)) for a, b in ((0, 3), (3, 4), (4, 9))]
    assert torch.equal(torch.cat(parts), expected)


def test_views_are_the_images_their_mirror_images_and_then_augmented_ones():
    images = torch.rand(8, 3, 16, 16)
    seen = list(views(images, range(5, 9)))
    expected = [images, images.flip(3), augmented(images, 7), augmented(images, 8)]
    assert all(torch.equal(view, own) for view, own in zip(seen, expected, strict=True))
    assert len(list(views(images, range(1)))) == 1
