"""The validation of K runs in rows, in the same passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hpo.data import each
from hpo.train.optim.losses import Loss, RowLosses, behind
from hpo.train.precision import autocasting
from hpo.train.run import Run
from hpo.train.stack.dropout_masks import DropoutMasks
from hpo.train.stack.layers import Forward, Pass, filled
from hpo.train.validation import right

EVALUATION_BATCH = 256  # rows per batch of validation, for every run and every K, so that no result depends on it


class RowValidation:
    """Measures loss and accuracy of all rows on the validation part."""

    def __init__(self, forward: Forward, masks: DropoutMasks, filling: Callable[[int], int]) -> None:
        """Measure nothing yet.

        Args:
            forward: the forward pass.
            masks: the dropout masks of the runs, which validation does not draw.
            filling: returns the number of filler rows for a batch of a size.
        """
        self._forward = forward
        self._masks = masks
        self._filling = filling
        self._losses: list[Loss] = []  # by row

    def measure(
        self,
        runs: Sequence[Run | None],
        some: Run,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        outputs_too: list[Tensor] | None = None,
    ) -> Tensor:
        """Return loss and accuracy by row, float64 [2, K] on the device.

        Args:
            runs: the runs by row. A row without a run is measured with the loss of another.
            some: one of the runs.
            parameters: of the models [K, ...].
            buffers: of the models [K, ...].
            outputs_too: gets the outputs [K, O, B] of each batch appended, if given.
        """
        loss_of = self._losses_of([(run or some).judging_loss for run in runs], some.device)
        totals = torch.zeros((2, len(runs)), dtype=torch.float64, device=some.device)
        targets = some.splits.validation.targets
        parts = zip(some.validation_inputs.split(EVALUATION_BATCH), torch.split(targets, EVALUATION_BATCH), strict=True)
        for inputs, y in parts:
            size, filling = len(y), self._filling(len(y))
            with autocasting(some.device, some.precision):
                at = Pass(len(runs), parameters, buffers, False, self._masks, filling)
                outputs = self._forward(at, each(inputs, partial(filled, dim=0, more=filling)))
                losses = loss_of(outputs, y.expand(len(outputs), *y.shape), filling)
            outputs = outputs[:, :, :size]
            hits = right(outputs, behind(y.expand(len(outputs), *y.shape)))
            totals += torch.stack([losses.double().sum(1), hits.sum(1)])
            if outputs_too is not None:
                outputs_too.append(outputs)
        return totals / len(targets)

    def _losses_of(self, losses: list[Loss], device: torch.device) -> RowLosses:
        if losses != self._losses:
            self._losses, self._row_losses = losses, RowLosses(losses, device)
        return self._row_losses
