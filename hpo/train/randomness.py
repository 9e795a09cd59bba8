"""Random numbers of a run, from generators and streams that depend on (seed, purpose, epoch) alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from hpo.models import adopt_dropout
from hpo.spec.seeds import derive
from hpo.train import devices
from hpo.train.counted_masks import CountedMasks, Stream

#: How a run's dropout masks are drawn: from a generator of its own, as all runs once did, or by counting.
MaskRule = Literal["generator", "counter"]


def mask_rule(device: torch.device) -> MaskRule:
    """Return how a new run on this device draws its masks. On a CPU counting takes longer than a generator."""
    return "counter" if devices.is_accelerator(device) else "generator"


def initial_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model on the CPU with weights that depend on the seed alone, and replace torch's dropout by ours.

    The weights are the same for every device that the model is moved to later. torch's global generator is not changed.
    """
    is_default = torch.get_default_device().type == "cpu"  # then no device context is needed; it slows each call
    with torch.random.fork_rng(devices=[]), nullcontext() if is_default else torch.device("cpu"):
        torch.default_generator.manual_seed(derive(seed, "init"))
        return adopt_dropout(build())


class Randomness:
    """The generators of one run: its own for random layers, and torch's global ones, from which users' models may draw.

    Its dropout masks are counted, or drawn from its own generator.
    """

    def __init__(
        self, seed: int, device: torch.device, rule: MaskRule = "generator", steps: int = 1, epochs: int = 1
    ) -> None:
        """Make the generators for training of so many epochs of so many steps."""
        self.dropout = torch.Generator(device)
        self.masks = CountedMasks(device) if rule == "counter" else None
        self._seed = seed
        self._device = device
        self._steps = steps
        self._epochs = epochs

    @property
    def rule(self) -> MaskRule:
        """How masks are drawn."""
        return "generator" if self.masks is None else "counter"

    @property
    def stream(self) -> Stream | None:
        """The stream of counted masks; None if masks are not counted."""
        return None if self.masks is None else Stream.of(self._seed)

    def drawn_for(self, purpose: str, epoch: int) -> torch.Generator:
        """Return a new CPU generator for a purpose in an epoch. On the CPU its numbers are the same for every device."""
        return torch.Generator().manual_seed(derive(self._seed, purpose, epoch))

    def begin(self, epoch: int) -> None:
        """Seed the generators for an epoch, counted from 0."""
        self._begin_masks(epoch)
        self._seed_for("", epoch)

    def states(self) -> dict[str, Tensor]:
        """Return the states of the generators within an epoch, and the place in the masks of a step."""
        calls = {} if self.masks is None else {"calls": torch.tensor(self.masks.call)}
        return {"dropout": self.dropout.get_state(), **devices.random_states(self._device), **calls}

    def restore(self, states: Mapping[str, Tensor], epoch: int, batch: int) -> None:
        """Restore the states of the generators before a batch of an epoch.

        The states of another type of device do not fit. Then the rest of the epoch gets random numbers of its own, except
        for counted masks, which are the same on every device.
        """
        self._begin_masks(epoch)
        if devices.can_restore(self._device, states):
            self.rewind(states)
        else:
            self._seed_for(f" from batch {batch}", epoch)

    def rewind(self, states: Mapping[str, Tensor]) -> None:
        """Go back to these states on the same device."""
        if self.masks is not None:
            self.masks.back_to(int(states["calls"]))
        self.dropout.set_state(states["dropout"])
        devices.restore_random(self._device, states)

    def _begin_masks(self, epoch: int) -> None:
        if self.masks is not None:
            self.masks.begin([self.stream], [epoch * self._steps], self._steps * max(1, self._epochs - epoch))

    def _seed_for(self, part: str, epoch: int) -> None:
        self.dropout.manual_seed(derive(self._seed, f"dropout{part}", epoch))
        devices.seed_all(self._device, derive(self._seed, f"global{part}", epoch))
