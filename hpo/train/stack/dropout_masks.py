"""The dropout masks of K runs. Each run's generator draws the same masks as if the run were alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.models.dropout import LEVELS, LOWEST, Dropout, kept_levels
from hpo.train.run import Run

HALF = LEVELS // 2


class DropoutMasks:
    """The factors of a stack's dropout layers, drawn by the rule in `models.dropout`, each row from its run's generator."""

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        self.count = count
        self._device = device
        self._dtype = dtype
        self._generators: list[torch.Generator | None] = [None] * count  # None: nothing is drawn
        self._kept: dict[str, list[int]] = {}  # by layer name: for each row, how many of 2**16 draws keep an element
        self._thresholds: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, row: int, run: Run) -> None:
        """Set the dropout probabilities of a row to those of a run."""
        for name, module in run.model.named_modules():
            if isinstance(module, Dropout):
                self._kept.setdefault(name, [LEVELS] * self.count)[row] = kept_levels(module.p)
        self._thresholds = {}

    def draw_for(self, runs: Sequence[Run | None]) -> None:
        """Set the runs, by row, that draw in the next steps. No generator moves for a row without a run."""
        self._generators = [None if run is None else run.randomness.dropout for run in runs]

    def factors(self, name: str, elements: int) -> Tensor | None:
        """Draw the factors of a layer's elements [K, elements], in the order in which a single run draws them.

        A factor is 0 where an element is dropped, else 1 / keep probability. None if no row drops anything.
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
        """Return by row [K, 1] the highest draw that keeps an element, and the factor of kept elements."""
        if name not in self._thresholds:
            kept = self._kept[name]
            highest = [max(levels - 1, 0) - HALF for levels in kept]  # with p = 1 some are kept, but their factor is 0
            scale = [LEVELS / levels if levels else 0.0 for levels in kept]
            self._thresholds[name] = (
                torch.tensor(highest, dtype=torch.int16, device=self._device).unsqueeze(1),
                torch.tensor(scale, dtype=self._dtype, device=self._device).unsqueeze(1),
            )
        return self._thresholds[name]
