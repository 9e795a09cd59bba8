"""What one epoch of training brought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpo.spec.metrics import column


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
