"""torchvision's residual blocks with stochastic depth.

Import this module only where such a network is built: it loads torchvision, which takes a second.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck


class DroppedBasicBlock(BasicBlock):  # type: ignore[misc]
    """Two convolutions beside a shortcut. `depth` drops the output of the convolutions."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.depth: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, as `BasicBlock` does."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return _joined(self, x, y)


class DroppedBottleneck(Bottleneck):  # type: ignore[misc]
    """Three convolutions beside a shortcut. `depth` drops the output of the convolutions."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.depth: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, as `Bottleneck` does."""
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return _joined(self, x, self.bn3(self.conv3(y)))


def _joined(block: Any, x: Tensor, y: Tensor) -> Tensor:
    shortcut = x if block.downsample is None else block.downsample(x)
    joined: Tensor = block.relu(block.depth(y) + shortcut)
    return joined
