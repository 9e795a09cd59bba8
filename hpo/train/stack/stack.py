"""The executor that trains K runs of one architecture as one model, so that small models use the whole machine.

Each run has its own learning rate, weight decay, dropout, schedule, loss, penalties, averages, batches, randomness and
epochs. Its result does not depend on the other runs in the stack, nor on its row. Runs come and go between epochs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpo.data import Augmentation, transfer
from hpo.train import devices
from hpo.train.epoch import EpochResult
from hpo.train.inputs import Batch
from hpo.train.monitors import of_gradients
from hpo.train.optim.losses import own_kind
from hpo.train.optim.penalties import NONE
from hpo.train.run import Run
from hpo.train.stack.broadcast import Broadcast
from hpo.train.stack.dropout_masks import DropoutMasks
from hpo.train.stack.flat_parameters import FlatParameters, own_tensors
from hpo.train.stack.layers import Forward, Unstackable
from hpo.train.stack.row_averages import RowAverages
from hpo.train.stack.row_by_row import RowByRow
from hpo.train.stack.row_clipping import RowClipping
from hpo.train.stack.row_gradients import RowGradients
from hpo.train.stack.row_monitors import RowMonitors
from hpo.train.stack.row_penalties import RowPenalties
from hpo.train.stack.row_state import order_of, own_state
from hpo.train.stack.row_validation import RowValidation
from hpo.train.stack.steps import Steps

# The number of rows is a multiple of this. A convolution in one group uses another kernel than one in several groups,
# and a CPU takes two rows of 16 numbers at once.
ROWS = 2
STEPS: dict[str, Callable[[FlatParameters], Steps]] = {"cpu": RowByRow}  # by type of device; Broadcast for others


class Stack:
    """Trains up to `slots` runs together."""

    def __init__(
        self,
        forward: Forward,
        first: Run,
        slots: int,
        steps: Callable[[FlatParameters], Steps] | None = None,
        *,
        captures: bool = False,
    ) -> None:
        """Make an empty stack for runs like `first`; Unstackable if such runs cannot be stacked.

        Args:
            forward: the forward pass.
            first: a run, which is not changed.
            slots: most runs in the stack.
            steps: how optimizers are stepped; None: `RowByRow` on a CPU, `Broadcast` on other devices.
            captures: whether losses and gradients of a step are captured as a graph, where the device can.
        """
        self.name = forward.name
        self.slots = slots
        self._forward = forward
        self._steps_of = steps or STEPS.get(first.device.type, Broadcast)
        self._captures = captures
        self._shared = _shared(first)
        if first.alone:
            raise Unstackable(first.alone)
        self._trained = order_of(first.optimizer, _names(first))
        if not self._trained:
            raise Unstackable("no parameter is trained")
        if len({parameter.dtype for parameter in first.model.parameters()}) > 1:
            raise Unstackable("the model's parameters are of several number types")
        if first.accumulation > 1:
            raise Unstackable("batches are split into micro-batches")
        if first.computes_statistics:
            raise Unstackable("averaging swa computes batch norm's statistics anew for each model")
        self._lanes = getattr(forward, "lanes", 1) if first.device.type == "cpu" else 1
        self._make_room(first, _even(slots))
        unused = self._gradients.unused(first)
        if unused:  # torch's optimizers would skip it, a row's cannot
            raise Unstackable(f"the loss does not depend on {', '.join(unused)}")

    def _make_room(self, first: Run, slots: int) -> None:
        self._rows = FlatParameters(first.model, self._trained, slots)
        self._masks = DropoutMasks(slots, first.device, self._rows.values.dtype)
        self._places: list[Run | None] = [None] * slots
        self._steps = self._steps_of(self._rows)
        self._monitors = RowMonitors(self._rows, first.watch) if first.watch.gradients else None
        self._entered: set[Run] = set()  # runs whose sums lie in rows
        self._at_once = self._steps.at_once
        self._gradients = RowGradients(
            self._forward,
            self._rows,
            self._masks,
            self._lanes,
            first.precision,
            at_once=self._at_once,
            # A compacted stack is not captured: the graph was checked in the full size, and it soon shrinks again.
            captures=self._captures and slots >= self.slots,
        )
        self._validation = RowValidation(self._forward, self._masks, self._gradients.filling)
        self._clipping = RowClipping(self._rows, at_once=self._at_once)
        self._penalties = RowPenalties(self._rows, first.model, at_once=self._at_once)
        self._averages = RowAverages(self._rows, at_once=self._at_once)
        self._enter_for([None] * slots, first)

    @property
    def capture_failure(self) -> str | None:
        """Why the step could not be captured; None if it was, or is not to be."""
        return self._gradients.capture_failure

    @property
    def runs(self) -> list[Run]:
        """The runs in the stack, by row."""
        return [run for run in self._places if run is not None]

    def put(self, run: Run) -> None:
        """Add a run between epochs. Its tensors move into the stack.

        ValueError if the stack is full. Unstackable if the run differs from the others in what they must share.
        """
        if len(self.runs) == self.slots:
            raise ValueError(f"a stack of {self.slots} slots is full; remove a run first")
        others = [what for what, value in _shared(run).items() if value != self._shared[what]]
        if others:
            raise Unstackable(f"the run differs from those of the stack: {', '.join(others)}")
        if None not in self._places:
            self._move(self.runs, _even(self.slots))  # reopens the slots that `compact` closed
        row = self._places.index(None)
        names = _names(run)
        self._rows.adopt(row, run.model)
        self._steps.put(row, run.optimizer, names)
        self._masks.of(row, run)
        self._averages.put(row, run.average, run.model)
        self._places[row] = run
        run.note_executor(self.name)

    def remove(self, run: Run) -> None:
        """Remove a run and give it its own tensors."""
        row = self._places.index(run)
        self._places[row] = None
        self._steps.remove(row)
        self._averages.remove(row)
        own_tensors(run.model)
        own_state(run.optimizer)
        self._let_go(row, run)

    def compact(self) -> None:
        """Remove empty slots if no further run will come: an empty slot costs as much time as a full one."""
        runs = self.runs
        rows = _even(len(runs))
        if runs and rows < len(self._places):
            self._move(runs, rows)

    def _move(self, runs: Sequence[Run], slots: int) -> None:
        self._make_room(runs[0], slots)
        for run in runs:
            self.put(run)

    def train_epoch(self, stop: Callable[[], bool] = lambda: False) -> list[EpochResult]:
        """Train every run to the end of its epoch and return the results in the order of `runs`.

        The result is empty if `stop`, which is called before every batch, returned true. The runs then keep their place
        in the epoch. A run that was stopped within an epoch elsewhere waits until the others reach its batch.
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
        measured, watched = self._fetch_measured(runs[0])
        seconds = time.perf_counter() - started
        return [
            run.close_epoch(train_loss, loss, accuracy, seconds, more)
            for run, (train_loss, loss, accuracy), more in zip(self._places, measured, watched, strict=True)
            if run is not None
        ]

    # --- an epoch -----------------------------------------------------------------------------------------------------

    def _train(self, runs: Sequence[Run], stop: Callable[[], bool]) -> bool:
        commands = self._commands(runs[0])
        augmentation = self._augmentation(runs[0])
        first = min(run.batch for run in runs)
        waiting = {run: self._rows.snapshot(self._places.index(run)) for run in runs if run.batch > first}
        self._clear_sums()
        self._enter(waiting, first)
        fed = runs[0].inputs.feed(map(self._gradients.shown, commands[first:]))
        for batch in range(first, runs[0].steps_per_epoch):
            if stop():
                self._leave(runs, waiting, batch, has_stepped=batch > first)
                return False
            if any(run.batch == batch for run in waiting):
                self._let_in(waiting, batch)
            self._step(commands[batch], next(fed), augmentation, batch)
        return True

    def _clear_sums(self) -> None:
        """Clear all sums of the epoch at once. Runs that come from elsewhere still have their own."""
        self._gradients.sums.zero_()
        if self._monitors is not None:
            self._monitors.begin()
        for run in self.runs:
            if not run.batch and run not in self._entered:
                run.clear_sums()

    def _commands(self, some: Run) -> Tensor:
        """Return the rows of all batches [steps, K, B]. An empty slot gets those of another run."""
        orders = [(run or some).order().view(some.steps_per_epoch, some.batch_size) for run in self._places]
        return devices.sent(torch.stack(orders, 1), some.device)

    def _augmentation(self, some: Run) -> Augmentation | None:
        """Return the augmentation of all runs in this epoch; None if no run augments."""
        drawn = [None if run is None else run.drawn() for run in self._places]
        if not any(drawn):
            return None
        return Augmentation(drawn, some.batch_size, self._gradients.filling(some.batch_size), some.tone, some.device)

    def _enter(self, waiting: dict[Run, dict[str, Tensor]], batch: int) -> None:
        """Prepare the steps from this batch on for all runs except those that wait."""
        active = [run if run is not None and run not in waiting else None for run in self._places]
        self._enter_for(active, self.runs[0], batch)
        for row, run in enumerate(active):
            if run is not None and run not in self._entered:
                self._entered.add(run)
                run.keep_losses_in(self._gradients.sums[row])
                if self._monitors is not None:
                    self._monitors.enter(row, run)

    def _enter_for(self, active: list[Run | None], some: Run, batch: int = 0) -> None:
        """Prepare the next steps for these runs, by row. A row without a run computes another's loss and is not stepped."""
        self._active = active
        self._masks.draw_for(active)
        self._gradients.begin([(run or some).loss for run in active], some.splits.train.targets)
        self._penalties.begin([NONE if run is None else run.penalised for run in active])
        self._clipping.begin(active)
        rows = [row for row, run in enumerate(active) if run is not None]
        self._steps.begin(rows, partial(_set_rates, active), some.steps_per_epoch)
        self._averages.begin(rows, self._epochs(), some.steps_per_epoch - batch)

    def _let_in(self, waiting: dict[Run, dict[str, Tensor]], batch: int) -> None:
        for run in [run for run in waiting if run.batch == batch]:
            self._rows.restore(self._places.index(run), waiting.pop(run))
        self._enter(waiting, batch)

    def _leave(
        self, runs: Sequence[Run], waiting: dict[Run, dict[str, Tensor]], batch: int, *, has_stepped: bool
    ) -> None:
        if has_stepped:
            _set_rates(self._active, batch - 1)  # those of the last step, not of a later one
        for run in runs:
            row = self._places.index(run)
            if run in waiting:
                self._rows.restore(row, waiting[run])
            elif self._monitors is not None:
                self._monitors.leave(row, run)
            run.leave_epoch(max(run.batch, batch))
            self._let_go(row, run)

    def _let_go(self, row: int, run: Run) -> None:
        """Give a run its own sums of losses and monitors: the row's would grow while the run waits."""
        if run in self._entered:
            self._entered.remove(run)
            run.keep_losses_in(torch.zeros_like(self._gradients.sums[row]))
            if self._monitors is not None:
                self._monitors.let_go(run)

    def _step(self, batches: Tensor, inputs: Batch, augmentation: Augmentation | None, batch: int) -> None:
        self._gradients.take(batches, inputs, augmentation, batch)
        self._penalties.add_to_gradients()
        if self._monitors is not None:
            self._monitors.take(self._active, self._gradients.sums)
        self._clipping.take()
        self._steps.take(batch)
        self._penalties.bound()
        self._averages.take_step()

    def _epochs(self) -> dict[int, int]:
        """Return the current epoch of each run by row, from 1."""
        return {row: run.epoch + 1 for row, run in enumerate(self._places) if run is not None}

    @torch.no_grad()
    def _measure(self, outputs_too: list[Tensor] | None = None) -> Tensor:
        """Return training loss, validation loss and validation accuracy by row, float64 [K, 3] on the device.

        Args:
            outputs_too: gets the outputs [K, O, B] of each batch appended, if given.
        """
        some = self.runs[0]
        self._averages.take_epoch(self._epochs())
        parameters, buffers = self._averages.judged()
        judged = self._validation.measure(self._places, some, parameters, buffers, outputs_too)
        return torch.stack([self._gradients.sums / some.steps_per_epoch, *judged], dim=1)

    @torch.no_grad()
    def _fetch_measured(self, some: Run) -> tuple[list[list[float]], list[dict[str, float]]]:
        """Return by row what `_measure` returns, and what each run watches, after the one wait for the device in an epoch."""
        outputs: list[Tensor] | None = [] if some.watch.metrics else None
        found = [self._measure(outputs)]
        if outputs:
            found += some.validation_values(torch.cat(outputs, dim=2).transpose(1, 2))
        if self._monitors is not None:
            found.append(self._monitors.measured())
        measured, *further = transfer.fetched(found)
        watched: list[dict[str, float]] = [{} for _ in self._places]
        sums = further.pop().tolist() if self._monitors is not None else None
        for row, run in enumerate(self._places):
            if run is not None and further:
                of_rows, targets = further
                watched[row] |= run.further_metrics(of_rows[row], targets)
            if run is not None and sums is not None:
                *of_run, norm = sums[row]
                size = {"steps": run.steps_per_epoch, "batch_size": run.batch_size}
                watched[row] |= of_gradients(run.watch, of_run, norm, **size)
        return measured.tolist(), watched


def _set_rates(runs: Sequence[Run | None], batch: int) -> None:
    for run in runs:
        if run is not None:
            run.set_rate(batch)


def _even(slots: int) -> int:
    """Return the number of rows for this number of slots."""
    return -(-slots // ROWS) * ROWS


def _names(run: Run) -> dict[Tensor, str]:
    """Return the names of a run's parameters."""
    return {parameter: name for name, parameter in run.model.named_parameters()}


def _shared(run: Run) -> dict[str, Any]:
    """Return what all runs of a stack must share, by a name for messages."""
    names = _names(run)
    return {
        "shapes of parameters": {name: parameter.shape for parameter, name in names.items()},
        "trained parameters": set(order_of(run.optimizer, names)),
        "batch size": run.batch_size,
        "batches in an epoch": run.steps_per_epoch,
        "precision": run.precision,
        "micro-batches": run.accumulation,
        "loss": own_kind(run.loss),
        "batch norm": run.computes_statistics,
        "reason against a stack": run.alone,
        "watched values": run.watch,
    }
