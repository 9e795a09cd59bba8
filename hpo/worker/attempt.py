"""Attempts at trials, from their opening to their end: settled, parked or, if another owns it by now, nothing written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from hpo.errors import ChangedSpace, LostLease, MismatchError, Parked, Stopped, TimeUp, Unasked
from hpo.queue.finish import End
from hpo.queue.models import Claim
from hpo.search import samplers
from hpo.spec.failures import Failure, Verdict, signal_behind
from hpo.storage.trial_rows import TrialRow
from hpo.study import retention
from hpo.study.query import SECONDS
from hpo.study.study import Study, as_in_optimize
from hpo.worker import pending_reports
from hpo.worker.client import Lease
from hpo.worker.trial import OWN_METRIC, LeasedTrial

log = logging.getLogger(__name__)


class Attempt:
    """A worker's attempt at one claimed trial."""

    def __init__(self, study: Study, lease: Lease) -> None:
        self.study = study
        self.lease = lease
        self.is_over = False  # the trial is settled, parked or left to its new owner
        self._sampler = samplers.build(study.spec, lease.claim.number)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let Optuna's study be as inside `study.optimize` on this trial."""
        self.study.optuna.sampler = self._sampler
        with as_in_optimize(self.study.optuna):
            yield

    def open(self) -> LeasedTrial | None:
        """Return the trial, ready to be trained; None if that failed, by the sampler for one, which is written already."""
        opened: list[LeasedTrial] = []
        with self.letting_go(), self.at_work():
            try:
                opened.append(open_trial(self.study, self.lease))
            except Exception as error:
                failure = Failure.of(error)
                note(self.lease, failure, self.lease.retry(lambda: self.lease.ledger.fail(self.lease.claim, failure)))
        return opened[0] if opened else None

    def end(self, trial: LeasedTrial, outcome: Callable[[], Any]) -> None:
        """End the trial by what `outcome` returns, which is its value, or raises."""
        end_all([Ending(self, trial, outcome)])

    @contextmanager
    def letting_go(self) -> Iterator[None]:
        """Park the trial, or leave it to its new owner, where that is how the block ends.

        Raises MismatchError, with the trial handed back as if it had never begun, where changed code does not fit the study.
        """
        lease = self.lease
        try:
            yield
        except Parked:
            lease.retry(lambda: lease.ledger.park(lease.claim))
            log.info(
                "trial %d parked", lease.claim.number, extra={"action": "trial_parked", "trial": lease.claim.number}
            )
        except ChangedSpace as changed:
            given = changed.given
            lease.retry(lambda: lease.ledger.hand_back(lease.claim, given))
            raise MismatchError(str(changed)) from None
        except LostLease as lost:
            message = str(lost)
            log.warning("%s", message, extra={"action": "lease_lost", "trial": lease.claim.number})
            lease.retry(lambda: lease.ledger.drop(lease.claim, message))


def open_trial(study: Study, lease: Lease) -> LeasedTrial:
    """Return the claimed trial with the curve it has so far, what an earlier attempt could not record included."""
    claim = lease.claim
    if claim.began is not None:
        fresh = TrialRow(claim.trial_id, claim.number, TrialState.RUNNING, started=claim.began, completed=None)
        study.storage.optuna.prime(study.study_id, fresh)
    metric = OWN_METRIC if study.spec.objective else f"validation_{study.spec.metric}"
    curve = lease.retry(lambda: lease.ledger.curve(lease.claim, metric)) if lease.claim.checkpoint else []
    spec = study.spec
    trial = LeasedTrial(study.optuna, lease, spec.rule, curve, spec.goals, shifts=spec.format == 1)
    pending_reports.take(study.trial_folder(trial.number), trial)
    limit = study.spec.budget.trial_seconds
    if limit is not None:
        spent = lease.retry(lambda: sum(lease.ledger.curve(lease.claim, SECONDS)))
        lease.seconds_left = limit - spent
    return trial


@dataclass(frozen=True)
class Ending:
    """An attempt that ends by what `outcome` returns, which is the trial's value, or raises."""

    attempt: Attempt
    trial: LeasedTrial
    outcome: Callable[[], Any]


def end_all(endings: Sequence[Ending]) -> None:
    """End attempts of one worker: those that did not fail in one transaction, after the others."""
    if not endings:
        return
    ends: dict[Claim, tuple[Ending, End]] = {}
    for ending in endings:
        attempt, trial = ending.attempt, ending.trial
        with attempt.letting_go(), attempt.at_work():
            end = conclude(trial, ending.outcome)
            if end is not None:
                ends[end.claim] = ending, end
        attempt.is_over = attempt.lease.claim not in ends
    lease, study = endings[0].attempt.lease, endings[0].attempt.study
    lost = lease.retry(lambda: lease.ledger.finish_all([end for _, end in ends.values()]))
    for claim, (ending, _) in ends.items():
        with ending.attempt.letting_go():
            if claim in lost:
                raise LostLease(f"trial {claim.number}: was taken up or ended by another process")
            note_settled(ending.trial)
        ending.attempt.is_over = True
    lease.retry(lambda: retention.delete_stale(study))


def conclude(trial: LeasedTrial, outcome: Callable[[], Any]) -> End | None:
    """Return the end of a trial by what `outcome` returns or raises, to be written; None if it is written already, since the
    trial failed or a person ended it.
    """
    try:
        value = trial.judge(outcome())
        trial.lease.flush()
        trial.lease.check()  # of what was kept until now the database may have refused something for good
    except BaseException as error:  # SystemExit, CancelledError, ...: an objective's affair, and no end of the worker
        why = signal_behind(error)  # whatever user code made of it: "pruned", for one
        if why is not None and not isinstance(why, Stopped | TimeUp | Unasked):
            trial.pass_on_a_stop()
            raise why from None
        if why is None and isinstance(error, optuna.TrialPruned):
            return trial.ending(TrialState.PRUNED, trial.last_finite, reason=str(error) or None)
        failure = None if isinstance(why, Stopped) else Failure.of(why or error)
    else:
        return trial.ending(TrialState.COMPLETE, value, reason=trial.end_reason)
    if failure is None:
        trial.end_as_stopped()
    else:  # outside of the handler: the exception's frames, and what they hold, are gone
        note(trial.lease, failure, trial.fail(failure))
    note_settled(trial)
    return None


def note_settled(trial: LeasedTrial) -> None:
    """Say that this attempt has written the trial's end, or that of itself."""
    log.info("trial %d settled", trial.number, extra={"action": "trial_settled", "trial": trial.number})


def note(lease: Lease, failure: Failure, verdict: Verdict) -> None:
    """Say what an attempt failed by and what was done about it."""
    lease.failed_by = failure.kind
    log.warning("trial %d: %s (%s): %s", lease.claim.number, failure.kind, verdict, failure.message)
