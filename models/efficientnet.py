"""torchvision's EfficientNet-B0 (Tan & Le 2019): 4 million parameters at 10 classes."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from hpo.models import shapes
from hpo.models.blocks import Rate
from hpo.models.depth import StochasticDepth
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape
from hpo.models.stem import Stem, convolution, is_small, refuse_smaller


def efficientnet_b0(
    shape: Shape,
    outputs: int,
    *,
    stem: Stem = "auto",
    dropout: Rate = 0.2,
    stochastic_depth: Rate = 0.2,
    **options: Unpack[Options],
) -> nn.Module:
    """Build an EfficientNet-B0.

    Images need at least 16 pixels on a side, 32 with a full stem; ValueError if they have less.

    Args:
        stem: `small`: first convolution with stride 1. `full`: stride 2, as in torchvision. `auto`: small if a side has
            less than 64 pixels.
        dropout: dropout probability before the last layer.
        stochastic_depth: probability of skipping a block for an image. It grows linearly from 0 at the first of n
            blocks to (n - 1) / n of this value at the last, as in torchvision.
    """
    from torchvision import models, ops  # here, since it takes a second, which other models do not need

    image = shapes.image("efficientnet_b0", shape)
    small = is_small(stem, image)
    refuse_smaller("efficientnet_b0", image, small=small)
    model = models.efficientnet_b0(
        weights=None, num_classes=outputs, dropout=dropout, stochastic_depth_prob=stochastic_depth
    )
    model.features[0][0] = convolution(model.features[0][0], image[0], stride=1 if small else 0)
    for block in model.modules():
        if isinstance(getattr(block, "stochastic_depth", None), ops.StochasticDepth):
            block.stochastic_depth = StochasticDepth(block.stochastic_depth.p)  # draws from the run's generator
    return prepared(model, "efficientnet_b0", options)
