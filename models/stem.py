"""The first layers of networks made for images of 224 pixels: variants for small images, and the smallest image sizes."""

from __future__ import annotations

from typing import Literal

from torch import nn

Stem = Literal["auto", "small", "full"]
ImageShape = tuple[int, int, int]  # channels, height, width

SMALL_SIDE = 64  # pixels; a full stem leaves too few pixels of images with a smaller side
#: Smallest side of an image in pixels, with the small and with the full stem. The strides then leave one pixel; the vit has
#: 16 patches. mlp and cnn: with their default options.
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


def is_small(stem: Stem, shape: ImageShape) -> bool:
    """Return whether images of this shape get the stem for small images."""
    return stem == "small" or (stem == "auto" and min(shape[1:]) < SMALL_SIDE)


def refuse_smaller(name: str, shape: ImageShape, *, small: bool = True) -> None:
    """Raise ValueError for images that are too small for the model with this stem."""
    _, height, width = shape
    side = SMALLEST[name][0 if small else 1]
    if min(height, width) < side:
        raise ValueError(
            f"{name} needs images of at least {side}x{side} pixels here, but these have {height}x{width}; resize them, or "
            "take a model for smaller images, such as wide_resnet or cnn"
        )


def convolution(like: nn.Conv2d, channels: int, *, kernel: int = 0, stride: int = 0) -> nn.Conv2d:
    """Return a first convolution like this one for another number of channels. Weights are drawn as in torchvision.

    Args:
        channels: channels of the images.
        kernel: kernel size, odd; 0 keeps that of `like`.
        stride: stride; 0 keeps that of `like`.
    """
    size, step = kernel or like.kernel_size[0], stride or like.stride[0]
    made = nn.Conv2d(channels, like.out_channels, size, step, size // 2, bias=like.bias is not None)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made
