"""A run: one trial in training, for every executor.

A run owns its batch order, its randomness, its position, its saved state for a bit-for-bit resume, and its stopping
rules. An executor trains it (`loop.py` alone, `stack.py` with others) by the calls at the end of the class, in their
order. Pruning, reports, checkpoints and non-finite losses are handled by the callers of executors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpo.data import Drawn, Splits, Strength, Tone, draw, some
from hpo.errors import CheckpointError
from hpo.models import freezing, use_generator
from hpo.spec.metrics import column
from hpo.spec.training import Stopping
from hpo.train import early_stopping, eval_metrics, monitors
from hpo.train.batches import SMALLEST_PIECE, Sampling, balanced_order, most_pieces, rows_by_class, steps_per_epoch
from hpo.train.epoch import EpochResult
from hpo.train.inputs import Layout, PreparedInputs, in_units, layout_of, prepared
from hpo.train.monitors import StepMonitor, Watch
from hpo.train.optim import averaging, losses, optimizers, penalties, schedules
from hpo.train.optim.averaging import Average, Averaging
from hpo.train.optim.losses import Loss
from hpo.train.optim.penalties import Penalties
from hpo.train.optim.schedules import Schedule
from hpo.train.precision import Precision, number_type
from hpo.train.randomness import MaskRule, Randomness, mask_rule

AS_THEY_ARE = Strength()
NOTHING_MORE = Watch()
VALIDATION_LOSS = column("loss")
STATE = (
    "epoch",
    "batch",
    "seconds",
    "loss_sum",
    "random",
    "model",
    "optimizer",
    "average",
    "executors",
    "curves",
    "gauge",
)


class Run:
    """One trial in training. Its state can be saved and resumed between epochs, or where `stop` ended it.

    Inputs and targets stay on their device as the splits hold them. Every random draw is keyed by (seed, purpose,
    epoch).

    With micro-batches the gradients of a batch add up to those of the whole batch, and each batch is still one step.
    Validation uses batches that are smaller by the same factor. Apart from rounding there are two differences from
    whole batches: batch norm works on micro-batches, and dropout masks are drawn for each. A training split smaller
    than one batch uses fewer micro-batches, so that none has a single row. The number of micro-batches belongs to the
    configuration of a saved state.

    Args:
        model: the model, on the device of the inputs.
        optimizer: a new optimizer. The schedule multiplies its learning rates.
        schedule: maps an optimizer step to learning-rate factor and momentum.
        splits: training and validation data.
        epochs: number of epochs.
        batch_size: rows per optimizer step.
        sampling: whether an epoch has each row once at most, or classes equally often.
        seed: seed of all random draws.
        precision: number type of the forward pass.
        accumulation: micro-batches per batch, near-equal and in order.
        augment: strengths of the augmentation of training images.
        clip_norm: largest 2-norm of the gradient over all parameters (Pascanu et al. 2013); None: no limit.
        clip_value: largest absolute value of an element of the gradient; None: no limit.
        loss: its mean over a batch is minimised. Validation uses it without label smoothing.
        penalised: penalties that are added to the gradient, and bound on the weights.
        averaging: average of weights that validation uses.
        sam_rho: distance of sharpness-aware minimisation, see `optim/sam.py`; 0: plain gradients.
        stopping: rules that end the run before its last epoch; None: no rules.
        watch: further values to measure.
        masks: how dropout masks are drawn; None: as is best on the device. A loaded state keeps its own.

    ValueError for an impossible batch size or number of micro-batches, or if model and inputs are on different devices.
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
        sampling: Sampling = "shuffled",
        precision: Precision = "float32",
        accumulation: int = 1,
        augment: Strength = AS_THEY_ARE,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        loss: Loss = losses.CROSS_ENTROPY,
        penalised: Penalties = penalties.NONE,
        averaging: Averaging = averaging.NONE,
        sam_rho: float = 0.0,
        stopping: Stopping | None = None,
        watch: Watch = NOTHING_MORE,
        masks: MaskRule | None = None,
    ) -> None:
        if epochs < 1 or batch_size < 1:
            raise ValueError(f"epochs = {epochs}, batch_size = {batch_size}; both must be at least 1")
        if not 1 <= accumulation <= most_pieces(batch_size):
            raise ValueError(
                f"accumulation = {accumulation} with batch_size = {batch_size}; a micro-batch needs at least "
                f"{SMALLEST_PIECE} rows: give from 1 to {most_pieces(batch_size)}"
            )
        device = splits.device
        strangers = {p.device for p in model.parameters()} - {device}
        if strangers:
            raise ValueError(f"the model is on {strangers.pop()}, the data on {device}; move the model before the run")
        self.model = model
        self.optimizer = optimizer
        self.splits = splits
        self.device = device
        self.seed = seed
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch(len(splits.train.targets), batch_size)
        self.sampling = sampling
        self._draw_masks(masks or mask_rule(device))
        self.batch_size = min(batch_size, len(splits.train.targets))
        self.accumulation = accumulation
        self.pieces = min(accumulation, most_pieces(self.batch_size))  # micro-batches of a batch of the actual size
        self.precision: Precision = precision
        self.augment = augment
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.loss = loss
        self.judging_loss = losses.judging(loss)
        self.penalised = penalised
        self.sam_rho = sam_rho
        self.stopping = stopping
        self.watch = watch
        self._schedule = schedule
        self._base_lrs = [float(group["lr"]) for group in optimizer.param_groups]

        self.epoch = 0  # finished epochs
        self.batch = 0  # finished batches of the current epoch
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # sum of the mean losses of these batches
        self.average = Average(averaging, model, epochs) if averaging.every else None
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        self.monitor = StepMonitor(watch, {name: p for name, p in model.named_parameters() if p in owned}, device)
        if watch.metrics:
            eval_metrics.load()
        self.executors: list[str] = []  # executors that trained the run, in order
        self.curves: dict[str, list[float]] = {name: [] for name in _looked_at(stopping)}  # raw, of finished epochs
        self.stopped_by: str | None = None  # why one of its stopping rules ended it before its last epoch
        self._schedule_now = schedule  # for the current epoch
        self._seconds = 0.0  # seconds spent on the current epoch before it was stopped
        self._generators: dict[str, Tensor] = {}  # states where the epoch was stopped; empty between epochs
        self._in_step = False

    def _draw_masks(self, rule: MaskRule) -> None:
        self.randomness = Randomness(self.seed, self.device, rule, self.steps_per_epoch, self.epochs)
        use_generator(self.model, self.randomness.dropout, self.randomness.masks)

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained, or a stopping rule has ended the run."""
        return self.epoch >= self.epochs or self.stopped_by is not None

    @property
    def alone(self) -> str | None:
        """Why the run cannot be trained in a stack; None if it can."""
        if self.sam_rho:
            return "sharpness-aware minimisation takes each batch twice"
        return optimizers.ALONE.get(type(self.optimizer).__name__) or freezing.why_alone(self.model)

    @property
    def inputs(self) -> PreparedInputs:
        """The training inputs, standardised, in the number type of the parameters."""
        return prepared(self.splits.train, self.splits, number_type(self.model))

    @property
    def tone(self) -> Tone:
        """The conversion between normalised images and shares of white."""
        mean, std = self.splits.mean, self.splits.std
        assert isinstance(mean, Tensor)  # only images are augmented
        assert isinstance(std, Tensor)
        return Tone(mean, std, self.splits.white)

    @property
    def validation_inputs(self) -> PreparedInputs:
        """The validation inputs, standardised, in the number type of the parameters."""
        return prepared(self.splits.validation, self.splits, number_type(self.model))

    @cached_property
    def layout(self) -> Layout:
        """The function that lays out the model's inputs in memory. Its test may change the modes of layers."""
        return layout_of(self.model, self.inputs)

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs for a bit-for-bit resume, made of tensors and plain values.

        The tensors are the run's own, so save or copy them before training continues. RuntimeError if an epoch is being
        trained or was left by an exception, since its position is then unknown.
        """
        if self._in_step:
            raise RuntimeError(
                f"the state was requested within epoch {self.epoch + 1}; "
                "request it between results, or let `stop` end the training"
            )
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self._seconds,
            "loss_sum": self.loss_sum,
            "random": dict(self._generators),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "executors": list(self.executors),
            "curves": {name: list(curve) for name, curve in self.curves.items()},
            "gauge": self.monitor.state_dict() if self.watch.gradients and self.batch else None,
            **({} if self.randomness.masks is None else {"masks": self.randomness.rule}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a run of the same configuration. The state itself is not written to later.

        CheckpointError, before anything is loaded, if the state is of another version or configuration. torch's own
        error if it does not fit the model or the optimizer.
        """
        self._refuse_another_s(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(_own(state["optimizer"]))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["gauge"] is not None:
            self.monitor.load_state_dict(state["gauge"])
        self.epoch = state["epoch"]
        self.batch = state["batch"]
        self._seconds = state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self._draw_masks(state.get("masks", "generator"))  # states of runs with a generator have no such key
        self._generators = dict(state["random"])
        self.executors = list(state["executors"])
        self.curves = {name: list(state["curves"][name]) for name in self.curves}
        self._in_step = False
        self._look_whether_to_stop()

    def _refuse_another_s(self, state: Mapping[str, Any]) -> None:
        lacking = [key for key in STATE if key not in state]
        if lacking:
            raise CheckpointError(
                f"the state has no {', no '.join(lacking)}: another version of hpo wrote it; start again from epoch 0"
            )
        watches_steps = self.watch.gradients and state["batch"] > 0
        for what, theirs, ours in (
            ("an average of weights", state["average"] is not None, self.average is not None),
            ("sums of gradients", state["gauge"] is not None, watches_steps),
            *((f"the curve {name}", name in state["curves"], True) for name in self.curves),
        ):
            if theirs != ours:
                side, other = ("state", "run") if theirs else ("run", "state")
                raise CheckpointError(
                    f"the {side} has {what}, but the {other} has not: their configurations differ; start again from epoch 0"
                )

    @property
    def computes_statistics(self) -> bool:
        """Whether the run's average needs batch norm's statistics computed anew."""
        return self.average is not None and self.average.norms_anew

    def judged_weights(self) -> dict[str, Tensor]:
        """Return the state dict that validation uses: with averages of weights if there are any."""
        return averaging.judged_weights(self.model, self.average)

    # --- calls of an executor, in this order ------------------------------------------------------------------------

    def note_executor(self, name: str) -> None:
        """Record the executor that trains the run from now on."""
        if self.executors[-1:] != [name]:
            self.executors.append(name)

    def enter_epoch(self) -> None:
        """Begin the next epoch, or continue a stopped one: set generators, schedule, train mode and frozen layers."""
        if self.batch:
            self.randomness.restore(self._generators, self.epoch, self.batch)
        else:
            self.randomness.begin(self.epoch)
            self.monitor.begin()
        self._schedule_now = schedules.after(self._schedule, self.curves[VALIDATION_LOSS])
        self.model.train()
        freezing.enter_epoch(self.model, self.epoch)
        self._in_step = True

    def order(self) -> Tensor:
        """Return the rows of the epoch's batches [steps * batch size] on the CPU. They are the same for every device."""
        generator = self.randomness.drawn_for("order", self.epoch)
        count = self.steps_per_epoch * self.batch_size
        if self.sampling == "balanced":
            return balanced_order(self._rows_by_class, count, generator)
        return torch.randperm(len(self.splits.train.targets), generator=generator)[:count]

    @cached_property
    def _rows_by_class(self) -> list[Tensor]:
        return rows_by_class(self.splits.train.targets)

    def drawn(self) -> Drawn | None:
        """Return the changes of the epoch's images, in the order of `order`; None without augmentation."""
        if self.augment == AS_THEY_ARE:
            return None
        height, width = some(self.splits.train.inputs).shape[2:]
        random = partial(self.randomness.drawn_for, epoch=self.epoch)
        return draw(self.augment, self.steps_per_epoch, self.batch_size, (height, width), random)

    def begin_step(self, batch: int) -> None:
        """Set rates and masks for a batch of the epoch, from 0, if the run is trained alone."""
        self.set_rate(batch)
        if self.randomness.masks is not None:
            self.randomness.masks.go_to(batch)

    def set_rate(self, batch: int) -> None:
        """Set learning rate and momentum for a batch of the epoch, from 0."""
        schedules.apply(self.optimizer, self._base_lrs, self._schedule_now(self.epoch * self.steps_per_epoch + batch))

    def clear_sums(self) -> None:
        """Set the sums of the epoch to 0. A stack clears those of all its runs in one call instead."""
        self.loss_sum.zero_()
        if self.watch.gradients:
            self.monitor.sums.zero_()

    def keep_losses_in(self, place: Tensor) -> None:
        """Move the epoch's sum of losses into this float64 tensor without dimensions."""
        place.copy_(self.loss_sum)
        self.loss_sum = place

    def spend(self, seconds: float) -> None:
        """Add seconds to the current epoch, which was stopped."""
        self._seconds += seconds

    def leave_epoch(self, batch: int) -> None:
        """Stop within the epoch, before this batch."""
        self.batch = batch
        self._generators = self.randomness.states() if batch else {}
        self._in_step = False

    def close_epoch(
        self,
        train_loss: float,
        validation_loss: float,
        accuracy: float,
        seconds: float,
        watched: Mapping[str, float] | None = None,
    ) -> EpochResult:
        """Finish the epoch with its measured values and return its result.

        Args:
            train_loss: mean training loss.
            validation_loss: mean validation loss.
            accuracy: share of right validation targets, 0 to 1; not used for a regression.
            seconds: duration of this call of the executor.
            watched: further measured values, under the names of the ledger.
        """
        seconds += self._seconds
        watched = dict(watched or {})
        if self.watch.resources:
            watched |= monitors.of_resources(self.device, self.steps_per_epoch * self.batch_size, seconds)
        self.epoch += 1
        self.batch, self._seconds, self._generators, self._in_step = 0, 0.0, {}, False
        self.monitor.before = {}
        result = EpochResult(
            epoch=self.epoch,
            train_loss=train_loss,
            validation_loss=validation_loss,
            validation_accuracy=None if self.splits.task == "regression" else accuracy,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            seconds=seconds,
            watched=watched,
        )
        numbers = result.numbers
        for name, curve in self.curves.items():
            curve.append(numbers[name])
        self._look_whether_to_stop()
        return result

    def validation_values(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs [..., N, O] for the validation split and its targets, both in original units."""
        return in_units(outputs, self.splits), in_units(self.splits.validation.targets, self.splits)

    def further_metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the further validation metrics from a model's outputs [N, O] and targets, see `validation_values`."""
        found = eval_metrics.compute(self.watch.metrics, outputs, targets, self.splits.task)
        return {column(name): value for name, value in found.items()}

    def _look_whether_to_stop(self) -> None:
        is_early = 0 < self.epoch < self.epochs
        self.stopped_by = early_stopping.verdict(self.stopping, self.curves) if self.stopping and is_early else None


def _looked_at(settings: Stopping | None) -> list[str]:
    """Return the names of the curves that a run keeps: those that a schedule or its stopping rules may need."""
    return list(dict.fromkeys([VALIDATION_LOSS, *(early_stopping.columns(settings) if settings else ())]))


def _own(value: Any) -> Any:
    """Return a state in which each tensor is a separate copy.

    torch would share tensors. A step count that parameters share would be counted once for each of them.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _own(child) for key, child in value.items()}
    return [_own(child) for child in value] if isinstance(value, list) else value
