"""Multilayer perceptron on flattened images."""

from __future__ import annotations

import math
from typing import Unpack

from torch import nn

from hpo.models.activations import Activation
from hpo.models.blocks import Blocks, Depth, Layers, Rate, Widths
from hpo.models.norms import Norm


def mlp(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: Widths = (64, 32),
    depth: Depth | None = None,
    dropout: Rate = 0.0,
    norm: Norm = "batch",
    activation: Activation = "relu",
    **layers: Unpack[Layers],
) -> nn.Module:
    """Build a multilayer perceptron.

    Each width makes `depth` blocks of linear layer, norm, activation and dropout. A linear layer to the logits
    [B, num_classes] follows.

    Args:
        widths: output features of each block.
        depth: blocks per width (default 1).
        dropout: dropout probability after each activation.
    """
    sizes = [width for width in widths for _ in range(depth or 1)]
    blocks = Blocks(norm=norm, activation=activation, dropout=dropout, options=layers, depth=len(sizes))
    body: list[nn.Module] = [nn.Flatten(), *blocks.at_input]
    fan_in = math.prod(input_shape)
    for index, width in enumerate(sizes):
        body += blocks.dense(index, fan_in, width)
        fan_in = width
    return blocks.finished([*body, nn.Linear(fan_in, num_classes)], "mlp")
