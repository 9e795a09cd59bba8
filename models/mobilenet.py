"""torchvision's MobileNetV3 (Howard et al. 2019): 1.5 (small) or 4.2 (large) million parameters at 10 classes."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import nn

from hpo.models import shapes
from hpo.models.blocks import Rate
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape
from hpo.models.stem import Stem, convolution, is_small, refuse_smaller


def mobilenet_v3(
    shape: Shape,
    outputs: int,
    *,
    size: Literal["small", "large"] = "small",
    stem: Stem = "auto",
    dropout: Rate = 0.2,
    **options: Unpack[Options],
) -> nn.Module:
    """Build a MobileNetV3.

    Images need at least 16 pixels on a side, 32 with a full stem; ValueError if they have less.

    Args:
        size: which of torchvision's two variants.
        stem: `small`: first convolution with stride 1. `full`: stride 2, as in torchvision. `auto`: small if a side has
            less than 64 pixels.
        dropout: dropout probability before the last layer.
    """
    from torchvision import models  # here, since it takes a second, which other models do not need

    image = shapes.image("mobilenet_v3", shape)
    small = is_small(stem, image)
    refuse_smaller("mobilenet_v3", image, small=small)
    name = f"mobilenet_v3_{size}"
    model = models.get_model(name, weights=None, num_classes=outputs, dropout=dropout)
    model.features[0][0] = convolution(model.features[0][0], image[0], stride=1 if small else 0)
    return prepared(model, name, options)
