"""The dropout masks of K runs. Each run gets the same masks as if it were alone.

Masks that are counted are drawn for all runs at once, for many steps. Others come from the run's own generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.models.dropout import LEVELS, LOWEST, Dropout, factor_of_kept, highest_kept, kept_levels
from hpo.train import devices
from hpo.train.counted_masks import CountedMasks
from hpo.train.run import Run


class DropoutMasks:
    """The factors of a stack's dropout layers, drawn by the rule in `models.dropout`."""

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        self.count = count
        self._device = device
        self._dtype = dtype
        self._generators: list[torch.Generator | None] = [None] * count  # None: no generator draws for the row
        self._counted = CountedMasks(device)
        self._counts = False  # whether masks of any row are counted
        self._is_counted: Tensor | None = None  # [K, 1], only if masks of some rows are counted and others are not
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
        counted = [run for run in runs if run is not None and run.randomness.masks is not None]
        self._generators = [None if run is None or run in counted else run.randomness.dropout for run in runs]
        self._counts, self._is_counted = bool(counted), None
        if counted and any(self._generators):
            are_counted = torch.tensor([[run in counted] for run in runs])
            self._is_counted = devices.sent(are_counted, self._device)
        if counted:
            streams = [None if run is None else run.randomness.stream for run in runs]
            starts = [0 if run is None else run.epoch * run.steps_per_epoch for run in runs]
            left = max(run.epochs - run.epoch for run in counted)
            self._counted.begin(streams, starts, left * counted[0].steps_per_epoch)

    def go_to(self, step: int) -> None:
        """Go to a step of the epoch, from 0."""
        self._counted.go_to(step)

    def factors(self, name: str, elements: int) -> Tensor | None:
        """Return the factors of a layer's elements [K, elements], in the order in which a single run draws them.

        A factor is 0 where an element is dropped, else 1 / keep probability. None if no row drops anything.
        """
        kept = self._kept.get(name, [LEVELS] * self.count)
        if not self._counts:
            return self._drawn(name, kept, elements) if min(kept) < LEVELS else None
        counted = self._counted.factors(kept, elements, self._dtype)  # also counts a call that drops nothing
        if counted is None or self._is_counted is None:
            return counted
        return torch.where(self._is_counted, counted, self._drawn(name, kept, elements))

    def _drawn(self, name: str, kept: Sequence[int], elements: int) -> Tensor:
        """Return factors [K, elements] from the rows' generators."""
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
            highest = [highest_kept(levels) for levels in kept]
            scale = [factor_of_kept(levels) for levels in kept]
            self._thresholds[name] = (
                torch.tensor(highest, dtype=torch.int16, device=self._device).unsqueeze(1),
                torch.tensor(scale, dtype=self._dtype, device=self._device).unsqueeze(1),
            )
        return self._thresholds[name]
