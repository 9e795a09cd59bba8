"""The dropout masks of K runs: each run's own generator draws the very masks that it would draw alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.models.dropout import LEVELS, LOWEST, Dropout, kept_levels
from hpo.train.run import Run

HALF = LEVELS // 2


class DropoutMasks:
    """What the dropout layers of a stack multiply by, drawn by `models.dropout`'s rule, each row from its own run."""

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        self.count = count
        self._device = device
        self._dtype = dtype
        self._generators: list[torch.Generator | None] = [None] * count  # None draws nothing
        self._kept: dict[str, list[int]] = {}  # by the layer's name: levels of 2**16 that keep an element
        self._thresholds: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, row: int, run: Run) -> None:
        """Let a row draw for a run from now on."""
        for name, module in run.model.named_modules():
            if isinstance(module, Dropout):
                self._kept.setdefault(name, [LEVELS] * self.count)[row] = kept_levels(module.p)
        self._thresholds = {}

    def draw_for(self, runs: Sequence[Run | None]) -> None:
        """Draw for these runs, by row, in the steps to come; a row without one keeps its generator as it is."""
        self._generators = [None if run is None else run.randomness.dropout for run in runs]

    def factors(self, name: str, elements: int) -> Tensor | None:
        """Return what a layer's elements are multiplied by [K, elements], in the order in which one run alone draws
        them: 0 where dropped, else 1 / the share that is kept. None if no row drops anything.
        """
        kept = self._kept.get(name)
        if kept is None or min(kept) == LEVELS:
            return None
        words = torch.empty((self.count, -(-elements // 4)), dtype=torch.int64, device=self._device)
        for row, generator, levels in zip(words.unbind(0), self._generators, kept, strict=True):
            if generator is not None and levels < LEVELS:
                row.random_(LOWEST, None, generator=generator)
        highest, scale = self._thresholds_of(name)
        factors = torch.empty((self.count, elements), dtype=self._dtype, device=self._device)
        torch.le(words.view(torch.int16)[:, :elements], highest, out=factors)
        return factors.mul_(scale)

    def _thresholds_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Return by row the highest draw that keeps an element, and what kept ones are multiplied by."""
        if name not in self._thresholds:
            kept = self._kept[name]
            highest = [max(levels - 1, 0) - HALF for levels in kept]  # that of p = 1 keeps some, times 0
            scale = [LEVELS / levels if levels else 0.0 for levels in kept]
            self._thresholds[name] = (
                torch.tensor(highest, dtype=torch.int16, device=self._device).unsqueeze(1),
                torch.tensor(scale, dtype=self._dtype, device=self._device).unsqueeze(1),
            )
        return self._thresholds[name]
