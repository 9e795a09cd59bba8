"""The plain convolutional network: stages of convolution and pooling, one linear layer on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from torch import nn

from models.dropout import Dropout
from models.mlp import ACTIVATIONS


def cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    channels: Sequence[Annotated[int, Gt(0)]] = (16, 32),
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    norm: Literal["none", "batch"] = "batch",
    activation: Literal["relu", "gelu", "silu"] = "relu",
) -> nn.Module:
    """Build conv3x3, norm, activation, maxpool2 for each entry of `channels`, then dropout and a linear
    layer.

    Each stage halves height and width, rounded down; ValueError if nothing is left. A convolution in front of
    a batch norm has no bias, for the reason given in `models.mlp`.
    """
    fan_in, height, width = input_shape
    stages = min(height, width).bit_length() - 1
    if len(channels) > stages:
        raise ValueError(
            f"channels = {list(channels)} halves an image of {height}x{width} pixels {len(channels)} times, "
            f"which leaves nothing of it; give at most {stages} entries"
        )
    layers: list[nn.Module] = []
    for fan_out in channels:
        layers.append(nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(fan_out))
        layers += [ACTIVATIONS[activation](), nn.MaxPool2d(2)]
        fan_in, height, width = fan_out, height // 2, width // 2
    layers += [nn.Flatten(), Dropout(dropout), nn.Linear(fan_in * height * width, num_classes)]
    return nn.Sequential(*layers)
