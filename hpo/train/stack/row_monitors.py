"""The step monitors of K runs in a stack: the measurements of `monitors.StepMonitor` for all runs at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.train.monitors import NORM, PRODUCT, SQUARE, SUMS, Watch
from hpo.train.run import Run
from hpo.train.stack.flat_parameters import FlatParameters


class RowMonitors:
    """The monitors of the runs in rows. While a run is trained here, its monitor's sums are a view of ours."""

    def __init__(self, rows: FlatParameters, watch: Watch) -> None:
        self.watch = watch
        self._rows = rows
        self._sums = torch.zeros(rows.count, SUMS, dtype=torch.float64, device=rows.values.device)
        self._before = torch.zeros_like(rows.gradients) if watch.noise else None

    def begin(self) -> None:
        """Begin or continue an epoch: clear the sums. No row has a previous gradient before its first step here."""
        self._sums.zero_()
        if self._before is not None:
            self._before.zero_()

    def enter(self, row: int, run: Run) -> None:
        """Move a run's monitor into its row."""
        run.monitor.keep_in(self._sums[row])
        if self._before is not None:
            for name, gradient in run.monitor.before.items():
                self._rows.of(self._before, row, name).copy_(gradient)
            run.monitor.before = {}

    def leave(self, row: int, run: Run) -> None:
        """Give a run's monitor its previous gradient within an epoch."""
        if self._before is not None:
            names = [name for name, parameter in run.monitor.parameters.items() if parameter.requires_grad]
            run.monitor.before = {name: self._rows.of(self._before, row, name).clone() for name in names}

    def let_go(self, run: Run) -> None:
        """Give a run's monitor its own sums."""
        run.monitor.keep_in(torch.zeros_like(self._sums[0]))

    @torch.no_grad()
    def take(self, active: Sequence[Run | None], losses: Tensor) -> None:
        """Measure a step of all rows, between the backward pass and clipping.

        Args:
            active: the runs in training, by row.
            losses: sums of the epoch's losses so far [K].
        """
        gradients = self._rows.gradients
        norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
        self._sums[:, NORM] += norms
        self._sums[:, SQUARE] += norms.square()
        if self._before is not None:
            self._sums[:, PRODUCT] += (gradients * self._before).sum(1, dtype=torch.float64)
            self._before.copy_(gradients)
        if self.watch.by_step:
            steps = torch.stack([losses, norms, self.parameter_norms()], dim=1)
            for row, run in enumerate(active):
                if run is not None:
                    run.monitor.steps.append(steps[row])

    @torch.no_grad()
    def parameter_norms(self) -> Tensor:
        """Return the 2-norm of each row's trained parameters, float64 [K]."""
        trained = self._rows.values[:, : self._rows.gradients.shape[1]]
        norms: Tensor = torch.linalg.vector_norm(trained, dim=1, dtype=torch.float64)
        return norms

    def measured(self) -> Tensor:
        """Return the epoch's sums and the norm of the parameters of each row [K, SUMS + 1]."""
        return torch.cat([self._sums, self.parameter_norms()[:, None]], dim=1)
