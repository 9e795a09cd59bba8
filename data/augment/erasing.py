"""Random erasing (Zhong et al. 2017): a box of an image is hidden."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpo.data.augment.random import Random, Size, spread
from hpo.data.augment.strength import Strength

SMALLEST = 0.02  # share of the area
RATIO = 3.3  # of the sides of a box, either way: torchvision's


def draw_boxes(strength: Strength, count: int, size: Size, random: Random) -> Tensor:
    """Return the box of each image as top, bottom, left, right [count, 4]; an empty one hides nothing.

    Its share of the area is uniform from 0.02 to `erasing_area`, the ratio of its sides log-uniform from 1 / 3.3 to 3.3, its
    place uniform. A side that would be longer than the image is cut (Zhong et al. draw again).
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
    """Return images [N, C, H, W] with 0, which is the mean once normalised, in their boxes [N, 4]."""
    return images.masked_fill(within(boxes, images.shape[2], images.shape[3]).unsqueeze(1), 0.0)


def within(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels [N, H, W] lie in the boxes [N, 4], given as top, bottom, left, right."""
    top, bottom, left, right = boxes[:, :, None, None].unbind(1)
    y, x = torch.arange(height, device=boxes.device)[:, None], torch.arange(width, device=boxes.device)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)
