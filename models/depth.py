"""Stochastic depth (Huang et al. 2016): drops whole residual branches, separately for each image."""

from __future__ import annotations

from torch import Tensor, nn

from hpo.models.dropout import Dropout


class StochasticDepth(nn.Module):
    """Drops a residual branch for an image with probability p, and scales it by 1 / (1 - p) where it is kept.

    It does what `torchvision.ops.StochasticDepth` does in mode "row". Its draws are those of a `Dropout` of one element
    per image. So they come from the run's generator, and a stack of runs can draw them.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.mask = Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output [B, ...] with the values of some images set to 0; x itself in eval mode."""
        if not self.training:
            return x
        factors: Tensor = self.mask(x.new_ones((x.shape[0], *(1 for _ in x.shape[1:]))))
        return x * factors


def rates(p: float, blocks: int) -> list[float]:
    """Return the drop probability of each block: linear from p / blocks at the first to p at the last, as in the paper."""
    return [p * (block + 1) / blocks for block in range(blocks)]
