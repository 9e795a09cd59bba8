"""The losses and gradients of K runs in a step, from one forward and backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpo.data import Augmentation, each
from hpo.train.graphs import CapturedStep, Draws, FixedMasks, can_capture
from hpo.train.inputs import Batch
from hpo.train.optim.losses import Loss, RowLosses
from hpo.train.precision import Precision, autocasting
from hpo.train.run import Run
from hpo.train.stack.dropout_masks import DropoutMasks
from hpo.train.stack.flat_parameters import FlatParameters
from hpo.train.stack.layers import Forward, Pass, filled


class RowGradients:
    """Computes the gradients of a step of all rows, and adds its losses to the sums of the epoch."""

    def __init__(
        self,
        forward: Forward,
        rows: FlatParameters,
        masks: DropoutMasks,
        lanes: int,
        precision: Precision,
        *,
        at_once: bool,
        captures: bool,
    ) -> None:
        """Make sums of 0.

        Args:
            forward: the forward pass.
            rows: parameters and buffers of the runs; gradients are written to them.
            masks: the dropout masks of the runs.
            lanes: batches are filled up to a multiple of it.
            precision: number type of the forward pass.
            at_once: whether gradients are copied to the rows in one call.
            captures: whether a step without augmentation is captured as a graph, where the device can.
        """
        self.sums = torch.zeros(rows.count, dtype=torch.float64, device=rows.values.device)  # of losses, by row
        self._forward = forward
        self._rows = rows
        self._masks = masks
        self._lanes = lanes
        self._precision = precision
        self._at_once = at_once
        self._device = rows.values.device
        self._counters = [b for name, b in rows.buffers.items() if name.endswith("num_batches_tracked")]
        self._ones: Tensor | None = None
        self._losses_by_row: list[Loss] = []
        self._targets: Tensor | None = None
        self._factors: Draws = masks
        self._fixed = FixedMasks(masks.factors)
        self._captured: CapturedStep | None = None
        if captures and can_capture(self._device):
            self._captured = CapturedStep(self._device, self._fixed)

    @property
    def capture_failure(self) -> str | None:
        """Why the step could not be captured; None if it was, or is not to be."""
        return None if self._captured is None else self._captured.failure

    def begin(self, losses: list[Loss], targets: Tensor) -> None:
        """Take losses by row, and the targets of the training part. A captured step stays if both are as before."""
        if losses == self._losses_by_row and targets is self._targets:
            return
        self._losses_by_row, self._targets = losses, targets
        self._loss_of = RowLosses(losses, self._device)
        if self._captured is not None:
            self._captured.forget()

    def filling(self, size: int) -> int:
        """Return the number of filler rows for a batch of this size."""
        return -size % self._lanes

    def shown(self, batches: Tensor) -> Tensor:
        """Return the flat rows that a step reads for batches [K, B], each batch filled up."""
        return filled(batches, 1, self.filling(batches.shape[1])).reshape(-1)

    def take(self, batches: Tensor, inputs: Batch, augmentation: Augmentation | None, batch: int) -> None:
        """Compute losses and gradients of a step.

        Args:
            batches: rows of the training part [K, B].
            inputs: the inputs that `shown` names. They may be overwritten.
            augmentation: that of the epoch.
            batch: number of the batch in the epoch, from 0.
        """
        self._masks.go_to(batch)
        if self._captured is not None and augmentation is None:
            self._captured.take(self._compute_captured, self._changed, batches, inputs)
        else:
            self._compute(batches, inputs, augmentation, batch)

    def unused(self, some: Run) -> Sequence[str]:
        """Return the names of trained parameters on which the loss does not depend."""
        batches = torch.zeros((self._rows.count, 2), dtype=torch.int64, device=self._device)
        losses = self._losses(batches, some.inputs.take(self.shown(batches)))
        gradients = torch.autograd.grad(losses.sum(), self._rows.leaves, allow_unused=True)
        return [name for name, found in zip(self._rows.trained, gradients, strict=True) if found is None]

    def _compute(
        self, batches: Tensor, inputs: Batch, augmentation: Augmentation | None = None, batch: int = 0
    ) -> None:
        """Compute losses and gradients of a step. This part may be captured: it reads no number that changes by step."""
        losses = self._losses(batches, inputs, augmentation, batch)
        if self._at_once:
            self._rows.take_gradients(torch.autograd.grad(losses, self._rows.leaves, self._ones_of(losses.dtype)))
        else:
            gradients = torch.autograd.grad(losses.sum(), self._rows.leaves)
            torch._foreach_copy_(self._rows.leaf_gradients, list(gradients))
        self.sums += losses.detach()
        if self._counters:
            torch._foreach_add_(self._counters, 1)

    def _losses(
        self, batches: Tensor, inputs: Batch, augmentation: Augmentation | None = None, batch: int = 0
    ) -> Tensor:
        """Return each model's mean loss over its batch [K]. The arguments are those of `take`."""
        assert self._targets is not None
        size = batches.shape[1]
        filling = self.filling(size)
        every = self._targets
        targets = every.index_select(0, batches.reshape(-1)).view(*batches.shape, *every.shape[1:])
        mixed = None
        if augmentation is not None and isinstance(inputs, Tensor):
            inputs, mixed = augmentation.images(inputs, batch), augmentation.labels(targets, batch)
        with autocasting(self._device, self._precision):
            by_run = each(inputs, lambda one: one.view(len(batches), -1, *one.shape[1:]))
            rows = self._rows
            at = Pass(rows.count, rows.parameters, rows.buffers, True, self._factors, filling)
            outputs = self._forward(at, by_run)

            def losses_for(targets: Tensor) -> Tensor:
                return self._loss_of(outputs, targets, filling)

            losses = losses_for(targets) if mixed is None else mixed.losses(losses_for)
            return losses.sum(1) / size if filling or not self._at_once else losses.mean(1)

    def _ones_of(self, dtype: torch.dtype) -> Tensor:
        """Return the gradient of a sum over the rows, kept since it is the same in every step."""
        if self._ones is None or self._ones.dtype != dtype:
            self._ones = torch.ones(self._rows.count, dtype=dtype, device=self._device)
        return self._ones

    def _compute_captured(self, batches: Tensor, inputs: Batch) -> None:
        """Compute a step with the dropout factors of the captured one."""
        self._factors = self._fixed
        try:
            self._compute(batches, inputs)
        finally:
            self._factors = self._masks

    def _changed(self) -> list[Tensor]:
        """Return what `_compute` changes and reads again in the next step."""
        return [*dict.fromkeys(self._rows.buffers.values()), self.sums]
