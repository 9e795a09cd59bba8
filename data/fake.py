"""Synthetic images of any number and shape, from which a model can learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from hpo.data.source import Source

CONTRAST = 48.0  # standard deviation of a class's picture before it is enlarged, in pixel values
COARSE = 4  # side of the grid on which a class's picture is drawn before it is enlarged


def fake(
    *,
    count: Annotated[int, Ge(2)] = 1000,
    test_count: Annotated[int, Ge(0)] = 0,
    num_classes: Annotated[int, Ge(2), Le(10_000)] = 10,
    shape: Sequence[Annotated[int, Ge(1)]] = (1, 8, 8),
    noise: Annotated[float, Ge(0)] = 1.0,
    seed: Annotated[int, Ge(0)] = 0,
) -> Source:
    """Return synthetic images: the picture of their class plus noise. Classes are equally frequent.

    Args:
        count: images before the split.
        test_count: images of a shipped test split; 0 for none.
        num_classes: number of classes.
        shape: [C, H, W] of an image.
        noise: standard deviation of the noise, relative to that of the coarse picture of a class.
        seed: seed of pictures and noise.
    """
    if len(shape) != 3:
        raise ValueError(f"shape = {list(shape)}: write [channels, height, width]")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((num_classes, shape[0], COARSE, COARSE), generator=generator)
    pictures = F.interpolate(coarse, size=tuple(shape[1:]), mode="bilinear", align_corners=False)
    images, labels = _drawn(pictures, count, noise, generator)
    test_images, test_labels = _drawn(pictures, test_count, noise, generator)
    return Source(
        inputs=images,
        targets=labels,
        num_classes=num_classes,
        test_inputs=test_images if test_count else None,
        test_targets=test_labels if test_count else None,
    )


def _drawn(pictures: Tensor, count: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % len(pictures)
    images = torch.empty((count, *pictures.shape[1:]), dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        noisy = pictures[label] + noise * torch.randn(pictures.shape[1:], generator=generator)
        images[row] = (128.0 + CONTRAST * noisy).clamp(0, 255).to(torch.uint8)
    return images, labels
