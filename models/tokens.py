"""Texts as vectors: an embedding of codes, and what a sequence's padding leaves out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0  # the code after the end of a text
UNKNOWN = 1  # the code of a word that was not in training


class TokenEmbedding(nn.Module):
    """Embeds the codes of texts: [B, L] to a series [B, size, L].

    Padding is 0, and stays so in training. An unknown word starts as 0, since training may have none.
    """

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, size) * 0.1)
        with torch.no_grad():
            self.weight[: UNKNOWN + 1] = 0.0

    def forward(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes [B, L]."""
        return (F.embedding(codes, self.weight) * is_word(codes, self.weight.dtype)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, size={self.weight.shape[1]}"


def is_word(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 for words and 0 for padding: codes [..., L] to [..., L, 1]."""
    return (codes != PADDING).to(dtype).unsqueeze(-1)


def lengths(codes: Tensor) -> Tensor:
    """Return the number of codes up to the last word [B], and 1 for an empty text."""
    steps = torch.arange(1, codes.shape[1] + 1, device=codes.device)
    return torch.where(codes != PADDING, steps, 1).amax(1)
