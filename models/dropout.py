"""Dropout (Srivastava et al. 2014) with its own generator and a cheap mask.

All executors follow the same mask rule. Each element gets 16 random bits, four elements to an int64 draw. An element is
kept if its bits, read as an int16, are below a threshold. Features [B, F] are drawn feature by feature, as a stack of
trials holds them in memory. A stack that draws slot by slot from the trials' generators gets the masks of each trial.

`bernoulli_`, which `nn.Dropout` uses, takes 7 ns per element; this takes 1 ns (131072 elements, one thread of an AMD
EPYC, torch 2.15). The price is that the keep probability is a multiple of 2**-16. Kept elements are scaled by its exact
inverse, so the mean is unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

LEVELS = 2**16  # possible values of one draw; keep probabilities are multiples of 1 / LEVELS
LOWEST = -(2**63)  # with this lower end and no upper end, `random_` fills all 64 bits


def kept_levels(p: float) -> int:
    """Return how many of the 2**16 possible draws keep an element, for drop probability p."""
    return round((1.0 - p) * LEVELS)


def highest_kept(kept: int) -> int:
    """Return the highest of the 2**16 draws, as an int16, that keeps an element."""
    return max(kept - 1, 0) - LEVELS // 2  # with p = 1 some are kept, but their factor is 0


def factor_of_kept(kept: int) -> float:
    """Return the factor of kept elements."""
    return LEVELS / kept if kept else 0.0


class Masks(Protocol):
    """What draws masks in place of a generator."""

    def factors(self, kept: Sequence[int], elements: int, dtype: torch.dtype) -> Tensor | None:
        """Return the factors of the next call [rows, elements], for rows that keep so many of 2**16 draws; None: all 1."""


def fill_kept(out: Tensor, kept: int, generator: torch.Generator | None) -> Tensor:
    """Fill a contiguous tensor with ones (probability kept / 2**16) and zeros. `kept` is below 2**16."""
    count = out.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=out.device)
    bits = words.random_(LOWEST, None, generator=generator).view(torch.int16)
    # The result goes straight into floats: a bool mask and its conversion would cost as much as the draw.
    torch.lt(bits[:count], kept - LEVELS // 2, out=out.view(-1))
    return out


class Dropout(nn.Module):
    """`nn.Dropout` with the mask rule above, drawing from `generator` (None: torch's global generator), or from `masks`.

    The generator must be on the device of the input. It is not part of the state dict.
    """

    def __init__(self, p: float = 0.5, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout p = {p} is not a probability; give a number from 0 to 1")
        self.p = p
        self.generator = generator
        self.masks: Masks | None = None  # in place of the generator

    def forward(self, x: Tensor) -> Tensor:
        """Return x, of any shape, with some elements dropped and the others scaled; x itself in eval mode or for p = 0."""
        if not self.training:
            return x
        kept = kept_levels(self.p)
        if self.masks is not None:
            factors = self.masks.factors((kept,), x.numel(), x.dtype)
            if factors is None:
                return x
            return x * (factors.view(x.shape[::-1]).t() if x.ndim == 2 else factors.view(x.shape))
        if kept == LEVELS:
            return x
        shape = x.shape[::-1] if x.ndim == 2 else x.shape
        noise = fill_kept(torch.empty(shape, dtype=x.dtype, device=x.device), kept, self.generator)
        noise = noise.t() if x.ndim == 2 else noise
        return x * (noise.mul_(LEVELS / kept) if kept else noise)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def adopt_dropout(model: nn.Module) -> nn.Module:
    """Replace each module of exact type `nn.Dropout` by ours, in place, and return the model.

    Subclasses, `nn.Dropout2d` and `F.dropout` stay as they are and draw from torch's global generator. The `inplace`
    flag is lost: it saves memory and changes no value. A model that is itself an `nn.Dropout` is returned as a new
    module.
    """
    ours: dict[nn.Module, Dropout] = {}  # a module used in two places stays one module

    def adopted(theirs: nn.Dropout) -> Dropout:
        if theirs not in ours:
            ours[theirs] = Dropout(theirs.p).train(theirs.training)
        return ours[theirs]

    if type(model) is nn.Dropout:
        return adopted(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.Dropout:
                module._modules[name] = adopted(child)
    return model
