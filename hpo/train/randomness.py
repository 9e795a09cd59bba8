"""What is random in a run: drawn from generators that its seed, a purpose and the epoch key, and nothing before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from hpo.models import adopt_dropout
from hpo.spec.seeds import derive


def initial_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model on the CPU from weights that depend on the seed alone, with our dropout in place of
    torch's.

    The same weights come out whatever the device is moved to later, and torch's global generator is left as
    it was.
    """
    is_default = torch.get_default_device().type == "cpu"  # else each call of torch goes through Python once more
    with torch.random.fork_rng(devices=[]), nullcontext() if is_default else torch.device("cpu"):
        torch.default_generator.manual_seed(derive(seed, "init"))
        return adopt_dropout(build())


class Randomness:
    """The generators of one run: one of its own for dropout masks, and torch's global ones, which models of users draw from."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.dropout = torch.Generator(device)
        self._seed = seed
        self._device = device

    def drawn_for(self, purpose: str, epoch: int) -> torch.Generator:
        """Return a fresh generator on the CPU, so that what it draws is the same on every device."""
        return torch.Generator().manual_seed(derive(self._seed, purpose, epoch))

    def begin(self, epoch: int) -> None:
        """Seed the generators for an epoch, counted from 0."""
        self.dropout.manual_seed(derive(self._seed, "dropout", epoch))
        seed = derive(self._seed, "global", epoch)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)

    def states(self) -> dict[str, Tensor]:
        """Return where the generators are, amid an epoch."""
        states = {"dropout": self.dropout.get_state(), "global": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states

    def restore(self, states: Mapping[str, Tensor]) -> None:
        """Put the generators back to where they were."""
        self.dropout.set_state(states["dropout"])
        torch.set_rng_state(states["global"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self._device)
