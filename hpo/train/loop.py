"""The reference executor: one trial, one model, a generator that yields one result per epoch.

What it owns: batch order, randomness, precision, where a trial may stop and how it goes on bit for bit. What
it leaves to the caller's `for` body: pruning, reports, checkpoints, and what to do about a loss that is not
finite. Where a run ends by a rule of its own it says so itself: then it is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data import Augmentation, Drawn, MixedLabels, Split, Splits, Strength, Tone, draw
from hpo.config import Stopping
from hpo.metrics import column
from hpo.seeds import derive
from hpo.train import averaging as averagings
from hpo.train import losses, measures, optim, penalties, sharpness, stopping, watching
from hpo.train import schedule as schedules
from hpo.train.averaging import Average, Averaging
from hpo.train.losses import Loss
from hpo.train.penalties import Penalties
from hpo.train.pixels import Layout, Pixels, as_they_lie, channels_last, pixels
from hpo.train.schedule import Schedule
from hpo.train.watching import Gauge, Watch
from models import adopt_dropout, freezing, use_generator

Precision = Literal["float32", "bfloat16"]
Piece = tuple[Tensor, Tensor, MixedLabels | None]  # a micro-batch: images, labels, and with whose labels they are mixed

AS_THEY_ARE = Strength()
NOTHING_MORE = Watch()
EVALUATION_BATCH = 1024  # images; bounds the memory that activations take, and no longer matters for speed
LOSS_AND_ACCURACY = ("loss", "accuracy")
SMALLEST_PIECE = 2  # images in a micro-batch; batch norm fails on one


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What one epoch of training brought; losses are means of the run's own loss, not finite if training diverged."""

    epoch: int  # epochs finished, from 1
    train_loss: float  # mean over the epoch's steps, each before its update
    validation_loss: float  # without label smoothing
    validation_accuracy: float  # share of images, 0..1
    learning_rate: float  # of the epoch's last step, first parameter group
    seconds: float  # training and validation
    watched: Mapping[str, float] = field(default_factory=dict)  # what else was asked for, by the ledger's names

    def judged(self, metric: str) -> float:
        """Return the validation part's value of the metric that a study judges by; KeyError if it was not measured."""
        return self.numbers[column(metric)]

    @property
    def numbers(self) -> dict[str, float]:
        """Everything measured, by the names that the ledger has for it."""
        plain = {key: float(value) for key, value in vars(self).items() if key not in ("epoch", "watched")}
        return plain | dict(self.watched)


def initial_model(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model on the CPU from weights that depend on the seed alone, with our dropout in place of
    torch's.

    The same weights come out whatever the device is moved to later, and torch's global generator is left as
    it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(derive(seed, "init"))
        return adopt_dropout(build())


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return how many optimizer steps one epoch over so many training images has.

    A last short batch is dropped: batch norm fails on a batch of one image, and trials in a stack need
    batches of one size. The order differs every epoch, so no image is left out for good. A part smaller than
    one batch is one batch.
    """
    return max(1, images // batch_size)


def _evaluation_batch(accumulation: int) -> int:
    return max(1, EVALUATION_BATCH // accumulation)


def can_halve(batch_size: int, accumulation: int) -> bool:
    """Return whether a run may take its batches in twice as many micro-batches: each keeps at least 2 images."""
    return batch_size // (2 * accumulation) >= SMALLEST_PIECE


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    mean: Tensor,
    std: Tensor,
    precision: Precision = "float32",
    accumulation: int = 1,
    loss: Loss = losses.CROSS_ENTROPY,
) -> tuple[float, float]:
    """Return mean loss and accuracy over one part, in batches as small as a run's with this accumulation; the model is
    left in eval mode.
    """
    found = assess(model, split, mean=mean, std=std, precision=precision, accumulation=accumulation, loss=loss)
    return found["loss"], found["accuracy"]


@torch.no_grad()
def assess(
    model: nn.Module,
    split: Split,
    *,
    mean: Tensor,
    std: Tensor,
    precision: Precision = "float32",
    accumulation: int = 1,
    loss: Loss = losses.CROSS_ENTROPY,
    metrics: Sequence[str] = (),
) -> dict[str, float]:
    """Return loss, accuracy and further metrics by name, as `evaluate` does."""
    images = pixels(split.images, mean, std, number_type(model))
    logits: list[Tensor] | None = [] if metrics else None
    size, laid_out = _evaluation_batch(accumulation), layout_of(model, images)
    totals = _evaluate(model, images, split.labels, precision, size, laid_out, loss, logits)
    found = dict(zip(LOSS_AND_ACCURACY, totals.tolist(), strict=True))
    return found | (measures.compute(metrics, torch.cat(logits), split.labels) if logits else {})


class Run:
    """One trial in training; between epochs, or where `stop` ended it, its state can be saved and taken up
    elsewhere.

    Images and labels stay on their device as the splits hold them. `optimizer` comes fresh: its learning
    rates are the ones that the schedule multiplies. Every random draw is keyed by (seed, purpose, epoch); see
    `train`.

    Training images are augmented as `augment` says, with draws keyed by (seed, purpose, epoch) as well.

    A gradient longer than `clip_norm` (2-norm over all parameters) is shortened to it (Pascanu et al. 2013), and
    its elements are kept within `clip_value` of 0; None leaves it as it is.

    Training minimises the mean of `loss` over the images of a batch and what `penalised` adds to it. Validation judges the
    average of the weights that `averaging` makes, by the loss without label smoothing.

    With `sam_rho` above 0, each step's gradient is taken that far uphill, see `sharpness.py`; micro-batches climb together, and
    penalties add to the gradient as ever.

    `accumulation` says in how many micro-batches each batch is taken, near-equal and in order; their
    gradients add up to those of the whole batch, and there is one step a batch as ever. Validation takes
    fewer images at once by the same factor. What differs from whole batches, beyond rounding: batch norm
    normalises, and moves its running statistics, by micro-batches, and dropout masks are drawn for each. A
    training part smaller than a batch is taken in fewer, so that none has one image. It belongs to the
    configuration that a saved state asks for.

    `stopping` ends the run before its last epoch; `watch` says what is measured beside losses and accuracy.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        splits: Splits,
        epochs: int,
        batch_size: int,
        seed: int,
        precision: Precision = "float32",
        accumulation: int = 1,
        augment: Strength = AS_THEY_ARE,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        loss: Loss = losses.CROSS_ENTROPY,
        penalised: Penalties = penalties.NONE,
        averaging: Averaging = averagings.NONE,
        sam_rho: float = 0.0,
        stopping: Stopping | None = None,
        watch: Watch = NOTHING_MORE,
    ) -> None:
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs = {epochs}, batch_size = {batch_size}; both must be at least 1")
        if accumulation < 1 or (accumulation > 1 and batch_size // accumulation < SMALLEST_PIECE):
            raise ValueError(
                f"accumulation = {accumulation} with batch_size = {batch_size}; a micro-batch needs at least "
                f"{SMALLEST_PIECE} images: give from 1 to {max(1, batch_size // SMALLEST_PIECE)}"
            )
        device = splits.train.images.device
        strangers = {p.device for p in model.parameters()} - {device}
        if strangers:
            raise ValueError(
                f"the model is on {strangers.pop()}, the images on {device}; move the model before the run"
            )
        self.model = model
        self.optimizer = optimizer
        self.epochs = epochs
        self.epoch = 0  # epochs finished
        self.steps_per_epoch = steps_per_epoch(len(splits.train.labels), batch_size)
        self.batch = 0  # batches finished in the epoch under way
        self.batch_size = min(batch_size, len(splits.train.labels))
        self.seed = seed
        self.precision: Precision = precision
        self.device = device
        self.splits = splits
        self.dropout = torch.Generator(device)  # of this run's masks
        self.augment = augment
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.loss = loss
        self.judging_loss = losses.judging(loss)
        self.penalised = penalised
        self.average = Average(averaging, model, epochs) if averaging.every else None
        self.sam_rho = sam_rho
        self.validation_losses: list[float] = []  # of the epochs finished
        self.accumulation = accumulation
        self.executors: list[str] = []  # that have trained it, in order
        self.stopping = stopping
        self.stopped_by: str | None = None  # why it ended before its last epoch, by a rule of its own
        self.curves: dict[str, list[float]] = {}  # what those rules look at, raw, by epoch
        self.watch = watch
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        self.gauge = Gauge(watch, {name: p for name, p in model.named_parameters() if p in owned}, device)
        self._schedule = schedule
        self._schedule_now = schedule  # as it is for the epoch under way
        self._base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._pieces = min(accumulation, max(1, self.batch_size // SMALLEST_PIECE))
        self._evaluation_batch = _evaluation_batch(accumulation)
        self._labels = splits.train.labels
        use_generator(model, self.dropout)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._seconds = 0.0  # spent on the epoch under way before it was stopped
        self._random: dict[str, Tensor] = {}  # generators where the epoch was stopped; empty between epochs
        self._in_step = False

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained, or one of its own rules has ended it."""
        return self.epoch >= self.epochs or self.stopped_by is not None

    @property
    def alone(self) -> str | None:
        """Why the run cannot be trained as one model with others, if that is so."""
        if self.sam_rho:
            return "sharpness-aware minimisation takes each batch twice"
        return optim.ALONE.get(type(self.optimizer).__name__) or freezing.why_alone(self.model)

    @property
    def images(self) -> Pixels:
        """The training images, in the number type of the parameters."""
        splits = self.splits
        return pixels(splits.train.images, splits.mean, splits.std, number_type(self.model))

    @property
    def tone(self) -> Tone:
        """What the normalised training images stand for."""
        return Tone(self.splits.mean, self.splits.std, self.splits.white)

    @property
    def validation_images(self) -> Pixels:
        """The validation images, likewise."""
        splits = self.splits
        return pixels(splits.validation.images, splits.mean, splits.std, number_type(self.model))

    @cached_property
    def _layout(self) -> Layout:
        return layout_of(self.model, self.images)

    def train(self, stop: Callable[[], bool] = lambda: False) -> Iterator[EpochResult]:
        """Train on, one result per epoch, until the last epoch or until `stop`, asked before every batch,
        says so.

        A stop leaves the epoch unfinished and yields nothing for it; calling `train` again goes on with the
        next batch. At each epoch's start the batch order, the dropout masks and torch's global generators
        (for models of users that draw from them) are seeded anew, so that an epoch depends on the weights it
        starts from and on nothing before.
        """
        self.note_executor("loop")
        while not self.finished:
            started = time.perf_counter()
            if not self._train_epoch(stop):
                self.spend(time.perf_counter() - started)
                return
            yield self._finish_epoch(started)

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to go on bit for bit, made of tensors and plain values.

        The tensors are the run's own: save or copy them before training on. RuntimeError if an epoch was left
        by an exception or is under way, since its position is then unknown.
        """
        if self._in_step:
            raise RuntimeError(
                f"the state was asked for amid epoch {self.epoch + 1}; "
                "ask between results, or let `stop` end the training"
            )
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self._seconds,
            "loss_sum": self._loss_sum,
            "random": dict(self._random),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "executors": list(self.executors),
            "validation_losses": list(self.validation_losses),
            **({"curves": {name: list(curve) for name, curve in self.curves.items()}} if self.stopping else {}),
            **({"gauge": self.gauge.state_dict()} if self.watch.gradients and self.batch else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that a run of the same configuration left; the state itself is not written to later."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(_own(state["optimizer"]))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self._seconds = state["seconds"]
        self._loss_sum.copy_(state["loss_sum"])
        self._random = dict(state["random"])
        self.executors = list(state.get("executors", ["loop"]))
        self.validation_losses = list(state.get("validation_losses", []))
        self._in_step = False
        self.curves = {name: list(curve) for name, curve in state.get("curves", {}).items()}
        self._look_whether_to_stop()
        if self.watch.gradients and "gauge" in state:
            self.gauge.load_state_dict(state["gauge"])

    @property
    def computes_statistics(self) -> bool:
        """Whether its averages need batch norm's statistics computed anew."""
        return self.average is not None and self.average.norms_anew

    def judged_weights(self) -> dict[str, Tensor]:
        """Return the model's state dict as validation judges it: with averages of weights, where there are any."""
        return averagings.judged_weights(self.model, self.average)

    # --- what an executor calls, in this order ----------------------------------------------------------------------

    def note_executor(self, name: str) -> None:
        """Take note of who trains the run from here on."""
        if self.executors[-1:] != [name]:
            self.executors.append(name)

    def enter_epoch(self) -> None:
        """Begin the next epoch, or go on amid it where the run was stopped: position, randomness, train mode."""
        if self.batch:
            self._restore_generators()
        else:
            self._seed_generators()
            self._loss_sum.zero_()
            self.gauge.begin()
        self._schedule_now = schedules.after(self._schedule, self.validation_losses)
        self.model.train()
        freezing.enter_epoch(self.model, self.epoch)
        self._in_step = True

    def order(self) -> Tensor:
        """Return the rows of the epoch's batches [steps * batch size], drawn on the CPU, the same on every device."""
        generator = torch.Generator().manual_seed(derive(self.seed, "order", self.epoch))
        order = torch.randperm(len(self._labels), generator=generator).to(self.device)
        return order[: self.steps_per_epoch * self.batch_size]

    def drawn(self) -> Drawn | None:
        """Return what becomes of the epoch's images, in the order of `order`; None if they are shown as they are."""

        def random(purpose: str) -> torch.Generator:
            return torch.Generator().manual_seed(derive(self.seed, purpose, self.epoch))

        height, width = self.splits.train.images.shape[2:]
        return draw(self.augment, self.steps_per_epoch, self.batch_size, (height, width), random)

    def set_rate(self, batch: int) -> None:
        """Set learning rate and momentum for a batch of the epoch."""
        schedules.apply(self.optimizer, self._base_lrs, self._schedule_now(self.epoch * self.steps_per_epoch + batch))

    def keep_losses_in(self, place: Tensor) -> None:
        """Let the epoch's sum of losses, float64 without dimensions, be in this place from now on."""
        place.copy_(self._loss_sum)
        self._loss_sum = place

    def spend(self, seconds: float) -> None:
        """Count time on the epoch under way, which is stopped."""
        self._seconds += seconds

    def leave_epoch(self, batch: int) -> None:
        """Stop amid the epoch, before this batch."""
        self.batch = batch
        self._random = self._generator_states() if batch else {}
        self._in_step = False

    def close_epoch(
        self,
        train_loss: float,
        validation_loss: float,
        accuracy: float,
        seconds: float,
        watched: Mapping[str, float] | None = None,
    ) -> EpochResult:
        """Finish the epoch with what was measured and return its result."""
        seconds += self._seconds
        watched = dict(watched or {})
        if self.watch.resources:
            watched |= watching.of_resources(self.device, self.steps_per_epoch * self.batch_size, seconds)
        self.epoch += 1
        self.validation_losses.append(validation_loss)
        self.batch, self._seconds, self._random, self._in_step = 0, 0.0, {}, False
        self.gauge.before = {}
        result = EpochResult(
            epoch=self.epoch,
            train_loss=train_loss,
            validation_loss=validation_loss,
            validation_accuracy=accuracy,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            seconds=seconds,
            watched=watched,
        )
        if self.stopping:
            for name in stopping.columns(self.stopping):
                self.curves.setdefault(name, []).append(result.numbers[name])
            self._look_whether_to_stop()
        return result

    def further_metrics(self, logits: Tensor) -> dict[str, float]:
        """Return what is asked for of the validation part beside loss and accuracy, from its logits [N, classes]."""
        found = measures.compute(self.watch.metrics, logits, self.splits.validation.labels)
        return {column(name): value for name, value in found.items()}

    def _look_whether_to_stop(self) -> None:
        is_early = self.stopping is not None and 0 < self.epoch < self.epochs and bool(self.curves)
        self.stopped_by = stopping.verdict(self.stopping, self.curves) if self.stopping and is_early else None

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _train_epoch(self, stop: Callable[[], bool]) -> bool:
        """Train the rest of one epoch; False if `stop` ended it."""
        laid_out = self._layout  # first, as trying it takes layers out of the mode that `enter_epoch` leaves them in
        self.enter_epoch()
        model, optimizer, images, labels = self.model, self.optimizer, self.images, self._labels
        loss_sum, autocast = self._loss_sum, autocasting(self.device, self.precision)
        loss_of, average, penalised = self.loss, self.average, self.penalised
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        weights = penalties.weights_of(model, parameters)
        units = [(weights[name], dimension) for name, dimension in penalties.units_of(model, parameters).items()]
        taken = None if average is None else average.pairs(model)
        whole, pieces = self.batch_size, self._pieces
        batches = torch.split(self.order(), whole)
        fed = images.feed(batches[self.batch :])
        augmentation = self._augmentation()
        for batch in range(self.batch, self.steps_per_epoch):
            if stop():
                self.leave_epoch(batch)
                return False
            self.set_rate(batch)
            for parameter in parameters:  # optimizer.zero_grad() without its profiling hooks
                parameter.grad = None
            x, y = next(fed), labels.index_select(0, batches[batch])
            mixed = None
            if augmentation is not None:
                x, mixed = augmentation.images(x, batch), augmentation.labels(y, batch)
            mixtures = [None] * pieces if mixed is None else mixed.pieces(pieces)
            cut = zip(_pieces(x, pieces), _pieces(y, pieces), mixtures, strict=True)
            for shown, label, mixture in self._passes(cut):
                with autocast:
                    loss = _mean_loss(loss_of, model(laid_out(shown)), label, mixture)
                if pieces > 1:
                    loss = loss * (len(label) / whole)
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += loss.detach()
            penalised.add_to_gradients(weights.values())
            if self.watch.gradients:
                self.gauge.take(loss_sum)
            self._clip(parameters)
            optimizer.step()
            penalised.bound(units)
            if average is not None and taken is not None and average.takes_step(self.epoch + 1):
                average.take(taken)
        return True

    def _passes(self, batch: Iterable[Piece]) -> Iterable[Piece]:
        """Return the micro-batches that give a batch its gradient: all of them twice under sharpness-aware minimisation."""
        if not self.sam_rho:
            return batch
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return sharpness.passes(list(batch), self.model, parameters, self.sam_rho, self.dropout, self._loss_sum)

    def _augmentation(self) -> Augmentation | None:
        drawn = self.drawn()
        return None if drawn is None else Augmentation([drawn], self.batch_size, 0, self.tone, self.device)

    def _clip(self, parameters: list[Tensor]) -> None:
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    @torch.no_grad()
    def _finish_epoch(self, started: float) -> EpochResult:
        logits: list[Tensor] | None = [] if self.watch.metrics else None
        validation = self._validate(logits)
        measured = torch.stack([self._loss_sum / self.steps_per_epoch, *validation])
        train_loss, loss, accuracy = measured.tolist()  # the one wait for the device in an epoch
        watched = self._watched(torch.cat(logits)) if logits else self._watched()
        return self.close_epoch(train_loss, loss, accuracy, time.perf_counter() - started, watched)

    def _watched(self, logits: Tensor | None = None) -> dict[str, float]:
        found = {} if logits is None else self.further_metrics(logits)
        if not self.watch.gradients:
            return found
        *sums, norm = torch.cat([self.gauge.sums, self.gauge.parameter_norm()[None]]).tolist()
        return found | watching.of_gradients(
            self.watch, sums, norm, steps=self.steps_per_epoch, batch_size=self.batch_size
        )

    def _validate(self, logits_too: list[Tensor] | None) -> Tensor:
        average = self.average
        if average is None:
            return self._judge(logits_too)
        if average.takes_epoch(self.epoch + 1):
            average.take(average.pairs(self.model))
        with average.shown_in(self.model):
            if average.norms_anew and average.count:
                with autocasting(self.device, self.precision):
                    average.compute_statistics(self.model, self._plain_batches())
            return self._judge(logits_too)

    def _judge(self, logits_too: list[Tensor] | None) -> Tensor:
        images, labels, batch = self.validation_images, self.splits.validation.labels, self._evaluation_batch
        how = (self.precision, batch, self._layout, self.judging_loss)
        return _evaluate(self.model, images, labels, *how, logits_too)

    def _plain_batches(self) -> Iterator[Tensor]:
        """Return the images of the epoch's batches as they are, each batch in its micro-batches."""
        batches = torch.split(self.order(), self.batch_size)
        return map(self._layout, self.images.feed(rows for batch in batches for rows in _pieces(batch, self._pieces)))

    def _seed_generators(self) -> None:
        self.dropout.manual_seed(derive(self.seed, "dropout", self.epoch))
        seed = derive(self.seed, "global", self.epoch)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def _generator_states(self) -> dict[str, Tensor]:
        states = {"dropout": self.dropout.get_state(), "global": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _restore_generators(self) -> None:
        self.dropout.set_state(self._random["dropout"])
        torch.set_rng_state(self._random["global"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._random["cuda"], self.device)


def _pieces(batch: Tensor, pieces: int) -> tuple[Tensor, ...]:
    return torch.tensor_split(batch, pieces) if pieces > 1 else (batch,)


def _mean_loss(loss_of: Loss, logits: Tensor, labels: Tensor, mixed: MixedLabels | None) -> Tensor:
    """Return the mean loss of images, of those that are mixed by both of their labels."""
    if mixed is None:
        return losses.reduced(loss_of, logits, labels, "mean")
    return mixed.losses(lambda labels: loss_of(logits, labels)).mean()


class Loop:
    """The executor that trains one run at a time: the reference."""

    name = "loop"
    slots = 1

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def put(self, run: Run) -> None:
        """Take up a run; ValueError if there is one already."""
        if self.runs:
            raise ValueError("the loop trains one run at a time; wait until it has ended")
        self.runs.append(run)
        run.note_executor(self.name)

    def remove(self, run: Run) -> None:
        """Let the run go."""
        self.runs.remove(run)

    def compact(self) -> None:
        """Do nothing: there are no empty slots to close."""

    def train_epoch(self, stop: Callable[[], bool] = lambda: False) -> list[EpochResult]:
        """Train the run to the end of its epoch and return the result, none if `stop` ended that amid it."""
        return [result for run in self.runs for result in islice(run.train(stop), 1)]


def _own(value: Any) -> Any:
    """Return a state with tensors of its own, each its own: torch would share them, and steps of one count would be
    counted once for each parameter.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _own(child) for key, child in value.items()}
    return [_own(child) for child in value] if isinstance(value, list) else value


def _evaluate(
    model: nn.Module,
    images: Pixels,
    labels: Tensor,
    precision: Precision,
    batch: int,
    laid_out: Layout,
    loss_of: Loss,
    logits_too: list[Tensor] | None = None,
) -> Tensor:
    """Return mean loss and accuracy as a float64 tensor [2] on the device; call under `no_grad`.

    Args:
        logits_too: takes each batch's logits [B, classes], if it is given.

    Not under `inference_mode`: tensors that a user's model caches there could never be trained through again.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=labels.device)
    for x, y in zip(images.split(batch), torch.split(labels, batch), strict=True):
        with autocasting(y.device, precision):
            logits = model(laid_out(x))
            loss = losses.reduced(loss_of, logits, y, "sum")
        totals += torch.stack([loss.double(), (logits.argmax(1) == y).sum().double()])
        if logits_too is not None:
            logits_too.append(logits)
    return totals / len(labels)


def autocasting(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which a model of this precision runs forward."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@torch.no_grad()
def layout_of(model: nn.Module, images: Pixels) -> Layout:
    """Return how a model's images are to lie in memory, tried on two of them: a function of a batch [B, C, H, W].

    A model may depend on where numbers lie, as one that calls `view` does; it gets its images as they are.
    """
    some = next(images.split(2))
    gains = some.device.type == "cpu" and some.dtype == torch.float32  # oneDNN's convolutions
    if not gains or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return as_they_lie
    was_training = model.training
    try:
        model.eval()(channels_last(some))
    except RuntimeError:
        return as_they_lie
    finally:
        model.train(was_training)
    return channels_last


def number_type(model: nn.Module) -> torch.dtype:
    """Return the type that images are fed in: the parameters' own, so that a model in float64 is trained in
    float64.
    """
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
