"""The result of one epoch of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpo.spec.metrics import column


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """The result of one epoch. Losses are means of the run's own loss, and not finite if training diverged."""

    epoch: int  # epochs finished, from 1
    train_loss: float  # mean over the epoch's steps, each before its update
    validation_loss: float  # without label smoothing
    validation_accuracy: float | None  # share of right targets, 0..1; None for a regression
    learning_rate: float  # of the first parameter group, in the epoch's last step
    seconds: float  # training and validation
    watched: Mapping[str, float] = field(default_factory=dict)  # further measured values, under the names of the ledger

    def judged(self, metric: str) -> float:
        """Return the validation value of a metric; KeyError if it was not measured."""
        return self.numbers[column(metric)]

    @property
    def numbers(self) -> dict[str, float]:
        """All measured values, under the names of the ledger."""
        found = {key: value for key, value in vars(self).items() if key not in ("epoch", "watched")}
        plain = {key: float(value) for key, value in found.items() if value is not None}
        return plain | dict(self.watched)
