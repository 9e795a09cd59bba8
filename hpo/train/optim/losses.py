"""Losses by name. The keyword-only parameters of a function are the options of the loss.

A loss maps outputs [B, O] and targets to the loss of each row [B]. Targets are class numbers int64 [B], labels bool
[B, L], or standardised numbers [B, T]. The mean of a batch, the loss of mixed labels and the evaluation are made from
it. A user's own loss is made by a function or class that takes nothing but options, such as
`torch.nn:CrossEntropyLoss` with reduction = "none".

The validation loss is the mean of the chosen loss without label smoothing. So the values of trials with different label
smoothing can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
Smoothing = Annotated[float, Ge(0), Lt(1)]
#: Maps outputs [N, O, ...], targets (class numbers [N, ...], else [N, O, ...]) and label smoothing (a number or
#: [N, 1, ...]) to losses [N, ...].
Formula = Callable[[Tensor, Tensor, float | Tensor], Tensor]

IGNORED = -100  # class number of filler rows in a batch; their loss is 0


@dataclass(frozen=True)
class KnownLoss:
    """One of our losses. A stack can compute it for several runs at once."""

    formula: Formula
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.formula(_wide(logits), labels, self.label_smoothing)


def cross_entropy(*, label_smoothing: Smoothing = 0.0) -> Loss:
    """Build the cross-entropy of softmax in nats, torch's `cross_entropy`.

    Args:
        label_smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016).
    """
    return KnownLoss(_cross_entropy, label_smoothing)


def bce_with_logits(*, label_smoothing: Smoothing = 0.0) -> Loss:
    """Build the binary cross-entropy in nats of each class against the rest, averaged over the classes.

    It is torch's `binary_cross_entropy_with_logits` on one-hot targets (Wightman et al. 2021, "ResNet strikes back").

    Args:
        label_smoothing: share of the target that is spread evenly over all classes.
    """
    return KnownLoss(_bce_with_logits, label_smoothing)


def mse(*, of: Literal["softmax", "logits"] = "softmax", label_smoothing: Smoothing = 0.0) -> Loss:
    """Build the squared error to the one-hot target, averaged over the classes, torch's `mse_loss`.

    Args:
        of: what is compared with the target: softmax probabilities (Brier 1950) or bare logits (Hui & Belkin 2021).
        label_smoothing: share of the target that is spread evenly over all classes.
    """
    return KnownLoss(_mse_of_softmax if of == "softmax" else _mse_of_logits, label_smoothing)


LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy,
    "bce_with_logits": bce_with_logits,
    "mse": mse,
}


def reduced(loss: Loss, logits: Tensor, labels: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Return the mean or the sum of the rows' losses. For cross-entropy it equals torch's own to the last bit."""
    if isinstance(loss, KnownLoss) and loss.formula is _cross_entropy:
        smoothing = loss.label_smoothing
        return F.cross_entropy(_wide(logits), labels, reduction=reduction, label_smoothing=smoothing)
    losses = loss(logits, labels)
    return losses.mean() if reduction == "mean" else losses.double().sum()


def judging(loss: Loss) -> Loss:
    """Return the loss for validation: the same without label smoothing."""
    return replace(loss, label_smoothing=0.0) if isinstance(loss, KnownLoss) else loss


def own_kind(loss: Loss) -> str:
    """Return the name of a user's loss, or "" for ours. All runs of a stack have the same."""
    if isinstance(loss, KnownLoss):
        return ""
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def try_out(loss: Loss, outputs: int, targets: Tensor, device: torch.device) -> Loss:
    """Move a loss to this device and return it; ValueError if it does not return a differentiable loss for each row.

    Args:
        outputs: number of the model's outputs.
        targets: targets of two rows.
    """
    if isinstance(loss, nn.Module):
        if any(parameter.requires_grad for parameter in loss.parameters()):
            raise ValueError("has parameters, but the optimizer trains only those of the model; make them buffers")
        loss = loss.to(device)
    logits = torch.zeros((2, outputs), device=device, requires_grad=True)
    found = loss(logits, targets.to(device))
    if not isinstance(found, Tensor) or found.shape != (2,):
        got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f'gave {got} for 2 rows, not one loss for each; leave the mean to us (reduction = "none")')
    if not found.requires_grad:
        raise ValueError("gave losses without a gradient to the logits; compute them with torch's operations")
    return loss


class RowLosses:
    """The losses of K runs at once. All are ours, possibly different ones, or all are of one kind of a user's."""

    def __init__(self, losses: Sequence[Loss], device: torch.device) -> None:
        self._own = [] if isinstance(losses[0], KnownLoss) else list(losses)
        known = [loss for loss in losses if isinstance(loss, KnownLoss)]
        groups: dict[tuple[Formula, bool], list[bool]] = {}
        for row, loss in enumerate(known):
            groups.setdefault((loss.formula, loss.label_smoothing > 0), [False] * len(known))[row] = True
        smoothing = torch.tensor([loss.label_smoothing for loss in known], dtype=torch.float64, device=device)
        self._smoothing = smoothing.view(-1, 1, 1)
        #: Formula, whether labels are smoothed, bool mask [K, 1, 1] of the rows that use this formula.
        self._groups = [
            (formula, is_smoothed, torch.tensor(rows, device=device).view(-1, 1, 1))
            for (formula, is_smoothed), rows in groups.items()
        ]

    def __call__(self, logits: Tensor, labels: Tensor, filling: int = 0) -> Tensor:
        """Return the losses [K, B + filling].

        Args:
            logits: the models' outputs [K, O, B + filling].
            labels: targets, class numbers [K, B] or others [K, B, T].
            filling: number of filler rows at the end of the batch. Their loss is 0.
        """
        logits, labels = _wide(logits), behind(labels)
        if self._own:
            return self._by_own(logits, labels)
        if labels.ndim == 2:
            return self._by_formulas(logits, F.pad(labels, (0, filling), value=IGNORED) if filling else labels)
        losses = self._by_formulas(logits[:, :, : labels.shape[2]], labels)
        return F.pad(losses, (0, filling)) if filling else losses

    def _by_formulas(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self._smoothing.to(logits.dtype)
        if len(self._groups) == 1:
            formula, is_smoothed, _ = self._groups[0]
            return formula(logits, labels, smoothing if is_smoothed else 0.0)
        total = torch.zeros_like(logits[:, 0])
        for formula, is_smoothed, rows in self._groups:
            # Other rows are 0 before and after the formula: a NaN in one row must not reach the gradient of another.
            losses = formula(torch.where(rows, logits, 0.0), labels, smoothing if is_smoothed else 0.0)
            total = total + torch.where(rows[:, 0], losses, 0.0)
        return total

    def _by_own(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Call the user's functions row by row, each with the tensors that a single run would pass to it."""
        taken = labels.shape[-1]
        rows = [
            loss(of_run[:, :taken].t(), its.t())
            for loss, of_run, its in zip(self._own, logits.unbind(0), labels.unbind(0), strict=True)
        ]
        return F.pad(torch.stack(rows), (0, logits.shape[2] - taken))


def behind(targets: Tensor) -> Tensor:
    """Return the targets of K runs with rows behind: class numbers [K, B] as they are, others [K, B, T] as [K, T, B]."""
    return targets if targets.ndim == 2 else targets.transpose(1, 2)


# --- formulas -----------------------------------------------------------------------------------------------------------


def _cross_entropy(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    if isinstance(smoothing, float):
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing, ignore_index=IGNORED)
    logs = F.log_softmax(logits, 1)
    of_label = logs.gather(1, labels.clamp(min=0).unsqueeze(1))
    losses = -((1 - smoothing) * of_label + smoothing * logs.mean(1, keepdim=True)).squeeze(1)
    return _without_ignored(losses, labels)


def _bce_with_logits(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    targets = _targets(logits, labels, smoothing)
    return _without_ignored(F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1), labels)


def _mse_of_softmax(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    if labels.dtype != torch.int64:  # a softmax is of classes
        return _mse_of_logits(logits, labels, smoothing)
    return _mse_of_logits(F.softmax(logits, 1), labels, smoothing)


def _mse_of_logits(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    return _without_ignored((logits - _targets(logits, labels, smoothing)).square().mean(1), labels)


def _targets(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    """Return targets in the shape of the logits: numbers as they are, smoothed labels, or smoothed one-hot classes."""
    if labels.is_floating_point():
        return labels.to(logits.dtype)
    if labels.dtype == torch.bool:
        return labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    hot = torch.zeros_like(logits).scatter_(1, labels.clamp(min=0).unsqueeze(1), 1.0)
    return hot * (1 - smoothing) + smoothing / logits.shape[1]


def _without_ignored(losses: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels == IGNORED, 0.0, losses) if labels.dtype == torch.int64 else losses


def _wide(logits: Tensor) -> Tensor:
    """Return logits with at least 32 bits: losses in 16 bits are too inexact."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


CROSS_ENTROPY = cross_entropy()
#: Name of the loss by task, where a study file names none.
BY_TASK = {
    "classification": "cross_entropy",
    "binary": "bce_with_logits",
    "multilabel": "bce_with_logits",
    "regression": "mse",
}
