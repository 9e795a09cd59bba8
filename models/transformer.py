"""A small transformer encoder on series and texts (Vaswani et al. 2017), with the norm before each part (Xiong et al. 2020)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Unpack

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from hpo.models import shapes
from hpo.models.blocks import Depth, Rate
from hpo.models.dropout import Dropout
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape, TokenShape
from hpo.models.tokens import PADDING, TokenEmbedding

Size = Annotated[int, Ge(1), Le(2**16)]
Pooling = Literal["mean", "max"]
MOST_PATCHES = 64  # of a series, where the file gives no size of a patch: attention takes their square


class Attention(nn.Module):
    """Self-attention with several heads. Padding is attended to by nothing."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)

    def forward(self, x: Tensor, barred: Tensor | None) -> Tensor:
        """Return the attended values [B, T, width].

        Args:
            barred: 0 where a step may be attended to, else -inf [B, 1, 1, T].
        """
        query, key, value = self.project(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        weights = torch.softmax(scores if barred is None else scores + barred, 3)
        return self.join((weights @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.dropout1 = Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.enter = nn.Linear(width, hidden)
        self.leave = nn.Linear(hidden, width)
        self.dropout2 = Dropout(dropout)

    def forward(self, x: Tensor, barred: Tensor | None) -> Tensor:
        """Return the block's output [B, T, width]."""
        x = x + self.dropout1(self.attention(self.norm1(x), barred))
        joined: Tensor = x + self.dropout2(self.leave(F.gelu(self.enter(self.norm2(x)))))
        return joined


class Encoder(nn.Module):
    """Words or patches with learned positions, blocks, a pooling over the steps, and a linear layer."""

    def __init__(self, first: nn.Module, steps: int, blocks: list[Block], pooling: Pooling, head: nn.Linear) -> None:
        super().__init__()
        width = head.in_features
        self.first = first
        self.position = nn.Parameter(torch.randn(steps, width) * 0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.pooling: Pooling = pooling
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Map series [B, C, T] or codes [B, L] to [B, outputs]."""
        padding = self._padding(x) if isinstance(self.first, TokenEmbedding) else None
        barred = None if padding is None else torch.where(padding, -math.inf, 0.0)[:, None, None, :]
        values = self.first(x).transpose(1, 2) + self.position
        for block in self.blocks:
            values = block(values, None if barred is None else barred.to(values.dtype))
        return self.head(self._pooled(self.norm(values), padding))  # type: ignore[no-any-return]

    def _padding(self, codes: Tensor) -> Tensor:
        """Return which steps are padding [B, L]. The first is not: an empty text has one step."""
        return (codes == PADDING) & (torch.arange(codes.shape[1], device=codes.device) > 0)

    def _pooled(self, values: Tensor, padding: Tensor | None) -> Tensor:
        if padding is None:
            return values.amax(1) if self.pooling == "max" else values.mean(1)
        left_out = padding.unsqueeze(2)
        if self.pooling == "max":
            return torch.where(left_out, -math.inf, values).amax(1)
        return torch.where(left_out, 0, values).sum(1) / (~left_out).sum(1)


class Patches(nn.Module):
    """A linear layer of each patch of a series: [B, C, T] to [B, width, patches]. Zeros fill the last patch."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(channels * patch, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the patches."""
        filled = F.pad(x, (0, -x.shape[2] % self.patch))
        patches = filled.view(*filled.shape[:2], -1, self.patch).transpose(1, 2).flatten(2)  # [B, patches, C * patch]
        return self.linear(patches).transpose(1, 2)  # type: ignore[no-any-return]


def transformer(
    shape: Shape,
    outputs: int,
    *,
    width: Size = 64,
    depth: Depth = 2,
    heads: Annotated[int, Ge(1), Le(1024)] = 4,
    hidden: Size | None = None,
    patch: Size | None = None,
    pooling: Pooling = "mean",
    dropout: Rate = 0.0,
    **options: Unpack[Options],
) -> nn.Module:
    """Build a transformer encoder for series or texts, with a linear layer on top.

    A series is cut into patches of some steps (Nie et al. 2023), a text into its words. Positions are learned. Padding
    of a text is masked. ValueError if `heads` does not divide `width`.

    Args:
        width: features per step.
        depth: number of blocks.
        heads: attention heads per block.
        hidden: features between the two linear layers of a block (default 4 times `width`).
        patch: steps of a series per patch (default: as few as give 64 patches or less).
        pooling: over all steps.
        dropout: dropout probability of what each part adds.
    """
    shapes.expect("transformer", shape)
    if width % heads:
        fitting = [n for n in range(1, width + 1) if width % n == 0]
        raise ValueError(f"heads = {heads} does not divide width = {width}; give one of {fitting}")
    first: nn.Module
    if isinstance(shape, TokenShape):
        first, steps = TokenEmbedding(shape.vocabulary, width), shape.length
    else:
        assert isinstance(shape, tuple)
        channels, length = shape
        size = patch or -(-length // MOST_PATCHES)
        first, steps = Patches(channels, size, width), -(-length // size)
    blocks = [Block(width, heads, hidden or 4 * width, dropout) for _ in range(depth)]
    model = Encoder(first, steps, blocks, pooling, nn.Linear(width, outputs))
    return prepared(model, "transformer", options)
