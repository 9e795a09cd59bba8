"""K runs of one architecture trained as one model: the executor that makes small models keep a machine busy.

Each run keeps its own learning rate, weight decay, dropout, schedule, batches, randomness and epochs; what it trains to does
not depend on who else is in the stack, nor on its row. Runs come and go between epochs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hpo.train.layers import Pass
from hpo.train.loop import EpochResult, Run, autocasting
from hpo.train.noise import Noise
from hpo.train.rowoptim import order_of, stepper
from hpo.train.rows import Rows

EVALUATION_BATCH = 256  # images at a time, of every run; the same for every K, so that no result depends on it
FEWEST_ROWS = 2  # a convolution in one group takes another kernel than one in several, and rounds differently


class Forward(Protocol):
    """The forward pass of K models: images [K, B, C, H, W], or [B, C, H, W] for all of them, to logits [K, classes, B]."""

    name: str

    def __call__(self, at: Pass, images: Tensor) -> Tensor: ...


class Stack:
    """Up to `slots` runs in training together."""

    def __init__(self, forward: Forward, first: Run, slots: int) -> None:
        """Make an empty stack for runs like `first`, which is left as it is."""
        self.name = forward.name
        self.slots = slots
        self._forward = forward
        self._order = order_of(first.optimizer, _names(first))
        self._make_room(first, max(slots, FEWEST_ROWS))

    def _make_room(self, first: Run, slots: int) -> None:
        self._rows = Rows(first.model, self._order, slots)
        self._leaves = [p for p in self._rows.parameters.values() if p.requires_grad]
        self._gradients = [self._rows.gradient_of[n] for n, p in self._rows.parameters.items() if p.requires_grad]
        self._counters = [b for name, b in self._rows.buffers.items() if name.endswith("num_batches_tracked")]
        self._noise = Noise(slots, first.device, self._rows.values.dtype)
        self._places: list[Run | None] = [None] * slots
        self._steppers: dict[Run, Callable[[], None]] = {}
        self._loss_sums = torch.zeros(slots, dtype=torch.float64, device=first.device)

    @property
    def runs(self) -> list[Run]:
        """The runs in training."""
        return [run for run in self._places if run is not None]

    def put(self, run: Run) -> None:
        """Take up a run, between epochs, in a free slot: its tensors move into the stack."""
        if len(self.runs) == self.slots:
            raise ValueError(f"a stack of {self.slots} slots is full; wait until a run has ended")
        if None not in self._places:
            self._move(self.runs, self.slots)  # what was closed is open again
        row = self._places.index(None)
        names = _names(run)
        self._places[row] = run
        self._rows.adopt(row, run.model)
        self._steppers[run] = stepper(run.optimizer, names, self._rows, row)
        self._noise.of(row, run)
        run.note_executor(self.name)

    def remove(self, run: Run) -> None:
        """Let a run go; its tensors are its own until another takes its place."""
        self._places[self._places.index(run)] = None
        del self._steppers[run]

    def compact(self) -> None:
        """Close the gaps, when nobody is to fill them: empty slots cost time as full ones do."""
        runs = self.runs
        rows = max(len(runs), FEWEST_ROWS)
        if runs and rows < len(self._places):
            self._move(runs, rows)

    def _move(self, runs: Sequence[Run], slots: int) -> None:
        self._make_room(runs[0], slots)
        for run in runs:
            self.put(run)

    def train_epoch(self, stop: Callable[[], bool] = lambda: False) -> list[EpochResult]:
        """Train every run to the end of its epoch and return the results in the order of `runs`.

        Empty if `stop`, asked before every batch, said so; the runs are left amid the epoch. A run that was left amid an
        epoch elsewhere waits until the others have come to its batch.
        """
        started = time.perf_counter()
        runs = self.runs
        for run in runs:
            run.enter_epoch()
        finished = self._train(runs, stop)
        seconds = time.perf_counter() - started
        if not finished:
            for run in runs:
                run.spend(seconds)
            return []
        measured = self._measure().tolist()  # the one wait for the device in an epoch
        seconds = time.perf_counter() - started
        return [
            run.close_epoch(train_loss, loss, accuracy, seconds)
            for run, (train_loss, loss, accuracy) in zip(self._places, measured, strict=True)
            if run is not None
        ]

    # --- an epoch -----------------------------------------------------------------------------------------------------

    def _train(self, runs: Sequence[Run], stop: Callable[[], bool]) -> bool:
        orders = self._orders(runs[0])
        first = min(run.batch for run in runs)
        waiting = {run: self._rows.snapshot(self._places.index(run)) for run in runs if run.batch > first}
        self._enter(waiting)
        for batch in range(first, runs[0].steps_per_epoch):
            if stop():
                self._leave(runs, waiting, batch)
                return False
            if any(run.batch == batch for run in waiting):
                self._let_in(waiting, batch)
            self._step(orders[:, batch], batch)
        return True

    def _orders(self, some: Run) -> Tensor:
        """Return the rows of all batches [K, steps, B]; an empty slot takes another's."""
        orders = [(run or some).order() for run in self._places]
        return torch.stack(orders).view(len(orders), some.steps_per_epoch, some.batch_size)

    def _enter(self, waiting: dict[Run, dict[str, Tensor]]) -> None:
        """Say who is in the steps to come: all but those that wait."""
        self._active = [run if run is not None and run not in waiting else None for run in self._places]
        self._noise.draw_for(self._active)
        for row, run in enumerate(self._active):
            if run is not None:
                run.keep_losses_in(self._loss_sums[row])

    def _let_in(self, waiting: dict[Run, dict[str, Tensor]], batch: int) -> None:
        for run in [run for run in waiting if run.batch == batch]:
            self._rows.restore(self._places.index(run), waiting.pop(run))
        self._enter(waiting)

    def _leave(self, runs: Sequence[Run], waiting: dict[Run, dict[str, Tensor]], batch: int) -> None:
        for run in runs:
            if run in waiting:
                self._rows.restore(self._places.index(run), waiting[run])
            run.leave_epoch(max(run.batch, batch))

    def _step(self, rows: Tensor, batch: int) -> None:
        some = self.runs[0]
        index = rows.reshape(-1)
        images, labels = some.images.take(index), some.splits.train.labels.index_select(0, index)
        with autocasting(some.device, some.precision):
            logits = self._forward(self._pass(training=True), images.view(*rows.shape, *images.shape[1:]))
            losses = F.cross_entropy(logits, labels.view(rows.shape), reduction="none").mean(1)
        gradients = torch.autograd.grad(losses.sum(), self._leaves)
        torch._foreach_copy_(self._gradients, list(gradients))
        self._loss_sums += losses.detach()
        if self._counters:
            torch._foreach_add_(self._counters, 1)
        for row, run in enumerate(self._active):
            if run is not None:
                self._clip(row, run)
                run.set_rate(batch)
                self._steppers[run]()

    def _pass(self, *, training: bool) -> Pass:
        rows = self._rows
        return Pass(rows.count, rows.parameters, rows.buffers, training, self._noise)

    def _clip(self, row: int, run: Run) -> None:
        """Clip one run's gradient by itself: a norm over all would couple them."""
        if run.clip_value is not None:
            self._rows.gradients[row].clamp_(-run.clip_value, run.clip_value)
        if run.clip_norm is not None:
            gradient = self._rows.gradients[row]
            norm = torch.linalg.vector_norm(gradient)
            gradient.mul_(torch.clamp(run.clip_norm / (norm + 1e-6), max=1.0))  # as torch.nn.utils.clip_grad_norm_

    @torch.no_grad()
    def _measure(self) -> Tensor:
        """Return by slot the training loss and the validation part's loss and accuracy, float64 [K, 3] on the device."""
        some = self.runs[0]
        totals = torch.zeros((2, len(self._places)), dtype=torch.float64, device=some.device)
        labels = some.splits.validation.labels
        at = self._pass(training=False)
        parts = zip(some.validation_images.split(EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True)
        for images, y in parts:
            with autocasting(some.device, some.precision):
                logits = self._forward(at, images)
                losses = F.cross_entropy(logits, y.expand(len(logits), -1), reduction="none")
            totals += torch.stack([losses.double().sum(1), (logits.argmax(1) == y).double().sum(1)])
        return torch.stack([self._loss_sums / some.steps_per_epoch, *(totals / len(labels))], dim=1)


def _names(run: Run) -> dict[Tensor, str]:
    """Return a run's parameters with their names, without the ones that are not to be trained."""
    return {parameter: name for name, parameter in run.model.named_parameters()}
