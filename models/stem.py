"""Where images enter a network that was made for 224 pixels: its first convolution, and how small an image may be."""

from __future__ import annotations

from typing import Literal

from torch import nn

Stem = Literal["auto", "small", "full"]
Shape = tuple[int, int, int]  # channels, height, width

SMALL_SIDE = 64  # pixels; of images that are smaller on a side a full stem leaves too little
#: Pixels on a side that an image needs at least, with the stem for small images and with the full one: what the strides
#: halve to one pixel; 16 patches of the vit. Of mlp and cnn with their default options.
SMALLEST: dict[str, tuple[int, int]] = {
    "mlp": (1, 1),
    "cnn": (4, 4),
    "vgg11": (32, 32),
    "vgg13": (32, 32),
    "vgg16": (32, 32),
    "vgg19": (32, 32),
    "resnet18": (8, 32),
    "resnet34": (8, 32),
    "resnet50": (8, 32),
    "wide_resnet": (4, 4),
    "mobilenet_v3": (16, 32),
    "efficientnet_b0": (16, 32),
    "vit_b_16": (16, 64),
}


def is_small(stem: Stem, shape: Shape) -> bool:
    """Return whether the stem is to be the one for small images."""
    return stem == "small" or (stem == "auto" and min(shape[1:]) < SMALL_SIDE)


def refuse_smaller(name: str, shape: Shape, *, small: bool = True) -> None:
    """Raise ValueError for images that are too small for a model with such a stem."""
    _, height, width = shape
    side = SMALLEST[name][0 if small else 1]
    if min(height, width) < side:
        raise ValueError(
            f"{name} needs images of at least {side}x{side} pixels here, these have {height}x{width}; resize the images, or "
            "take a model for smaller ones, such as wide_resnet or cnn"
        )


def convolution(like: nn.Conv2d, channels: int, *, kernel: int = 0, stride: int = 0) -> nn.Conv2d:
    """Return a first convolution like this one for images of so many channels, drawn as torchvision draws it.

    Args:
        kernel: size of the kernel, odd, if it is to be another.
        stride: likewise.
    """
    size, step = kernel or like.kernel_size[0], stride or like.stride[0]
    made = nn.Conv2d(channels, like.out_channels, size, step, size // 2, bias=like.bias is not None)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made
