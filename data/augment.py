"""Augmentation of whole batches on the device, with draws of its own for every image.

(torchvision's v2 transforms, given a batch, draw once for all of it.) Draws and strengths come as tensors, one row for each
image, so one call augments the batches of many trials, each as strongly as that trial wants, and no image's result depends
on what else is in the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 3  # uniform numbers an image: down, across, flip


@dataclass(frozen=True, kw_only=True)
class Strength:
    """How strongly images are augmented."""

    crop: int = 0  # pixels that an image may be moved by, each way; what comes in is the training part's mean
    horizontal_flip: float = 0.0  # probability

    @property
    def is_idle(self) -> bool:
        """Whether images come out as they are."""
        return not (self.crop or self.horizontal_flip)


def draws(count: int, generator: torch.Generator) -> Tensor:
    """Return uniform numbers in [0, 1) for so many images [count, DRAWS], from a generator of the CPU: they are the same
    on every device.
    """
    return torch.rand((count, DRAWS), generator=generator)


def augment(images: Tensor, drawn: Tensor, crop: Tensor, flip: Tensor) -> Tensor:
    """Return images moved and mirrored.

    Args:
        images: normalised floats [N, C, H, W].
        drawn: uniform numbers [N, DRAWS].
        crop: the largest move of each image in pixels [N].
        flip: the probability of mirroring each image [N].
    """
    height, width = images.shape[2:]
    most = (2 * crop)[:, None]
    moved = (drawn[:, :2] * (most + 1)).floor().minimum(most) - crop[:, None]  # the product may round up to its bound
    down, across = moved.long().unbind(1)
    mirrored = drawn[:, 2] < flip
    rows = torch.arange(height, device=images.device) + down[:, None]  # [N, H], of the source
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + across[:, None]  # [N, W]
    inside = (_within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]).unsqueeze(1)
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]  # [N, H, W]
    taken = images.flatten(2).gather(2, source.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1))
    return torch.where(inside, taken.view_as(images), 0.0)


def _within(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)
