"""Random numbers of a run, from generators that are seeded by (seed, purpose, epoch) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from hpo.models import adopt_dropout
from hpo.spec.seeds import derive


def initial_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model on the CPU with weights that depend on the seed alone, and replace torch's dropout by ours.

    The weights are the same for every device that the model is moved to later. torch's global generator is not changed.
    """
    is_default = torch.get_default_device().type == "cpu"  # then no device context is needed; it slows each call
    with torch.random.fork_rng(devices=[]), nullcontext() if is_default else torch.device("cpu"):
        torch.default_generator.manual_seed(derive(seed, "init"))
        return adopt_dropout(build())


class Randomness:
    """The generators of one run: its own for dropout masks, and torch's global ones, from which users' models may draw."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.dropout = torch.Generator(device)
        self._seed = seed
        self._device = device

    def drawn_for(self, purpose: str, epoch: int) -> torch.Generator:
        """Return a new CPU generator for a purpose in an epoch. On the CPU its numbers are the same for every device."""
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
        """Return the states of the generators within an epoch."""
        states = {"dropout": self.dropout.get_state(), "global": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states

    def restore(self, states: Mapping[str, Tensor]) -> None:
        """Restore the states of the generators."""
        self.dropout.set_state(states["dropout"])
        torch.set_rng_state(states["global"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self._device)
