"""torchvision's ResNet-18, -34 and -50 (He et al. 2016): 11.2, 21.3 and 23.5 million parameters at 10 classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Unpack

from torch import nn

from hpo.models import shapes
from hpo.models.blocks import Rate
from hpo.models.depth import StochasticDepth, rates
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape
from hpo.models.stem import Stem, convolution, is_small, refuse_smaller

Name = Literal["resnet18", "resnet34", "resnet50"]

BLOCKS: dict[Name, list[int]] = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}


def _family(name: Name) -> Callable[..., nn.Module]:
    def build(
        shape: Shape,
        outputs: int,
        *,
        stem: Stem = "auto",
        dropout: Rate = 0.0,
        stochastic_depth: Rate = 0.0,
        **options: Unpack[Options],
    ) -> nn.Module:
        """Build a residual network with a linear layer on top.

        Images need at least 8 pixels on a side, 32 with a full stem; ValueError if they have less.

        Args:
            stem: `small`: 3x3 convolution of stride 1 without pooling, as He et al. used for CIFAR. `full`:
                torchvision's 7x7 convolution of stride 2 with pooling. `auto`: small if a side has less than 64 pixels.
            dropout: dropout probability before the linear layer.
            stochastic_depth: probability of skipping the last block for an image. It grows linearly from the first
                block on (Huang et al. 2016).
        """
        from torchvision.models.resnet import ResNet  # here, since it takes a second, which other models do not need

        from hpo.models.resnet_blocks import DroppedBasicBlock, DroppedBottleneck

        image = shapes.image(name, shape)
        small = is_small(stem, image)
        refuse_smaller(name, image, small=small)
        model = ResNet(DroppedBottleneck if name == "resnet50" else DroppedBasicBlock, BLOCKS[name], outputs)
        model.conv1 = convolution(model.conv1, image[0], **({"kernel": 3, "stride": 1} if small else {}))
        if small:
            model.maxpool = nn.Identity()
        blocks = [module for module in model.modules() if isinstance(module, DroppedBasicBlock | DroppedBottleneck)]
        for block, rate in zip(blocks, rates(stochastic_depth, len(blocks)), strict=True):
            block.depth = StochasticDepth(rate)
        model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(dropout))
        return prepared(model, name, options)

    build.__name__ = build.__qualname__ = name
    return build


resnet18 = _family("resnet18")
resnet34 = _family("resnet34")
resnet50 = _family("resnet50")
