"""Wide residual networks WRN-depth-width (Zagoruyko & Komodakis 2016), made for small images.

At 10 classes WRN-16-4 has 2.7 million parameters, WRN-28-10 has 36.5 million.
"""

from __future__ import annotations

from typing import Annotated, Literal, Unpack

from annotated_types import Ge, Le
from torch import Tensor, nn

from hpo.models import shapes
from hpo.models.blocks import Rate
from hpo.models.depth import StochasticDepth, rates
from hpo.models.dropout import Dropout
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape
from hpo.models.stem import refuse_smaller

CHANNELS = (16, 32, 64)  # of the three groups; they are multiplied by the width


class Block(nn.Module):
    """Pre-activation residual block (He et al. 2016b): twice norm, ReLU and 3x3 convolution, beside a shortcut.

    Dropout comes before the second convolution.
    """

    def __init__(self, inputs: int, channels: int, stride: int, dropout: float, rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        self.depth = StochasticDepth(rate)
        self.shortcut = nn.Conv2d(inputs, channels, 1, stride, bias=False) if inputs != channels or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, channels, H / stride, W / stride]."""
        y = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.dropout(self.relu(self.bn2(self.conv1(y)))))
        joined: Tensor = shortcut + self.depth(y)
        return joined


def wide_resnet(
    shape: Shape,
    outputs: int,
    *,
    depth: Literal[10, 16, 22, 28, 34, 40] = 16,
    width: Annotated[int, Ge(1), Le(1000)] = 4,
    dropout: Rate = 0.0,
    stochastic_depth: Rate = 0.0,
    **options: Unpack[Options],
) -> nn.Module:
    """Build a WRN-depth-width.

    It is a 3x3 convolution, three groups of (depth - 4) / 6 blocks, norm, ReLU, mean over all pixels and a linear
    layer. Images need at least 4 pixels on a side; ValueError if they have less.

    Args:
        depth: number of convolutions, as the paper counts them.
        width: factor on the channels of all blocks.
        dropout: dropout probability between the two convolutions of a block.
        stochastic_depth: probability of skipping the last block for an image. It grows linearly from the first block on
            (Huang et al. 2016).
    """
    image = shapes.image("wide_resnet", shape)
    refuse_smaller("wide_resnet", image)
    count = (depth - 4) // 6
    left = iter(rates(stochastic_depth, 3 * count))
    inputs = CHANNELS[0]
    layers: list[nn.Module] = [nn.Conv2d(image[0], inputs, 3, 1, 1, bias=False)]
    for group, channels in enumerate(CHANNELS):
        for index in range(count):
            stride = 2 if group > 0 and index == 0 else 1
            layers.append(Block(inputs, channels * width, stride, dropout, next(left)))
            inputs = channels * width
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, outputs)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return prepared(model, "", options)
