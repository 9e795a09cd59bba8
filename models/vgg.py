"""VGG-11, -13, -16 and -19 (Simonyan & Zisserman 2015), torchvision's: 9.2 to 20 million parameters with the small head,
129 to 140 million with the full one, at 10 classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, Unpack

from torch import nn

from hpo.models.blocks import Rate
from hpo.models.preparing import Options, prepared
from hpo.models.stem import Stem, convolution, is_small, refuse_smaller

CONFIGURATIONS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}  # as the paper and torchvision name them
FEATURES = 512  # channels in the end


def _family(name: str) -> Callable[..., nn.Module]:
    def build(
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        stem: Stem = "auto",
        norm: Literal["none", "batch"] = "batch",
        dropout: Rate = 0.5,
        **options: Unpack[Options],
    ) -> nn.Module:
        """Build the network; with norm = "batch" torchvision's `_bn` variant, whose weights it takes.

        stem: of a VGG it is the head that is made for large images. full has torchvision's three linear layers over 7x7
        places; small averages over all places in front of one linear layer; auto is small where a side has less than 64
        pixels. `dropout` is in front of each linear layer but the full head's first. Images have at least 32 pixels on a
        side; ValueError if they have less.
        """
        from torchvision.models.vgg import VGG, cfgs, make_layers  # here: it takes a second

        refuse_smaller(name, input_shape)
        features = make_layers(cfgs[CONFIGURATIONS[name]], batch_norm=norm == "batch")
        if is_small(stem, input_shape):
            model = _with_small_head(features, num_classes, dropout)
        else:
            model = VGG(features, num_classes, dropout=dropout)
        features[0] = convolution(features[0], input_shape[0])
        return prepared(model, f"{name}_bn" if norm == "batch" else name, options)

    build.__name__ = build.__qualname__ = name
    return build


def _with_small_head(features: nn.Sequential, num_classes: int, dropout: float) -> nn.Module:
    for layer in features:
        if isinstance(layer, nn.Conv2d):  # as VGG draws them
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(FEATURES, num_classes))
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
