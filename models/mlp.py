"""Multilayer perceptron on tables, features, flattened series and flattened images."""

from __future__ import annotations

import math
from typing import Unpack

from torch import nn

from hpo.models import shapes, tables
from hpo.models.activations import Activation
from hpo.models.blocks import Blocks, Depth, Layers, Rate, Widths
from hpo.models.norms import Norm
from hpo.models.shapes import Shape, TableShape
from hpo.models.tables import TableOptions


class Options(Layers, TableOptions, total=False):
    """The options without a default of their own."""


def mlp(
    shape: Shape,
    outputs: int,
    *,
    widths: Widths = (64, 32),
    depth: Depth | None = None,
    dropout: Rate = 0.0,
    norm: Norm = "batch",
    activation: Activation = "relu",
    **options: Unpack[Options],
) -> nn.Module:
    """Build a multilayer perceptron for tables, features, series or images.

    Each width makes `depth` blocks of linear layer, norm, activation and dropout. A linear layer to the outputs
    [B, outputs] follows. Series and images are flattened. The categories of a table are embedded, its numbers if
    `embedding` says so.

    Args:
        widths: output features of each block.
        depth: blocks per width (default 1).
        dropout: dropout probability after each activation.
    """
    shapes.expect("mlp", shape)
    first, fan_in = _first(shape, options)
    sizes = [width for width in widths for _ in range(depth or 1)]
    blocks = Blocks(norm=norm, activation=activation, dropout=dropout, options=options, depth=len(sizes))
    body: list[nn.Module] = [first, *blocks.at_input]
    for index, width in enumerate(sizes):
        body += blocks.dense(index, fan_in, width)
        fan_in = width
    return blocks.finished([*body, nn.Linear(fan_in, outputs)], "mlp")


def _first(shape: Shape, options: Options) -> tuple[nn.Module, int]:
    """Return the layer that makes features of an input, and their number."""
    if isinstance(shape, TableShape):
        return tables.TableFeatures(shape, options), tables.width_of(shape, options)
    assert isinstance(shape, tuple)
    kind = options.get("embedding", "none")
    if kind != "none" and len(shape) > 1:
        raise ValueError(
            f'embedding = "{kind}": embeds the numbers of tables and features, but the inputs are '
            f'{shapes.described(shape)}; leave it out, or write "none"'
        )
    embedding = tables.number_embedding(math.prod(shape), options)
    if embedding is None:
        return nn.Flatten(), math.prod(shape)
    return embedding, tables.width_of(TableShape(numbers=shape[0]), options)
