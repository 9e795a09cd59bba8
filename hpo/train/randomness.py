"""Random numbers of a run, from generators that are seeded by (seed, purpose, epoch) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from hpo.models import adopt_dropout
from hpo.spec.seeds import derive
from hpo.train import devices


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
        self._seed_for("", epoch)

    def states(self) -> dict[str, Tensor]:
        """Return the states of the generators within an epoch."""
        return {"dropout": self.dropout.get_state(), **devices.random_states(self._device)}

    def restore(self, states: Mapping[str, Tensor], epoch: int, batch: int) -> None:
        """Restore the states of the generators before a batch of an epoch.

        The states of another type of device do not fit. Then the rest of the epoch gets random numbers of its own.
        """
        if not devices.can_restore(self._device, states):
            self._seed_for(f" from batch {batch}", epoch)
            return
        self.dropout.set_state(states["dropout"])
        devices.restore_random(self._device, states)

    def _seed_for(self, part: str, epoch: int) -> None:
        self.dropout.manual_seed(derive(self._seed, f"dropout{part}", epoch))
        devices.seed_all(self._device, derive(self._seed, f"global{part}", epoch))
