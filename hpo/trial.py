"""The trial that an objective gets: Optuna's own, whose reports go through the ledger.

It is an `optuna.Trial` in every respect. A report also renews the lease, and both `report` and `should_prune` are where
a trial learns that it must let go: Parked when the worker was asked to stop, LostLease when another one owns it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.curve import ValueRule
from hpo.errors import LostLease, Outage, Parked
from hpo.ledger import Checkpoint, Claim, Ledger, Report
from hpo.storage import cause
from hpo.study import stop_was_requested

log = logging.getLogger(__name__)

OWN_METRIC = "value"  # how the curve of a user's own objective is called in the ledger


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a trial needs of its worker: the claim, the writes, the rule for its value, and whether to stop."""

    ledger: Ledger
    claim: Claim
    rule: ValueRule | None
    stopping: Callable[[], bool]


@contextmanager
def storing() -> Iterator[None]:
    """Turn an error of the storage into an Outage: inside an objective it would pass for the objective's own."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        raise Outage(cause(error)) from error


class LeasedTrial(optuna.trial.Trial):
    """A trial held under a lease."""

    def __init__(self, study: optuna.Study, desk: Desk, curve: list[float] | None = None) -> None:
        """Open a claimed trial; `curve` is what it reported before, up to its checkpoint."""
        super().__init__(study, desk.claim.trial_id)
        self.desk = desk
        self.curve = list(curve or [])  # the judged metric, raw, by epoch
        self._first_step: int | None = None
        self._last_step = -1

    def report(self, value: float, step: int) -> None:
        """Report a value as `optuna.Trial.report` does; a first report at step 0 shifts the trial's steps by one.

        A step counts finished epochs from 1; from 0, successive halving would put its rungs at the wrong epochs.
        """
        number, step = self._checked(value, step)
        self._first_step = step if self._first_step is None else self._first_step
        step += 1 if self._first_step == 0 else 0
        if step <= self._last_step:
            warnings.warn(f"trial {self.number}: step {step} was reported already; ignored", stacklevel=2)
            return
        self.report_epoch(step, number, {OWN_METRIC: number})

    @staticmethod
    def _checked(value: Any, step: Any) -> tuple[float, int]:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"report: value {value!r} is a {type(value).__name__}, not a number") from None
        if int(step) < 0:
            raise ValueError(f"report: step {step} is negative; count epochs from 1")
        return number, int(step)

    def report_epoch(self, step: int, value: float, metrics: Mapping[str, float]) -> None:
        """Report the judged metric's raw value at a step and the raw metrics beside it, and renew the lease.

        What Optuna sees at a step is the study's rule applied to the curve so far.
        """
        self.curve.append(value)
        judged = self.desk.rule(self.curve) if self.desk.rule else value
        with storing():
            lost = self.desk.ledger.report([Report(claim=self.desk.claim, step=step, value=judged, metrics=metrics)])
        if lost:
            raise LostLease(f"trial {self.number}: another worker has taken it up")
        self._last_step = step
        self._cached_frozen_trial.intermediate_values[step] = judged

    def should_prune(self) -> bool:
        """Ask the study's pruner; Parked if the worker is stopping."""
        if self.desk.stopping():
            raise Parked(f"trial {self.number}: the worker is stopping")
        return self.pruner_says_stop()

    def pruner_says_stop(self) -> bool:
        """Ask the study's pruner, whatever the worker is up to: for who parks at a moment of its own choice."""
        return super().should_prune()

    def start_over(self) -> None:
        """Go back to epoch 0, since the checkpoint cannot be read; the parameters stay."""
        with storing():
            self.desk.ledger.start_over(self.desk.claim)
        self.curve.clear()
        self._cached_frozen_trial.intermediate_values.clear()

    def record_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint file from which another worker can go on."""
        with storing():
            self.desk.ledger.record_checkpoint(self.desk.claim, checkpoint)

    def record_receipt(self, receipt: Mapping[str, Any]) -> None:
        """Record what the trial is being made from."""
        with storing():
            self.desk.ledger.record_receipt(self.desk.claim, receipt)

    def judge(self, returned: Any) -> float:
        """Return the trial's value: the rule on its curve if there is one, else what the objective returned.

        Raises ValueError for what is no finite number.
        """
        value = self.desk.rule(self.curve) if self.desk.rule and self.curve else returned
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"the objective returned {value!r}, a {type(value).__name__}; return one number") from None
        if not math.isfinite(number):
            raise ValueError(f"the objective returned {number}; a trial's value must be a finite number")
        return number

    def settle(self, state: TrialState, value: float | None, *, outcome: str, reason: str | None = None) -> None:
        """Tell the sampler, then write the trial's end; LostLease if another worker owns it by now."""
        frozen = self._get_latest_trial()
        values = None if value is None else [value]
        try:
            filtered = optuna.pruners._filter_study(self.study, frozen)
            self.study.sampler.after_trial(filtered, frozen, state, values)
        except Exception:  # as in Optuna, a sampler's trouble does not keep a trial from its end
            log.warning("trial %d: the sampler failed after it", self.number, exc_info=True)
        if stop_was_requested(self.study):  # before the trial ends: a kill in between must not lose it
            self.desk.ledger.stop("the objective or the sampler called study.stop()")
        self.desk.ledger.finish(self.desk.claim, state, value, outcome=outcome, reason=reason)
