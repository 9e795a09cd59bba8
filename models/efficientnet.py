"""EfficientNet-B0 (Tan & Le 2019), torchvision's: 4 million parameters at 10 classes."""

from __future__ import annotations

from typing import Unpack

from torch import nn

from hpo.models.blocks import Rate
from hpo.models.depth import StochasticDepth
from hpo.models.preparing import Options, prepared
from hpo.models.stem import Stem, convolution, is_small, refuse_smaller


def efficientnet_b0(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    stem: Stem = "auto",
    dropout: Rate = 0.2,
    stochastic_depth: Rate = 0.2,
    **options: Unpack[Options],
) -> nn.Module:
    """Build the network, `dropout` in front of its last layer; stochastic_depth would be reached behind the last block.

    stem: small takes the first convolution with stride 1; full is torchvision's of stride 2; auto is small where a side has
    less than 64 pixels. Images have at least 16 pixels on a side, 32 with a full stem; ValueError if they have less.
    """
    from torchvision import models, ops  # here: it takes a second, which other models need not pay

    small = is_small(stem, input_shape)
    refuse_smaller("efficientnet_b0", input_shape, small=small)
    model = models.efficientnet_b0(
        weights=None, num_classes=num_classes, dropout=dropout, stochastic_depth_prob=stochastic_depth
    )
    model.features[0][0] = convolution(model.features[0][0], input_shape[0], stride=1 if small else 0)
    for block in model.modules():
        if isinstance(getattr(block, "stochastic_depth", None), ops.StochasticDepth):
            block.stochastic_depth = StochasticDepth(block.stochastic_depth.p)  # whose draws are the run's own
    return prepared(model, "efficientnet_b0", options)
