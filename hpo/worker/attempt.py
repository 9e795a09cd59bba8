"""An attempt at a trial, from its opening to its end.

The trial is settled or parked. If the claim is lost, nothing is written to the trial.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import TrialState

from hpo.errors import ChangedSpace, Diverged, LostLease, MismatchError, Parked, Stopped, TimeUp, Unasked
from hpo.queue.finish import STATES, End
from hpo.spec.failures import Failure, Kind, Verdict, signal_behind
from hpo.spec.metrics import OWN_METRIC
from hpo.spec.objectives import Beside
from hpo.storage.optuna_private import as_in_optimize, bracket_of, forget_stop, look_anew, stop_was_requested
from hpo.storage.trial_rows import TrialRow
from hpo.strategy import samplers
from hpo.study import retention
from hpo.study.format import value_text
from hpo.study.query.trial_columns import SECONDS
from hpo.study.study import Study
from hpo.worker import pending_reports
from hpo.worker.client import QueueClient
from hpo.worker.lease import Lease
from hpo.worker.trial import LeasedTrial

if TYPE_CHECKING:
    from hpo.spec.space import Tree
    from hpo.spec.training import TrainConfig
    from hpo.train.run import Run
    from hpo.worker.checkpoints import CheckpointManager

log = logging.getLogger(__name__)
Outcome = Callable[[], Any]  # how an attempt ends: it returns the trial's value, or raises


class Attempt:
    """A worker's attempt at one claimed trial."""

    trial: LeasedTrial  # set by `open`
    # Set by the trainer of a declared study:
    pinned: Tree  # the study's tree with a value at each leaf; the values are not checked together yet
    config: TrainConfig
    run: Run
    checkpoints: CheckpointManager
    stack_key: str  # runs with the same key may train in one stack; optimizer, schedule, seed and epochs may differ

    def __init__(self, study: Study, client: QueueClient, lease: Lease) -> None:
        self.study = study
        self.client = client
        self.lease = lease
        self.number = lease.claim.number
        self.finer_accumulation: int | None = None  # micro-batches per batch for another attempt if memory runs out
        self.end_reason: str | None = None  # why it completes before its last epoch
        self.failed_by: Kind | None = None  # the failure that ended it, if one did
        self.is_over = False  # the trial is settled, parked or lost
        self._sampler = samplers.build(study.spec, self.number)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Make Optuna's study behave as inside `study.optimize` on this trial."""
        self.study.optuna.sampler = self._sampler
        with as_in_optimize(self.study.optuna):
            yield

    def open(self) -> bool:
        """Open the trial for training. Return False if that failed, for example in the sampler: that is written."""
        attempt = self.lease.claim.attempt
        log.info(
            "trial %d begins, attempt %d", self.number, attempt, extra={"action": "trial_begins", "trial": self.number}
        )
        with self.ending_by_signal(), self.at_work():
            try:
                self.trial = open_trial(self.study, self.client, self.lease)
                return True
            except Exception as error:
                failure = Failure.of(error)
                self._note(failure, self.client.fail(self.lease, failure))
                self.note_settled()
        return False

    def must_end(self) -> bool:
        """Return whether the attempt must end. It is called before every batch."""
        return self.client.must_end(self.lease)

    def let_go(self) -> None:
        """Raise the Signal that says why the attempt must end, if it must."""
        self.client.let_go(self.lease)

    def end(self, outcome: Outcome) -> None:
        """End the trial."""
        end_all({self: outcome})

    def conclude(self, outcome: Outcome) -> End | None:
        """Return the trial's end, which the caller writes. Return None if it failed or a person ended it: that is written."""
        trial = self.trial
        try:
            value = trial.judge(outcome())
            self.client.flush(self.lease)
            self.lease.check()  # the database may have refused a kept report for good
        except BaseException as error:
            # SystemExit, CancelledError and the like end the objective, not the worker.
            why = signal_behind(error)  # user code may have caught the Signal and raised another error
            if why is not None and not isinstance(why, Stopped | TimeUp | Unasked | Diverged):
                pass_on_a_stop(trial)
                raise why from None
            if why is None and isinstance(error, optuna.TrialPruned):
                return ending(trial, TrialState.PRUNED, trial.last_finite, reason=str(error) or self._why_pruned(trial))
            failure = None if isinstance(why, Stopped) else Failure.of(why or error)
        else:
            return ending(trial, TrialState.COMPLETE, value, reason=self.end_reason)
        if failure is None:
            self.client.flush(self.lease)
            self.client.end_as_stopped(self.lease)
        else:  # outside the handler, where the exception's frames and what they hold are freed
            self._note(failure, fail(trial, failure, accumulation=self.finer_accumulation))
        self.note_settled()
        return None

    def _why_pruned(self, trial: LeasedTrial) -> str:
        """Return why a trial of the user's own objective ends as PRUNED."""
        if trial.pruned_at is None:
            return "the objective raised TrialPruned without the pruner's word"
        return self.by_the_pruner(trial.pruned_at, "step")

    def by_the_pruner(self, step: int, unit: str) -> str:
        """Return the pruner's name, and the step and the value at which it decided."""
        value = value_text(self.trial.cached.intermediate_values.get(step))
        return f"by the pruner {self.study.spec.pruner['name']} at {unit} {step}, with {value}"

    @contextmanager
    def ending_by_signal(self) -> Iterator[None]:
        """Park the trial if the block raises Parked, and record a lost claim if it raises LostLease.

        If it raises ChangedSpace, the trial is handed back as if it had never begun, and MismatchError is raised.
        """
        try:
            yield
        except Parked:
            self.client.park(self.lease)
            log.info("trial %d parked", self.number, extra={"action": "trial_parked", "trial": self.number})
        except ChangedSpace as changed:
            self.client.hand_back(self.lease, changed.given)
            raise MismatchError(str(changed)) from None
        except LostLease as lost:
            log.warning("%s", lost, extra={"action": "lease_lost", "trial": self.number})
            self.client.drop(self.lease, str(lost))
            log.info("trial %d left", self.number, extra={"action": "trial_left", "trial": self.number})

    def note_settled(self) -> None:
        """Log that the end of the trial or of this attempt is written."""
        log.info("trial %d settled", self.number, extra={"action": "trial_settled", "trial": self.number})

    def _note(self, failure: Failure, verdict: Verdict) -> None:
        """Log how the attempt failed and what was done about it."""
        self.failed_by = failure.kind
        log.warning("trial %d: %s (%s): %s", self.number, failure.kind, verdict, failure.message)


def open_trial(study: Study, client: QueueClient, lease: Lease) -> LeasedTrial:
    """Return the claimed trial with its curve so far, including what an earlier attempt could not record."""
    claim = lease.claim
    if claim.began is not None:
        fresh = TrialRow(claim.trial_id, claim.number, TrialState.RUNNING, started=claim.began, completed=None)
        study.storage.optuna.prime(study.study_id, fresh)
    metric = f"validation_{study.spec.metric}" if study.spec.is_declared else OWN_METRIC
    curve = client.curve(lease, metric) if claim.checkpoint else []
    spec = study.spec
    trial = LeasedTrial(
        study.optuna, client, lease, spec.rule, curve, spec.goals, guard=spec.guard, shifts=spec.format == 1
    )
    pending_reports.take(study.store, trial)
    limit = study.spec.budget.trial_seconds
    if limit is not None:
        lease.seconds_left = limit - sum(client.curve(lease, SECONDS))
    return trial


def end_all(outcomes: Mapping[Attempt, Outcome]) -> None:
    """End attempts of one worker. Those that did not fail are written last, in one transaction."""
    if not outcomes:
        return
    ends: dict[Attempt, End] = {}
    for attempt, outcome in outcomes.items():
        with attempt.ending_by_signal(), attempt.at_work():
            end = attempt.conclude(outcome)
            if end is not None:
                ends[attempt] = end
        attempt.is_over = attempt not in ends
    client, study = attempt.client, attempt.study
    lost = client.finish([*ends.values()])
    for attempt, end in ends.items():
        with attempt.ending_by_signal():
            if end.claim in lost:
                raise LostLease(f"trial {attempt.number}: another process has claimed or ended it")
            attempt.note_settled()
        attempt.is_over = True
    client.calls.retry(lambda: retention.delete_stale(study))


def ending(trial: LeasedTrial, state: TrialState, value: float | None, *, reason: str | None = None) -> End:
    """Call the sampler after a trial that did not fail, and return its end, which the caller writes.

    Raises LostLease if the claim is lost.
    """
    trial.client.flush(trial.lease)
    value, beside = trial.beside(value)
    _tell_the_sampler(trial, state, value, beside)
    pass_on_a_stop(trial)
    outcome = state.name.lower()
    return End(claim=trial.lease.claim, state=state, value=value, outcome=outcome, reason=reason, beside=beside)


def fail(trial: LeasedTrial, failure: Failure, *, accumulation: int | None = None) -> Verdict:
    """Write a failed attempt and apply the study's policy. Raises LostLease if the claim is lost."""
    trial.client.flush(trial.lease)
    pass_on_a_stop(trial)
    verdict = trial.client.fail(trial.lease, failure, accumulation=accumulation)
    if verdict in STATES:
        value = trial.last_finite if verdict is Verdict.PRUNE else None
        _tell_the_sampler(trial, STATES[verdict], *trial.beside(value))
        pass_on_a_stop(trial)
    return verdict


def _tell_the_sampler(trial: LeasedTrial, state: TrialState, value: float | None, beside: Beside) -> None:
    frozen, study = trial.read_anew(), trial.study
    try:
        look_anew(study)
        values = None if value is None else [value, *beside.values]
        study.sampler.after_trial(bracket_of(study, frozen), frozen, state, values)
    except Exception:  # the trial ends all the same, as in Optuna
        log.warning("trial %d: the sampler's after_trial failed", trial.number, exc_info=True)


def pass_on_a_stop(trial: LeasedTrial) -> None:
    """Stop the study if the objective or the sampler asked for it.

    This comes before the trial's end. Otherwise a kill in between would lose the request.
    """
    if stop_was_requested(trial.study):
        trial.client.stop("the objective or the sampler called study.stop()")
        forget_stop(trial.study)
