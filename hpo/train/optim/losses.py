"""Losses by name. The keyword-only parameters of a function are the options of the loss.

A loss maps outputs [B, O] and targets to the loss of each example [B]. Targets are class numbers (int64 [B]), labels (bool
[B, L]) or standardised numbers (float [B, T]). The mean of a batch, the loss of mixed labels and the evaluation are made from
it. A user's own loss is made by a function or class that takes nothing but options, such as `torch.nn:CrossEntropyLoss` with
reduction = "none".

The validation loss is the mean of the chosen loss without label smoothing and without weights of classes. So the values of
trials that differ in these can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
Smoothing = Annotated[float, Ge(0), Lt(1)]
Positive = Annotated[float, Gt(0)]
Weights = Literal["none", "balanced"] | list[Positive]
PositiveWeights = Literal["none", "balanced"] | Positive | list[Positive]

IGNORED = -100  # class of filler examples in a batch; their loss is 0
LEAST_LOG_VARIANCE = math.log(1e-6)  # as in torch's gaussian_nll_loss
#: Name of the loss by task, where a study file names none.
BY_TASK = {
    "classification": "cross_entropy",
    "binary": "bce_with_logits",
    "multilabel": "bce_with_logits",
    "regression": "mse",
}
#: The tasks that our losses go with.
TASKS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("classification",),
    "bce_with_logits": ("classification", "binary", "multilabel"),
    "mse": ("classification", "binary", "multilabel", "regression"),
    "l1": ("regression",),
    "smooth_l1": ("regression",),
    "huber": ("regression",),
    "gaussian_nll": ("regression",),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a formula needs to know. In a stack each is a tensor with a row for each run."""

    smoothing: float | Tensor = 0.0  # of labels; [K, 1, 1] in a stack
    delta: float | Tensor = 1.0  # error at which a loss becomes linear; [K, 1, 1] in a stack
    weights: Tensor | None = None  # of classes or labels: [1, O], [K, O, 1] in a stack


#: Maps outputs [N, O, ...], targets [N, ...] or [N, T, ...] and settings to losses [N, ...].
Formula = Callable[[Tensor, Tensor, Settings], Tensor]


@dataclass(frozen=True)
class KnownLoss:
    """One of our losses. A stack can compute it for several runs at once."""

    formula: Formula
    label_smoothing: float = 0.0
    delta: float = 1.0
    wanted: Weights | PositiveWeights = "none"  # weights of classes or labels, as the study file has them
    weights: Tensor | None = field(default=None, compare=False)  # the same as numbers [O], by `weighted`

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(outputs.device)[None]
        return self.formula(
            _wide(outputs), targets, Settings(smoothing=self.label_smoothing, delta=self.delta, weights=weights)
        )


def cross_entropy(*, label_smoothing: Smoothing = 0.0, class_weights: Weights | None = None) -> Loss:
    """Build the cross-entropy of softmax in nats, torch's `cross_entropy`.

    Args:
        label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016).
        class_weights: factor of the loss for each class, in the order of the classes; "balanced": inversely proportional to the
            class's count in the training part, with mean 1 over its examples. Validation does without it.
    """
    return KnownLoss(_cross_entropy, label_smoothing, wanted=class_weights or "none")


def bce_with_logits(*, label_smoothing: Smoothing = 0.0, pos_weight: PositiveWeights | None = None) -> Loss:
    """Build the binary cross-entropy in nats of each class against the rest or of each label, averaged over them.

    It is torch's `binary_cross_entropy_with_logits`. Classes become one-hot targets (Wightman et al. 2021, "ResNet strikes
    back").

    Args:
        label_smoothing: share of the target that is spread evenly over all classes, or over yes and no of a label.
        pos_weight: factor of the loss where a label is set, one for all or one for each; "balanced": by how many times more
            examples of the training part are without the label than with it. Validation does without it.
    """
    return KnownLoss(_bce_with_logits, label_smoothing, wanted=pos_weight or "none")


def mse(*, of: Literal["softmax", "logits"] = "softmax", label_smoothing: Smoothing = 0.0) -> Loss:
    """Build the squared error, averaged over classes, labels or targets, torch's `mse_loss`.

    Args:
        of: what is compared: probabilities by softmax or sigmoid with one-hot targets or labels (Brier 1950), or bare logits
            (Hui & Belkin 2021) with one-hot targets, or with 1 and -1 for a label that is set or not. The outputs of a
            regression are compared as they are.
        label_smoothing: share of the target that is spread evenly over all classes, or over yes and no of a label.
    """
    return KnownLoss(_mse_of_softmax if of == "softmax" else _mse_of_logits, label_smoothing)


def l1() -> Loss:
    """Build the absolute error of standardised targets, averaged over the targets, torch's `l1_loss`."""
    return KnownLoss(_l1)


def smooth_l1(*, beta: Positive = 1.0) -> Loss:
    """Build the Huber loss divided by beta, torch's `smooth_l1_loss`.

    Args:
        beta: error in standard deviations of the target below which the loss is quadratic.
    """
    return KnownLoss(_smooth_l1, delta=beta)


def huber(*, delta: Positive = 1.0) -> Loss:
    """Build the loss that is quadratic for small errors and linear for large ones, torch's `huber_loss` (Huber 1964).

    Args:
        delta: error in standard deviations of the target below which the loss is quadratic.
    """
    return KnownLoss(_huber, delta=delta)


def gaussian_nll() -> Loss:
    """Build the negative log-likelihood of a normal distribution without its constant, torch's `gaussian_nll_loss`.

    The model has two outputs for each target: first all means, then the logarithms of all variances (Nix & Weigend 1994).
    """
    return KnownLoss(_gaussian_nll)


LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy,
    "bce_with_logits": bce_with_logits,
    "mse": mse,
    "l1": l1,
    "smooth_l1": smooth_l1,
    "huber": huber,
    "gaussian_nll": gaussian_nll,
}


def outputs_per_target(loss: Loss) -> int:
    """Return how many outputs of a model a loss needs for each target."""
    return 2 if isinstance(loss, KnownLoss) and loss.formula is _gaussian_nll else 1


def for_task(task: str) -> list[str]:
    """Return the names of our losses that go with a task."""
    return [name for name, tasks in TASKS.items() if task in tasks]


def weighted(loss: Loss, targets: Tensor, outputs: int) -> Loss:
    """Return a loss with the weights of classes or labels that it wants, as numbers.

    ValueError for a list of another length than `outputs`.

    Args:
        targets: targets of the training part: int64 [N] or bool [N, L].
        outputs: number of classes or labels.
    """
    if not isinstance(loss, KnownLoss) or loss.wanted == "none":
        return loss
    if loss.wanted == "balanced":
        found = _balanced(loss.formula, targets, outputs)
    else:
        given = loss.wanted if isinstance(loss.wanted, list) else [loss.wanted] * outputs
        if len(given) != outputs:
            raise ValueError(f"{len(given)} weights for {outputs} classes or labels; give one for each")
        found = torch.tensor(given, dtype=torch.float64)
    return replace(loss, weights=found.to(targets.device))


def _balanced(formula: Formula, targets: Tensor, outputs: int) -> Tensor:
    """Return balanced weights by the counts of the training part, float64 [outputs]."""
    is_classes = targets.dtype == torch.int64
    counts = (torch.bincount(targets, minlength=outputs) if is_classes else targets.sum(0)).double()
    if formula is _cross_entropy:
        return torch.where(counts > 0, len(targets) / (counts * (counts > 0).sum()), 0.0)
    without = len(targets) - counts
    return torch.where((counts > 0) & (without > 0), without / counts, 1.0)


def reduced(loss: Loss, outputs: Tensor, targets: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Return the mean or the sum of the examples' losses. For cross-entropy it equals torch's own to the last bit."""
    if isinstance(loss, KnownLoss) and loss.formula is _cross_entropy and loss.weights is None:
        smoothing = loss.label_smoothing
        return F.cross_entropy(_wide(outputs), targets, reduction=reduction, label_smoothing=smoothing)
    losses = loss(outputs, targets)
    return losses.mean() if reduction == "mean" else losses.double().sum()


def judging(loss: Loss) -> Loss:
    """Return the loss for validation: the same without label smoothing and weights."""
    return replace(loss, label_smoothing=0.0, wanted="none", weights=None) if isinstance(loss, KnownLoss) else loss


def own_kind(loss: Loss) -> str:
    """Return the name of a user's loss, or "" for ours. All runs of a stack have the same."""
    if isinstance(loss, KnownLoss):
        return ""
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def try_out(loss: Loss, outputs: int, targets: Tensor, device: torch.device) -> Loss:
    """Move a loss to this device and return it; ValueError if it does not return a differentiable loss for each example.

    Args:
        outputs: number of the model's outputs.
        targets: targets of two examples.
    """
    if isinstance(loss, nn.Module):
        if any(parameter.requires_grad for parameter in loss.parameters()):
            raise ValueError("has parameters, but the optimizer trains only those of the model; make them buffers")
        loss = loss.to(device)
    tried = torch.zeros((2, outputs), device=device, requires_grad=True)
    found = loss(tried, targets.to(device))
    if not isinstance(found, Tensor) or found.shape != (2,):
        got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f'gave {got} for 2 rows, not one loss for each; leave the mean to us (reduction = "none")')
    if not found.requires_grad:
        raise ValueError("gave losses without a gradient to the outputs; compute them with torch's operations")
    return loss


class RowLosses:
    """The losses of K runs at once. All are ours, possibly different ones, or all are of one kind of a user's."""

    def __init__(self, losses: Sequence[Loss], device: torch.device) -> None:
        self._own = [] if isinstance(losses[0], KnownLoss) else list(losses)
        known = [loss for loss in losses if isinstance(loss, KnownLoss)]
        groups: dict[tuple[Formula, bool, bool], list[bool]] = {}
        for row, loss in enumerate(known):
            kind = (loss.formula, loss.label_smoothing > 0, loss.weights is not None)
            groups.setdefault(kind, [False] * len(known))[row] = True
        self._smoothing = _by_row([loss.label_smoothing for loss in known], device)
        self._delta = _by_row([loss.delta for loss in known], device)
        self._weights = _weights_by_row([loss.weights for loss in known], device)
        #: Formula, whether labels are smoothed and weighted, bool mask [K, 1, 1] of the rows that use this formula.
        self._groups = [(*kind, torch.tensor(rows, device=device).view(-1, 1, 1)) for kind, rows in groups.items()]
        self._in_dtype: dict[torch.dtype, list[tuple[Formula, Settings, Tensor]]] = {}

    def __call__(self, outputs: Tensor, targets: Tensor, filling: int = 0) -> Tensor:
        """Return the losses [K, B + filling].

        Args:
            outputs: the models' outputs [K, O, B + filling].
            targets: class numbers [K, B] or others [K, B, T].
            filling: number of filler rows at the end of the batch. Their loss is 0.
        """
        outputs, targets = _wide(outputs), behind(targets)
        if not self._own and targets.ndim == 2:
            return self._by_formula(outputs, F.pad(targets, (0, filling), value=IGNORED) if filling else targets)
        losses = self._by_own if self._own else self._by_formula
        found = losses(outputs[..., : targets.shape[-1]], targets)
        return F.pad(found, (0, filling)) if filling else found

    def _by_formula(self, outputs: Tensor, targets: Tensor) -> Tensor:
        groups = self._groups_in(outputs.dtype)
        if len(groups) == 1:
            formula, settings, _ = groups[0]
            return formula(outputs, targets, settings)
        total = torch.zeros_like(outputs[:, 0])
        for formula, settings, rows in groups:
            # Other rows are 0 before and after the formula: a NaN in one row must not reach the gradient of another.
            losses = formula(torch.where(rows, outputs, 0.0), targets, settings)
            total = total + torch.where(rows[:, 0], losses, 0.0)
        return total

    def _groups_in(self, dtype: torch.dtype) -> list[tuple[Formula, Settings, Tensor]]:
        """Return formula, settings in this number type and rows of each group."""
        if dtype not in self._in_dtype:
            smoothing, delta = self._smoothing.to(dtype), self._delta.to(dtype)
            weights = None if self._weights is None else self._weights.to(dtype)
            self._in_dtype[dtype] = [
                (
                    formula,
                    Settings(
                        smoothing=smoothing if is_smoothed else 0.0,
                        delta=delta,
                        weights=weights if is_weighted else None,
                    ),
                    rows,
                )
                for formula, is_smoothed, is_weighted, rows in self._groups
            ]
        return self._in_dtype[dtype]

    def _by_own(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Call the user's functions row by row, each with the tensors that a single run would pass to it."""
        rows = zip(self._own, outputs.unbind(0), targets.unbind(0), strict=True)
        return torch.stack([loss(of_run.t(), its.t()) for loss, of_run, its in rows])


def behind(targets: Tensor) -> Tensor:
    """Return the targets of K runs with rows behind: class numbers [K, B] as they are, others [K, B, T] as [K, T, B]."""
    return targets if targets.ndim == 2 else targets.transpose(1, 2)


def _by_row(numbers: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device).view(-1, 1, 1)


def _weights_by_row(found: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Return weights [K, O, 1], 1 for runs without weights; None if no run has any."""
    some = next((weights for weights in found if weights is not None), None)
    if some is None:
        return None
    rows = [torch.ones_like(some) if weights is None else weights for weights in found]
    return torch.stack(rows).to(device).unsqueeze(2)


# --- formulas -----------------------------------------------------------------------------------------------------------


def _cross_entropy(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    smoothing, weights = settings.smoothing, settings.weights
    if isinstance(smoothing, float) and weights is None:
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing, ignore_index=IGNORED)
    logs = F.log_softmax(outputs, 1)
    logs = logs if weights is None else logs * weights.to(logs.dtype)
    of_target = logs.gather(1, targets.clamp(min=0).unsqueeze(1))
    losses = -((1 - smoothing) * of_target + smoothing * logs.mean(1, keepdim=True)).squeeze(1)
    return _without_ignored(losses, targets)


def _bce_with_logits(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    weights = None if settings.weights is None else settings.weights.to(outputs.dtype)
    wanted = _wanted(outputs, targets, settings.smoothing)
    losses = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none", pos_weight=weights)
    return _without_ignored(losses.mean(1), targets)


def _mse_of_softmax(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    if targets.dtype == torch.int64:
        outputs = F.softmax(outputs, 1)
    elif targets.dtype == torch.bool:
        outputs = outputs.sigmoid()
    return _squared(outputs, _wanted(outputs, targets, settings.smoothing), targets)


def _mse_of_logits(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    wanted = _wanted(outputs, targets, settings.smoothing)
    if targets.dtype == torch.bool:
        wanted = 2 * wanted - 1  # a label is predicted where its logit is above 0
    return _squared(outputs, wanted, targets)


def _squared(outputs: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
    return _without_ignored(_errors(outputs, wanted).square().mean(1), targets)


def _l1(outputs: Tensor, targets: Tensor, _: Settings) -> Tensor:
    return _errors(outputs, targets).abs().mean(1)


def _smooth_l1(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    return (_huber_by_target(outputs, targets, settings.delta) / settings.delta).mean(1)


def _huber(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    return _huber_by_target(outputs, targets, settings.delta).mean(1)


def _huber_by_target(outputs: Tensor, targets: Tensor, delta: float | Tensor) -> Tensor:
    errors = _errors(outputs, targets).abs()
    return torch.where(errors < delta, 0.5 * errors.square(), delta * (errors - 0.5 * delta))


def _gaussian_nll(outputs: Tensor, targets: Tensor, _: Settings) -> Tensor:
    means, given = outputs.chunk(2, 1)
    bound = given.detach().clamp(min=LEAST_LOG_VARIANCE)
    logs = bound + (given - given.detach())  # the gradient goes on below the bound, as torch's
    return 0.5 * (logs + _errors(means, targets).square() * torch.exp(-logs)).mean(1)


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape != targets.shape:  # torch would repeat the smaller one
        raise ValueError(f"{list(outputs.shape)} outputs for {list(targets.shape)} targets; give one for each")
    return outputs - targets


def _wanted(outputs: Tensor, targets: Tensor, smoothing: float | Tensor) -> Tensor:
    """Return smoothed one-hot targets or labels, or the numbers of a regression, in the shape of the outputs."""
    if targets.dtype == torch.int64:
        hot = torch.zeros_like(outputs).scatter_(1, targets.clamp(min=0).unsqueeze(1), 1.0)
        return hot * (1 - smoothing) + smoothing / outputs.shape[1]
    if targets.dtype == torch.bool:
        return targets.to(outputs.dtype) * (1 - smoothing) + smoothing / 2
    return targets.to(outputs.dtype)


def _without_ignored(losses: Tensor, targets: Tensor) -> Tensor:
    return torch.where(targets == IGNORED, 0.0, losses) if targets.dtype == torch.int64 else losses


def _wide(outputs: Tensor) -> Tensor:
    """Return outputs with at least 32 bits: losses in 16 bits are too inexact."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


CROSS_ENTROPY = cross_entropy()
