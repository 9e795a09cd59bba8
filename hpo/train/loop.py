"""The reference executor: it trains one run step by step, as plain PyTorch does.

A run that ends by one of its own rules is finished, and the loop ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hpo.data import Augmentation, MixedLabels, transfer
from hpo.train import devices, monitors, validation
from hpo.train.batches import cut
from hpo.train.epoch import EpochResult
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

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def put(self, run: Run) -> None:
        """Add a run; ValueError if there is one already."""
        if self.runs:
            raise ValueError("the loop trains one run at a time; remove the other run first")
        self.runs.append(run)
        run.note_executor(self.name)

    def remove(self, run: Run) -> None:
        """Remove the run."""
        self.runs.remove(run)

    def compact(self) -> None:
        """Do nothing, since there are no empty slots."""

    def train_epoch(self, stop: Callable[[], bool] = lambda: False) -> list[EpochResult]:
        """Train the run to the end of its epoch and return the result, or an empty list if `stop` ended it before."""
        return [result for run in self.runs for result in islice(train(run, stop), 1)]


def train(run: Run, stop: Callable[[], bool] = lambda: False) -> Iterator[EpochResult]:
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
        if not _train_epoch(run, stop):
            run.spend(time.perf_counter() - started)
            return
        yield _finish_epoch(run, started)


# --- an epoch's steps -----------------------------------------------------------------------------------------------------


def _train_epoch(run: Run, stop: Callable[[], bool]) -> bool:
    """Train the rest of one epoch; return False if `stop` ended it."""
    laid_out = run.layout  # before `enter_epoch`, since its test changes the modes of layers
    run.enter_epoch()
    if not run.batch:
        run.clear_sums()
    model, optimizer, targets, loss_sum = run.model, run.optimizer, run.splits.train.targets, run.loss_sum
    autocast = autocasting(run.device, run.precision)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
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
        for parameter in parameters:  # as optimizer.zero_grad(), without its profiling hooks
            parameter.grad = None
        x, y = next(fed), targets.index_select(0, batches[batch])
        for shown, target, mixture in _passes(run, parameters, _cut(run, x, y, augmentation, batch)):
            with autocast:
                loss = _mean_loss(run.loss, model(laid_out(shown)), target, mixture)
            if run.pieces > 1:
                loss = loss * (len(target) / run.batch_size)
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach()
        run.penalised.add_to_gradients(weights)
        if run.watch.gradients:
            run.monitor.take(loss_sum)
        _clip(run, parameters)
        optimizer.step()
        run.penalised.bound(units)
        if average is not None and taken is not None and average.takes_step(run.epoch + 1):
            average.take(taken)
    return True


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
