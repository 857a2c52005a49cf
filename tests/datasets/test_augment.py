"""Augmentation: every outcome is a crop of the padded image, possibly flipped, and all occur."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxprune.datasets.augment import DRAWS, crop_flip, normalize


def distinct(n, channels, height, width):
    """Images of which no two pixels agree, and none is 0, the colour of the padding."""
    count = n * channels * height * width
    return torch.arange(1, count + 1).view(n, channels, height, width)


def outcomes(image, padding):
    """All crops of the padded image [C, H, W] and their mirror images, by plain slicing."""
    _, height, width = image.shape
    padded = F.pad(image, (padding,) * 4)
    for flip in (False, True):
        for left in range(2 * padding + 1):
            for top in range(2 * padding + 1):
                crop = padded[:, top : top + height, left : left + width]
                yield crop.flip(2) if flip else crop


@pytest.mark.parametrize(("padding", "size"), [(4, (8, 8)), (1, (3, 5)), (0, (2, 3)), (2, (1, 1))])
def test_the_draws_number_the_outcomes(padding, size):
    image = distinct(1, 3, *size)[0]
    expected = torch.stack(list(outcomes(image, padding)))
    draws = torch.arange(len(expected))
    many = image.expand(len(draws), *image.shape)
    torch.testing.assert_close(crop_flip(many, draws, padding), expected, rtol=0, atol=0)
    again = draws + len(expected) * torch.arange(len(expected))  # and go round
    torch.testing.assert_close(crop_flip(many, again, padding), expected, rtol=0, atol=0)


@given(
    draws=st.lists(st.integers(0, DRAWS - 1), min_size=1, max_size=5),
    channels=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    padding=st.integers(0, 4),
)
def test_an_image_depends_on_its_own_draw_alone(draws, channels, height, width, padding):
    images = distinct(len(draws), channels, height, width)
    numbers = torch.tensor(draws)
    together = crop_flip(images, numbers, padding)
    assert together.shape == images.shape
    for i, image in enumerate(images):
        alone = crop_flip(image[None], numbers[i : i + 1], padding)[0]
        assert torch.equal(alone, together[i])
        assert any(torch.equal(alone, outcome) for outcome in outcomes(image, padding))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_type_stays(dtype):
    out = crop_flip(torch.ones(2, 1, 4, 4, dtype=dtype), torch.tensor([0, 1]), 1)
    assert out.dtype == dtype


def test_every_outcome_is_as_likely():
    """16,200 draws over 162 outcomes: chi squared with 161 degrees, far below its 99.99 % point."""
    draws = torch.randint(DRAWS, (16_200,), generator=torch.Generator().manual_seed(0))
    counts = (draws % 162).bincount(minlength=162)
    assert ((counts - 100) ** 2 / 100).sum() < 235


def test_normalize_is_torchvisions():
    from torchvision.transforms import v2

    images = torch.randint(256, (3, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)
    before = images.clone()
    torch.testing.assert_close(normalize(images, mean, std), theirs, rtol=0, atol=1e-6)
    assert torch.equal(images, before)
