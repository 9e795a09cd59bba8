"""The plain convolutional network: stages of convolution and pooling, one linear layer on top."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from hpo.models.activations import Activation
from hpo.models.blocks import Blocks, Depth, Layers, Rate, Widths
from hpo.models.dropout import Dropout
from hpo.models.norms import Norm


def cnn(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    channels: Widths = (16, 32),
    depth: Depth | None = None,
    dropout: Rate = 0.0,
    block_dropout: Rate | None = None,
    norm: Norm = "batch",
    activation: Activation = "relu",
    **layers: Unpack[Layers],
) -> nn.Module:
    """Build a stage for each entry of `channels`: conv3x3, norm, activation, dropout (`block_dropout`), `depth` times over
    (once if not given), then maxpool2. Then `dropout` and a linear layer.

    Relu comes behind the pooling where nothing stands between them: the largest of four stays the largest, and a quarter of
    the work is left.

    Each stage halves height and width, rounded down; ValueError if nothing is left.
    """
    fan_in, height, width = input_shape
    stages = min(height, width).bit_length() - 1
    if len(channels) > stages:
        raise ValueError(
            f"channels = {list(channels)} halves an image of {height}x{width} pixels {len(channels)} times, "
            f"which leaves nothing of it; give at most {stages} entries"
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
    head = nn.Linear(fan_in * height * width, num_classes)
    return blocks.finished([*body, nn.Flatten(), Dropout(dropout), head], "cnn")


def _pool(body: list[nn.Module]) -> None:
    """Halve height and width behind these layers, before a relu that is the last of them: outputs and gradients are the same
    to the last bit, as of four values that relu makes 0 none has a gradient.
    """
    place = len(body) - isinstance(body[-1], nn.ReLU)
    body.insert(place, nn.MaxPool2d(2))
