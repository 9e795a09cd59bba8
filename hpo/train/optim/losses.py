"""Losses by name; every keyword-only parameter of a function is an option of the loss.

A loss maps logits [B, classes] and labels [B] to the loss of each image [B], so that a batch's mean, a mixture of two labels'
losses and an evaluation are all made of it. A user's own is such a function too, made by a function or a class without
arguments but options: `torch.nn:CrossEntropyLoss` with reduction = "none" is one.

Validation is the mean of the chosen loss without label smoothing, which belongs to training alone: values of trials that
differ in it can be compared.
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
#: Logits [N, classes, ...], labels [N, ...] and the labels' smoothing, a number or [N, 1, ...], to losses [N, ...].
Formula = Callable[[Tensor, Tensor, float | Tensor], Tensor]

IGNORED = -100  # the label of images that fill up a batch: their loss is 0


@dataclass(frozen=True)
class KnownLoss:
    """A loss of ours, which a stack may take for several runs at once."""

    formula: Formula
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.formula(_wide(logits), labels, self.label_smoothing)


def cross_entropy(*, label_smoothing: Smoothing = 0.0) -> Loss:
    """Build the cross-entropy of softmax in nats; torch's `cross_entropy`.

    Label smoothing (Szegedy et al. 2016) moves this share of a label's weight to all classes alike.
    """
    return KnownLoss(_cross_entropy, label_smoothing)


def bce_with_logits(*, label_smoothing: Smoothing = 0.0) -> Loss:
    """Build the mean over the classes of each one's binary cross-entropy in nats, one class against the rest; torch's
    `binary_cross_entropy_with_logits` on one-hot targets (Wightman et al. 2021, "ResNet strikes back").

    Label smoothing moves this share of the target to all classes alike.
    """
    return KnownLoss(_bce_with_logits, label_smoothing)


def mse(*, of: Literal["softmax", "logits"] = "softmax", label_smoothing: Smoothing = 0.0) -> Loss:
    """Build the mean over the classes of the squared distance to the one-hot target, of the probabilities (Brier 1950) or of
    the bare logits (Hui & Belkin 2021); torch's `mse_loss`.

    Label smoothing moves this share of the target to all classes alike.
    """
    return KnownLoss(_mse_of_softmax if of == "softmax" else _mse_of_logits, label_smoothing)


LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": cross_entropy,
    "bce_with_logits": bce_with_logits,
    "mse": mse,
}


def reduced(loss: Loss, logits: Tensor, labels: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Return the mean or sum of the images' losses; of cross-entropy, torch's own, to the last bit."""
    if isinstance(loss, KnownLoss) and loss.formula is _cross_entropy:
        smoothing = loss.label_smoothing
        return F.cross_entropy(_wide(logits), labels, reduction=reduction, label_smoothing=smoothing)
    losses = loss(logits, labels)
    return losses.mean() if reduction == "mean" else losses.double().sum()


def judging(loss: Loss) -> Loss:
    """Return what validation takes for a loss: the same without label smoothing."""
    return replace(loss, label_smoothing=0.0) if isinstance(loss, KnownLoss) else loss


def own_kind(loss: Loss) -> str:
    """Return the name of a user's loss, "" of ours: runs of a stack are alike in it."""
    if isinstance(loss, KnownLoss):
        return ""
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"


def try_out(loss: Loss, classes: int, device: torch.device) -> Loss:
    """Return a loss on this device; ValueError if it does not give each image a loss that can be differentiated."""
    if isinstance(loss, nn.Module):
        if any(parameter.requires_grad for parameter in loss.parameters()):
            raise ValueError("has parameters, which nothing trains: the optimizer knows the model's; make them buffers")
        loss = loss.to(device)
    logits = torch.zeros((2, classes), device=device, requires_grad=True)
    found = loss(logits, torch.tensor([0, classes - 1], device=device))
    if not isinstance(found, Tensor) or found.shape != (2,):
        got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f'gave {got} for 2 images, not one loss for each; leave the mean to us (reduction = "none")')
    if not found.requires_grad:
        raise ValueError("gave losses that do not depend on the logits by torch's operations")
    return loss


class RowLosses:
    """The losses of K runs at once, each by its own function: all of ours, or all of one kind of a user's."""

    def __init__(self, losses: Sequence[Loss], device: torch.device) -> None:
        self._own = [] if isinstance(losses[0], KnownLoss) else list(losses)
        known = [loss for loss in losses if isinstance(loss, KnownLoss)]
        groups: dict[tuple[Formula, bool], list[bool]] = {}
        for row, loss in enumerate(known):
            groups.setdefault((loss.formula, loss.label_smoothing > 0), [False] * len(known))[row] = True
        smoothing = torch.tensor([loss.label_smoothing for loss in known], dtype=torch.float64, device=device)
        self._smoothing = smoothing.view(-1, 1, 1)
        #: Formula, whether labels are smoothed, which rows [K, 1, 1]; rows of other formulas are kept out of each.
        self._groups = [
            (formula, is_smoothed, torch.tensor(rows, device=device).view(-1, 1, 1))
            for (formula, is_smoothed), rows in groups.items()
        ]

    def __call__(self, logits: Tensor, labels: Tensor, filling: int = 0) -> Tensor:
        """Return the losses [K, B] of logits [K, classes, B] with labels [K, B].

        Args:
            filling: how many images at the end of the batch have IGNORED for a label, and no loss.
        """
        logits = _wide(logits)
        if self._own:
            return self._by_own(logits, labels, labels.shape[1] - filling)
        smoothing = self._smoothing.to(logits.dtype)
        if len(self._groups) == 1:
            formula, is_smoothed, _ = self._groups[0]
            return formula(logits, labels, smoothing if is_smoothed else 0.0)
        total = torch.zeros_like(logits[:, 0])
        for formula, is_smoothed, rows in self._groups:
            # Zeros for the others before and after: a number that is none must reach nobody through the gradient.
            losses = formula(torch.where(rows, logits, 0.0), labels, smoothing if is_smoothed else 0.0)
            total = total + torch.where(rows[:, 0], losses, 0.0)
        return total

    def _by_own(self, logits: Tensor, labels: Tensor, taken: int) -> Tensor:
        """Call the user's functions row by row, each with what one run alone would give it."""
        rows = [
            loss(of_run[:, :taken].t(), its[:taken])
            for loss, of_run, its in zip(self._own, logits.unbind(0), labels.unbind(0), strict=True)
        ]
        return F.pad(torch.stack(rows), (0, labels.shape[1] - taken))


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
    return _mse_of_logits(F.softmax(logits, 1), labels, smoothing)


def _mse_of_logits(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    return _without_ignored((logits - _targets(logits, labels, smoothing)).square().mean(1), labels)


def _targets(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    """Return smoothed one-hot targets of the logits' shape."""
    hot = torch.zeros_like(logits).scatter_(1, labels.clamp(min=0).unsqueeze(1), 1.0)
    return hot * (1 - smoothing) + smoothing / logits.shape[1]


def _without_ignored(losses: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels == IGNORED, 0.0, losses)


def _wide(logits: Tensor) -> Tensor:
    """Return logits of at least 32 bits: losses lose too much in less."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


CROSS_ENTROPY = cross_entropy()
