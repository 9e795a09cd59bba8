"""A plain convolutional network: stages of convolution and pooling, then one linear layer."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from hpo.models import shapes
from hpo.models.activations import Activation
from hpo.models.blocks import Blocks, Depth, Layers, Rate, Widths
from hpo.models.dropout import Dropout
from hpo.models.norms import Norm
from hpo.models.shapes import Shape


def cnn(
    shape: Shape,
    outputs: int,
    *,
    channels: Widths = (16, 32),
    depth: Depth | None = None,
    dropout: Rate = 0.0,
    block_dropout: Rate | None = None,
    norm: Norm = "batch",
    activation: Activation = "relu",
    **layers: Unpack[Layers],
) -> nn.Module:
    """Build a plain convolutional network.

    Each entry of `channels` makes one stage. A stage is `depth` blocks of 3x3 convolution, norm, activation and
    dropout, followed by a 2x2 max pooling. After the stages come dropout and a linear layer. Each stage halves height
    and width, rounded down. ValueError if no pixel is left.

    Args:
        channels: output channels of each stage.
        depth: blocks per stage (default 1).
        dropout: dropout probability before the last linear layer.
        block_dropout: dropout probability after each activation.
    """
    fan_in, height, width = shapes.image("cnn", shape)
    stages = min(height, width).bit_length() - 1
    if len(channels) > stages:
        raise ValueError(
            f"channels = {list(channels)} halves an image of {height}x{width} pixels {len(channels)} times, "
            f"which leaves no pixel; give at most {stages} entries"
        )
    times = depth or 1
    blocks = Blocks(
        norm=norm, activation=activation, dropout=block_dropout, options=layers, depth=len(channels) * times
    )
    body: list[nn.Module] = blocks.at_input
    for stage, fan_out in enumerate(channels):
        for index in range(stage * times, (stage + 1) * times):
            body += blocks.convolution(index, fan_in, fan_out)
            fan_in = fan_out
        _pool(body)
        height, width = height // 2, width // 2
    head = nn.Linear(fan_in * height * width, outputs)
    return blocks.finished([*body, nn.Flatten(), Dropout(dropout), head], "cnn")


def _pool(body: list[nn.Module]) -> None:
    """Add a 2x2 max pooling to these layers, in front of a ReLU if that is the last of them.

    ReLU then does a quarter of the work. Outputs and gradients stay the same to the last bit. The largest of four
    values stays the largest, and if ReLU makes all four 0, none of them has a gradient.
    """
    place = len(body) - isinstance(body[-1], nn.ReLU)
    body.insert(place, nn.MaxPool2d(2))
