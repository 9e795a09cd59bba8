"""A model and a data source of one's own.

What follows the arguments that hpo gives (for a model: the images' shape and the number of classes) are options: a study
file sets or searches them, and hpo checks them against the annotations.
"""

import torch
from torch import Tensor, nn

from hpo.data import Source


def blobs(*, images: int = 600, noise: float = 60.0) -> Source:
    """Four classes of 1x8x8 images: a bright quarter each, under noise. Any uint8 images [N, C, H, W] will do."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 4
    pixels = 100 + noise * torch.randn(images, 1, 8, 8, generator=generator)
    for label in range(4):
        row, column = 4 * (label // 2), 4 * (label % 2)
        pixels[labels == label, :, row : row + 4, column : column + 4] += 50
    return Source(inputs=pixels.clamp(0, 255).to(torch.uint8), targets=labels, num_classes=4)


class TwoPaths(nn.Module):
    """A hidden layer and, if asked for, a straight path beside it."""

    def __init__(self, inputs: int, num_classes: int, width: int, shortcut: bool) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, num_classes))
        self.straight = nn.Linear(inputs, num_classes) if shortcut else None

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.hidden(flat) + (self.straight(flat) if self.straight else 0)


def two_paths(
    input_shape: tuple[int, int, int], num_classes: int, *, width: int = 32, shortcut: bool = True
) -> nn.Module:
    """Build the model for images of this shape."""
    channels, height, width_of_image = input_shape
    return TwoPaths(channels * height * width_of_image, num_classes, width, shortcut)
