"""Stochastic depth (Huang et al. 2016): whole residual branches dropped, image by image."""

from __future__ import annotations

from torch import Tensor, nn

from hpo.models.dropout import Dropout


class StochasticDepth(nn.Module):
    """Drops a residual branch for an image with probability p, and scales it by 1 / (1 - p) where it is kept.

    `torchvision.ops.StochasticDepth` in mode "row", but its draws are those of a `Dropout` of one element an image, so they
    come from the run's generator and a stack can make them.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.mask = Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch [B, ...] with some images' values at 0; x itself in eval mode."""
        if not self.training:
            return x
        factors: Tensor = self.mask(x.new_ones((x.shape[0], *(1 for _ in x.shape[1:]))))
        return x * factors


def rates(p: float, blocks: int) -> list[float]:
    """Return the probability for each block: from p / blocks at the first evenly up to p at the last, as in the paper."""
    return [p * (block + 1) / blocks for block in range(blocks)]
