"""Random erasing (Zhong et al. 2017): hides a box of an image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpo.data.augment.random import Random, Size, spread
from hpo.data.augment.strength import Strength

SMALLEST = 0.02  # smallest box, as a share of the image's area: torchvision's
RATIO = 3.3  # largest ratio of the sides of a box, either way: torchvision's


def draw_boxes(strength: Strength, count: int, size: Size, random: Random) -> Tensor:
    """Return the box of each image as top, bottom, left, right [count, 4]. An empty box hides nothing.

    The share of the area is uniform from 0.02 to `erasing_area`. The ratio of the sides is log-uniform from 1 / 3.3 to
    3.3. The place is uniform. A side longer than the image is cut, where Zhong et al. draw again.
    """
    height, width = size
    drawn = torch.rand((count, 5), generator=random("augment erasing")).double()
    area = (SMALLEST + (strength.erasing_area - SMALLEST) * drawn[:, 1]) * height * width
    root = torch.exp(spread(drawn[:, 2], math.log(RATIO)) / 2)
    tall, wide = (area.sqrt() * root).round().clamp(max=height), (area.sqrt() / root).round().clamp(max=width)
    tall = torch.where(drawn[:, 0] < strength.erasing, tall, 0.0)
    top, left = (drawn[:, 3] * (height - tall + 1)).floor(), (drawn[:, 4] * (width - wide + 1)).floor()
    return torch.stack([top, top + tall, left, left + wide], 1).float()


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Return normalised images [N, C, H, W] with 0, their mean, inside their boxes [N, 4]."""
    return images.masked_fill(within(boxes, images.shape[2], images.shape[3]).unsqueeze(1), 0.0)


def within(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return a bool mask [N, H, W] of the pixels inside the boxes [N, 4], given as top, bottom, left, right."""
    top, bottom, left, right = boxes[:, :, None, None].unbind(1)
    y, x = torch.arange(height, device=boxes.device)[:, None], torch.arange(width, device=boxes.device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
