"""Crops, flips and scaling of a whole batch at once, from one random number per image.

Promise: what an image becomes depends on that image and its own number alone: batch size, worker
         processes and the other images have no say. Every crop and flip is equally likely.
Source:  He et al. 2016 (arXiv:1512.03385, section 4.2): 4 pixels are padded on each side, a crop of
         the original size is sampled from the padded image or its horizontal flip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 2**62  # numbers are drawn below this; beside it, the 162 outcomes of `crop_flip` are even


def crop_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """A crop of every image after padding it with zeros, or the mirror image of that crop.

    images [N, C, H, W] of any dtype; draws [N] int64, at least 0; like images. With s = 2 * padding
    + 1, `draws % s` is the first row of the crop, `draws // s % s` its first column, and
    `draws // s**2 % 2` says whether left and right change places.
    """
    n, channels, height, width = images.shape
    side = 2 * padding + 1
    top, left, flip = draws % side, draws // side % side, (draws // side**2 % 2).bool()
    padded = F.pad(images, (padding,) * 4)
    # Whole rows first, then pixels: twice as fast as indexing by row and column at once.
    planes = torch.arange(n * channels).view(n, channels, 1) * (height + 2 * padding)
    rows = planes + top[:, None, None] + torch.arange(height)
    cut = padded.view(-1, width + 2 * padding).index_select(0, rows.flatten())
    place = torch.arange(width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - place, place)
    columns = columns[:, None, None, :].expand(n, channels, height, width)
    return cut.view(n, channels, height, -1).gather(3, columns)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std: uint8 [N, C, H, W] -> float32 [N, C, H, W].

    mean and std have one number per channel, for pixels scaled to 0..1.
    """
    centre, spread = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
    return images.float().div_(255).sub_(centre).div_(spread)
