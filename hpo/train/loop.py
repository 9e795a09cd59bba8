"""The reference executor: it trains one run step by step, as plain PyTorch does.

A run that ends by one of its own rules is finished, and the loop ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hpo.data import Augmentation, MixedLabels, transfer
from hpo.models import use_generator
from hpo.train import devices, monitors, validation
from hpo.train.batches import cut
from hpo.train.epoch import EpochResult
from hpo.train.graphs import CapturedStep, FixedMasks, can_capture
from hpo.train.inputs import Batch
from hpo.train.optim import losses, sam
from hpo.train.optim.losses import Loss
from hpo.train.optim.optimizers import load_compiler
from hpo.train.precision import autocasting
from hpo.train.run import Run

Piece = tuple[Batch, Tensor, MixedLabels | None]  # a micro-batch: inputs, targets, and mixed labels of mixed images


class Loop:
    """The reference executor, which trains one run at a time."""

    name = "loop"
    slots = 1

    def __init__(self, *, captures: bool = False) -> None:
        """Make an empty loop.

        Args:
            captures: whether loss and gradients of a step are captured as a graph, where device and run can.
        """
        self.runs: list[Run] = []
        self._captures = captures
        self._captured: CapturedGradients | None = None

    def put(self, run: Run) -> None:
        """Add a run; ValueError if there is one already."""
        if self.runs:
            raise ValueError("the loop trains one run at a time; remove the other run first")
        self.runs.append(run)
        run.note_executor(self.name)
        if self._captures and CapturedGradients.fits(run):
            self._captured = CapturedGradients(run)

    def remove(self, run: Run) -> None:
        """Remove the run."""
        self.runs.remove(run)
        self._captured = None

    @property
    def capture_failure(self) -> str | None:
        """Why the step could not be captured; None if it was, or is not to be."""
        return None if self._captured is None else self._captured.failure

    def compact(self) -> None:
        """Do nothing, since there are no empty slots."""

    def train_epoch(self, stop: Callable[[], bool] = lambda: False) -> list[EpochResult]:
        """Train the run to the end of its epoch and return the result, or an empty list if `stop` ended it before."""
        return [result for run in self.runs for result in islice(train(run, stop, self._captured), 1)]


def train(
    run: Run, stop: Callable[[], bool] = lambda: False, captured: CapturedGradients | None = None
) -> Iterator[EpochResult]:
    """Train a run and yield one result per epoch, until the run is finished or `stop` returns true.

    `stop` is called before every batch. A stop leaves the epoch unfinished and yields no result for it. Another call of
    `train` continues with the next batch. At the start of an epoch the batch order, the dropout masks and torch's
    global generators, from which users' models may draw, are seeded anew. So an epoch depends only on the state that it
    starts from.
    """
    run.note_executor(Loop.name)
    load_compiler()
    while not run.finished:
        started = time.perf_counter()
        if not _train_epoch(run, stop, captured):
            run.spend(time.perf_counter() - started)
            return
        yield _finish_epoch(run, started)


# --- an epoch's steps -----------------------------------------------------------------------------------------------------


def _train_epoch(run: Run, stop: Callable[[], bool], captured: CapturedGradients | None) -> bool:
    """Train the rest of one epoch; return False if `stop` ended it."""
    laid_out = run.layout  # before `enter_epoch`, since its test changes the modes of layers
    run.enter_epoch()
    if not run.batch:
        run.clear_sums()
    model, optimizer, targets, loss_sum = run.model, run.optimizer, run.splits.train.targets, run.loss_sum
    parameters = trained(run)
    weights, units = run.penalised.targets(model, parameters)
    average = run.average
    taken = None if average is None else average.pairs(model)
    batches = torch.split(devices.sent(run.order(), run.device), run.batch_size)
    fed = run.inputs.feed(batches[run.batch :])
    augmentation = _augmentation(run)
    for batch in range(run.batch, run.steps_per_epoch):
        if stop():
            run.leave_epoch(batch)
            return False
        run.begin_step(batch)
        x, y = next(fed), targets.index_select(0, batches[batch])
        if captured is not None and augmentation is None:
            captured.take(x, y)
        else:
            clear_gradients(parameters)
            for shown, target, mixture in _passes(run, parameters, _cut(run, x, y, augmentation, batch)):
                add_gradients(run, laid_out(shown), target, mixture)
        run.penalised.add_to_gradients(weights)
        if run.watch.gradients:
            run.monitor.take(loss_sum)
        _clip(run, parameters)
        optimizer.step()
        run.penalised.bound(units)
        if average is not None and taken is not None and average.takes_step(run.epoch + 1):
            average.take(taken)
    return True


def trained(run: Run) -> list[Tensor]:
    """Return the parameters that a run's optimizer owns."""
    return [p for group in run.optimizer.param_groups for p in group["params"]]


def clear_gradients(parameters: Iterable[Tensor]) -> None:
    """Do as optimizer.zero_grad(), without its profiling hooks."""
    for parameter in parameters:
        parameter.grad = None


def add_gradients(run: Run, shown: Batch, target: Tensor, mixture: MixedLabels | None) -> None:
    """Add a micro-batch's gradients to those of the parameters, and its loss to the run's sum."""
    with autocasting(run.device, run.precision):
        loss = _mean_loss(run.loss, run.model(shown), target, mixture)
    if run.pieces > 1:
        loss = loss * (len(target) / run.batch_size)
    loss.backward(_one(loss.dtype, loss.device))  # type: ignore[no-untyped-call]
    run.loss_sum.add_(loss.detach())


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the gradient of a loss to itself, which torch would make anew in each step."""
    return torch.ones((), dtype=dtype, device=device)


class CapturedGradients:
    """Loss and gradients of a run's step, captured as a graph. The optimizer's step is not in it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._parameters = trained(run)
        assert run.randomness.masks is not None
        self._fixed = FixedMasks(run.randomness.masks.factors)
        self._step = CapturedStep(run.device, self._fixed)
        self._are_trained: list[bool] = []

    @staticmethod
    def fits(run: Run) -> bool:
        """Return whether a run's step may be captured: it takes each batch once, and its masks are counted."""
        return can_capture(run.device) and run.pieces == 1 and not run.sam_rho and run.randomness.masks is not None

    @property
    def failure(self) -> str | None:
        """Why the step could not be captured; None if it was, or was not tried yet."""
        return self._step.failure

    def take(self, x: Batch, y: Tensor) -> None:
        """Compute loss and gradients of a batch."""
        are_trained = [parameter.requires_grad for parameter in self._parameters]
        if are_trained != self._are_trained:  # layers are unfrozen between epochs
            self._are_trained = are_trained
            self._step.forget()
        self._step.take(self._compute, self._changed, x, y)

    def _compute(self, x: Batch, y: Tensor) -> None:
        run = self._run
        use_generator(run.model, run.randomness.dropout, self._fixed)
        try:
            clear_gradients(self._parameters)
            add_gradients(run, run.layout(x), y, None)
        finally:
            use_generator(run.model, run.randomness.dropout, run.randomness.masks)

    def _changed(self) -> list[Tensor]:
        return [*self._run.model.buffers(), self._run.loss_sum]


def _augmentation(run: Run) -> Augmentation | None:
    drawn = run.drawn()
    return None if drawn is None else Augmentation([drawn], run.batch_size, 0, run.tone, run.device)


def _cut(run: Run, x: Batch, y: Tensor, augmentation: Augmentation | None, batch: int) -> Iterable[Piece]:
    """Return the augmented micro-batches of a batch."""
    mixed = None
    if augmentation is not None and isinstance(x, Tensor):
        x, mixed = augmentation.images(x, batch), augmentation.labels(y, batch)
    mixtures = [None] * run.pieces if mixed is None else mixed.pieces(run.pieces)
    return zip(_pieces(x, run.pieces), cut(y, run.pieces), mixtures, strict=True)


def _pieces(x: Batch, count: int) -> Sequence[Batch]:
    if not isinstance(x, dict):
        return cut(x, count)
    columns = [cut(part, count) for part in x.values()]
    return [dict(zip(x, parts, strict=True)) for parts in zip(*columns, strict=True)]


def _passes(run: Run, parameters: Sequence[Tensor], batch: Iterable[Piece]) -> Iterable[Piece]:
    """Return the micro-batches for a batch's gradient: each once, or twice for sharpness-aware minimisation."""
    if not run.sam_rho:
        return batch
    return sam.passes(list(batch), run.model, parameters, run.sam_rho, run.randomness, run.loss_sum)


def _mean_loss(loss_of: Loss, outputs: Tensor, targets: Tensor, mixed: MixedLabels | None) -> Tensor:
    """Return the mean loss of rows. Mixed images have a weighted loss of both labels."""
    if mixed is None:
        return losses.reduced(loss_of, outputs, targets, "mean")
    return mixed.losses(lambda labels: loss_of(outputs, labels)).mean()


def _clip(run: Run, parameters: list[Tensor]) -> None:
    if run.clip_value is not None:
        nn.utils.clip_grad_value_(parameters, run.clip_value)
    if run.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, run.clip_norm)


# --- an epoch's end -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _finish_epoch(run: Run, started: float) -> EpochResult:
    outputs: list[Tensor] | None = [] if run.watch.metrics else None
    validated = _validate(run, outputs)
    found = [torch.stack([run.loss_sum / run.steps_per_epoch, *validated])]
    if outputs:
        found += run.validation_values(torch.cat(outputs))
    if run.watch.gradients:
        found.append(torch.cat([run.monitor.sums, run.monitor.parameter_norm()[None]]))
    measured, *further = transfer.fetched(found)  # the one wait for the device in an epoch
    train_loss, loss, accuracy = measured.tolist()
    watched = _watched(run, further)
    return run.close_epoch(train_loss, loss, accuracy, time.perf_counter() - started, watched)


def _validate(run: Run, outputs_too: list[Tensor] | None) -> Tensor:
    """Return loss and accuracy [2] of the validation split, with the average of weights if there is one."""
    average = run.average
    if average is None:
        return _judge(run, outputs_too)
    if average.takes_epoch(run.epoch + 1):
        average.take(average.pairs(run.model))
    with average.shown_in(run.model):
        if average.norms_anew and average.count:
            with autocasting(run.device, run.precision):
                average.compute_statistics(run.model, plain_batches(run))
        return _judge(run, outputs_too)


def _judge(run: Run, outputs_too: list[Tensor] | None) -> Tensor:
    how = (run.precision, validation.batch_size(run.accumulation), run.layout, run.judging_loss)
    return validation.measure(run.model, run.validation_inputs, run.splits.validation.targets, *how, outputs_too)


def plain_batches(run: Run) -> Iterator[Any]:
    """Return the inputs of the epoch's micro-batches without augmentation."""
    batches = torch.split(devices.sent(run.order(), run.device), run.batch_size)
    return map(run.layout, run.inputs.feed(rows for batch in batches for rows in cut(batch, run.pieces)))


def _watched(run: Run, fetched: Sequence[Tensor]) -> dict[str, float]:
    """Return what the run watches, from tensors on the CPU: outputs and targets, then sums of its monitor, as far as watched."""
    found: dict[str, float] = {}
    if run.watch.metrics:
        outputs, targets = fetched[:2]
        found = run.further_metrics(outputs, targets)
    if run.watch.gradients:
        *sums, norm = fetched[-1].tolist()
        size = {"steps": run.steps_per_epoch, "batch_size": run.batch_size}
        found |= monitors.of_gradients(run.watch, sums, norm, **size)
    return found
