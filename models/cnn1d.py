"""A convolutional network on series and texts: stages of convolution over time and pooling, then one linear layer."""

from __future__ import annotations

from typing import Annotated, Literal, Unpack

from annotated_types import Ge, Le
from torch import nn

from hpo.models import shapes
from hpo.models.activations import Activation
from hpo.models.blocks import Blocks, Depth, Layers, Rate, Widths
from hpo.models.dropout import Dropout
from hpo.models.norms import Norm
from hpo.models.shapes import Shape, TokenShape
from hpo.models.tokens import TokenEmbedding

Pooling = Literal["none", "mean", "max"]
POOLS: dict[Pooling, list[type[nn.Module]]] = {
    "none": [],
    "mean": [nn.AdaptiveAvgPool1d],
    "max": [nn.AdaptiveMaxPool1d],
}


def cnn1d(
    shape: Shape,
    outputs: int,
    *,
    channels: Widths = (32, 64),
    kernel: Literal[1, 3, 5, 7, 9, 11, 15, 21, 31] = 5,
    depth: Depth | None = None,
    pooling: Pooling = "mean",
    embedding_size: Annotated[int, Ge(1), Le(4096)] = 64,
    dropout: Rate = 0.0,
    block_dropout: Rate | None = None,
    norm: Norm = "batch",
    activation: Activation = "relu",
    **layers: Unpack[Layers],
) -> nn.Module:
    """Build a convolutional network for series or texts.

    Each entry of `channels` makes one stage. A stage is `depth` blocks of convolution over time, norm, activation and
    dropout, followed by a max pooling of two steps. After the stages come a pooling over all steps, dropout and a
    linear layer. Each stage halves the number of steps, rounded down. The padding of a text is read as steps. ValueError if no
    step is left.

    Args:
        channels: output channels of each stage.
        kernel: steps of each convolution.
        depth: blocks per stage (default 1).
        pooling: over all steps that are left. none: the linear layer gets each step, so the place counts.
        embedding_size: features per word of a text.
        dropout: dropout probability before the last linear layer.
        block_dropout: dropout probability after each activation.
    """
    shapes.expect("cnn1d", shape)
    fan_in, steps, first = _first(shape, embedding_size)
    stages = steps.bit_length() - 1
    if len(channels) > stages:
        raise ValueError(
            f"channels = {list(channels)} halves {steps} steps {len(channels)} times, which leaves no step; give at most "
            f"{stages} entries"
        )
    times = depth or 1
    blocks = Blocks(
        norm=norm, activation=activation, dropout=block_dropout, options=layers, depth=len(channels) * times
    )
    body: list[nn.Module] = [*first, *blocks.at_input]
    for stage, fan_out in enumerate(channels):
        for index in range(stage * times, (stage + 1) * times):
            body += blocks.convolution1d(index, fan_in, fan_out, kernel)
            fan_in = fan_out
        body.append(nn.MaxPool1d(2))
        steps //= 2
    body += [pool(1) for pool in POOLS[pooling]]
    head = nn.Linear(fan_in * (steps if pooling == "none" else 1), outputs)
    return blocks.finished([*body, nn.Flatten(), Dropout(dropout), head], "cnn1d")


def _first(shape: Shape, size: int) -> tuple[int, int, list[nn.Module]]:
    """Return the channels and steps of the series, and the layer that makes it of a text."""
    if isinstance(shape, TokenShape):
        return size, shape.length, [TokenEmbedding(shape.vocabulary, size)]
    assert isinstance(shape, tuple)
    channels, steps = shape
    return channels, steps, []
