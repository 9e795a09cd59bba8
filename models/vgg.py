"""torchvision's VGG-11, -13, -16 and -19 (Simonyan & Zisserman 2015).

At 10 classes they have 9.2 to 20 million parameters with the small head, 129 to 140 million with the full head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, Unpack

from torch import nn

from hpo.models import shapes
from hpo.models.blocks import Rate
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape
from hpo.models.stem import Stem, convolution, is_small, refuse_smaller

CONFIGURATIONS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}  # names in the paper and in torchvision
FEATURES = 512  # output channels of the last convolution


def _family(name: str) -> Callable[..., nn.Module]:
    def build(
        shape: Shape,
        outputs: int,
        *,
        stem: Stem = "auto",
        norm: Literal["none", "batch"] = "batch",
        dropout: Rate = 0.5,
        **options: Unpack[Options],
    ) -> nn.Module:
        """Build a VGG.

        Images need at least 32 pixels on a side; ValueError if they have less.

        Args:
            stem: selects the head, the part of a VGG that is made for large images. `full`: torchvision's three linear
                layers on 7x7 pixels. `small`: mean over all pixels and one linear layer. `auto`: small if a side has
                less than 64 pixels.
            norm: with `batch` it is torchvision's `_bn` variant, and can load that variant's weights.
            dropout: dropout probability before each linear layer except the first of the full head.
        """
        from torchvision.models.vgg import VGG, cfgs, make_layers  # here, since it takes a second

        image = shapes.image(name, shape)
        refuse_smaller(name, image)
        features = make_layers(cfgs[CONFIGURATIONS[name]], batch_norm=norm == "batch")
        small = is_small(stem, image)
        model = _with_small_head(features, outputs, dropout) if small else VGG(features, outputs, dropout=dropout)
        features[0] = convolution(features[0], image[0])
        return prepared(model, f"{name}_bn" if norm == "batch" else name, options)

    build.__name__ = build.__qualname__ = name
    return build


def _with_small_head(features: nn.Sequential, outputs: int, dropout: float) -> nn.Module:
    for layer in features:
        if isinstance(layer, nn.Conv2d):  # as VGG draws them
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(FEATURES, outputs))
    parts = [
        ("features", features),
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("classifier", head),
    ]
    return nn.Sequential(OrderedDict(parts))


vgg11 = _family("vgg11")
vgg13 = _family("vgg13")
vgg16 = _family("vgg16")
vgg19 = _family("vgg19")
