"""The multilayer perceptron: flat pixels through dense layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from torch import nn

from models.dropout import Dropout

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def mlp(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: Sequence[Annotated[int, Gt(0)]] = (64, 32),
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    norm: Literal["none", "batch"] = "batch",
    activation: Literal["relu", "gelu", "silu"] = "relu",
) -> nn.Module:
    """Build linear, norm, activation, dropout for each width, then the linear layer to the logits [B,
    num_classes].

    A layer in front of a batch norm has no bias: the norm subtracts it again, its gradient is rounding noise,
    and Adam would blow that noise up to steps of the size of the learning rate (Ioffe & Szegedy 2015, section
    3.2).
    """
    layers: list[nn.Module] = [nn.Flatten()]
    fan_in = math.prod(input_shape)
    for width in widths:
        layers.append(nn.Linear(fan_in, width, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm1d(width))
        layers += [ACTIVATIONS[activation](), Dropout(dropout)]
        fan_in = width
    layers.append(nn.Linear(fan_in, num_classes))
    return nn.Sequential(*layers)
