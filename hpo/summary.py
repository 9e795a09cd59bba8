"""One study at one moment: trials by state, the best, what runs, what is parked, what failed, how long it takes.

Plain statements on Optuna's tables and ours, a fixed few of them however many trials there are; nothing here writes,
takes a lock or loads all trials as objects.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import rows, storage
from hpo import study as studies
from hpo.errors import StudyError
from hpo.failures import Verdict
from hpo.storage import Storage
from hpo.study import Study
from hpo.tables import hpo_failures, hpo_trials, intermediate_values, living_row, restored, trials

WINDOW = 128  # finished trials from which the speed is taken: some waves of a machine full of GPUs
#: Not of those that a fork brought along: Optuna gives a trial that is added finished one time as its start and its end.
RAN = trials.c.datetime_start.is_distinct_from(trials.c.datetime_complete)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best COMPLETE trial."""

    number: int
    value: float


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A trial under a live lease."""

    number: int
    epochs: int
    worker: str
    attempt: int
    curve: list[float]  # what pruners see, by step
    seconds: float  # in training, over the epochs finished; since the start if no epoch was timed


@dataclass(frozen=True, kw_only=True)
class ParkedTrial:
    """A trial that waits for a worker, and the epoch from which it will go on."""

    number: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class FailureCount:
    """A kind of failure: how often attempts failed by it, how often the trial was tried again, what the last one said."""

    kind: str
    count: int
    retried: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One study at one moment."""

    name: str
    direction: str
    sampler: str
    pruner: str
    counts: dict[str, int]  # complete, pruned, fail, running, parked, foreign, waiting: every trial in one of them
    budget: int  # rows that may be spent in all, those that a fork brought along included
    spent: int  # rows in any state but WAITING
    best: Best | None
    stop_reason: str | None
    hold: str | None  # set: nothing is claimed, not even what is parked; see `tables.Hold`
    running: list[RunningTrial]
    parked: list[ParkedTrial]
    failures: list[FailureCount]
    seconds: float  # from the first trial's start to now, or to the last trial's end if none runs
    seconds_per_trial: float | None  # of the last ones, side by side as they ran; None until two have finished
    seconds_left: float | None  # likewise

    @property
    def finished(self) -> int:
        return self.counts["complete"] + self.counts["pruned"] + self.counts["fail"]

    @property
    def is_over(self) -> bool:
        """Whether a run has nothing to do: no trial to go on with, and no new one allowed."""
        unfinished = self.counts["parked"] + self.counts["running"]
        return not unfinished and (self.spent >= self.budget or self.stop_reason is not None)


def summarize(study: Study, previous: Summary | None = None, *, clock: Callable[[], float] = time.time) -> Summary:
    """Read a study's summary; StudyError if it was deleted meanwhile.

    Args:
        previous: an earlier summary; what only finished trials decide is taken from it while none has finished since.
    """
    with study.storage.engine.connect() as connection:
        row = living_row(connection, study.study_id)
        if row is None or row.uid != study.uid:
            raise StudyError(f"study {study.name!r} was deleted; `hpo run` makes a new one")
        states = _states(connection, study)
        open_trials = _open_trials(connection, study)
        live = [trial for trial in open_trials if trial.live]
        parked = [trial for trial in open_trials if trial.attempt and not trial.live]
        curves = _judged_curves(connection, [trial.trial_id for trial in live])
        times = Counter({state.state: state.times for state in states})
        counts = {
            "complete": times[TrialState.COMPLETE],
            "pruned": times[TrialState.PRUNED],
            "fail": times[TrialState.FAIL],
            "running": len(live),
            "parked": len(parked),
            "foreign": len(open_trials) - len(live) - len(parked),
            "waiting": times[TrialState.WAITING],
        }
        failures = _failures(connection, study, counts["fail"])
        if previous and all(previous.counts[state] == counts[state] for state in ("complete", "pruned", "fail")):
            best, pace = previous.best, previous.seconds_per_trial
        else:
            best, pace = _best(connection, study), _pace(_spans(connection, study))
    budget = row.trials + row.imported
    return Summary(
        name=study.name,
        direction=str(study.spec.direction),
        sampler=str(study.spec.sampler.get("name")),
        pruner=str(study.spec.pruner.get("name")),
        counts=counts,
        budget=budget,
        spent=sum(counts.values()) - counts["waiting"],
        best=best,
        stop_reason=row.stop_reason,
        hold=row.hold,
        running=[_running(trial, curves[trial.trial_id], clock()) for trial in live],
        parked=[ParkedTrial(number=trial.number, epoch=trial.checkpoint_epoch or 0) for trial in parked],
        failures=failures,
        seconds=_elapsed(states, clock() if live else None),
        seconds_per_trial=pace,
        seconds_left=_seconds_left(counts, budget, pace, stopped=row.stop_reason is not None),
    )


def statuses(place: Storage) -> list[Summary]:
    """Read the summary of every study of ours in a storage, in the order they were made."""
    return [summarize(studies.join(place, name)) for name in studies.names(place)]


# --- trials by state --------------------------------------------------------------------------------------------------


def _states(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return for each state how many trials are in it, their first start and their last end."""
    return connection.execute(
        sa.select(
            trials.c.state,
            sa.func.count().label("times"),
            sa.func.min(sa.case((RAN, trials.c.datetime_start))).label("first_start"),
            sa.func.max(sa.case((RAN, trials.c.datetime_complete))).label("last_end"),
        )
        .where(trials.c.study_id == study.study_id)
        .group_by(trials.c.state)
    ).all()


def _open_trials(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return every RUNNING trial, with what our ledger says of it, if anything."""
    return connection.execute(
        sa.select(
            trials.c.trial_id,
            trials.c.number,
            trials.c.datetime_start,
            hpo_trials.c.worker,
            hpo_trials.c.attempt,
            hpo_trials.c.checkpoint_epoch,
            (hpo_trials.c.lease_until >= storage.now(connection)).label("live"),
            rows.trained_seconds(study),
        )
        .select_from(rows.with_ours(study))
        .where(trials.c.study_id == study.study_id, trials.c.state == TrialState.RUNNING)
        .order_by(trials.c.number)
    ).all()


def _running(trial: Any, curve: Mapping[int, float], now: float) -> RunningTrial:
    since_start = max(0.0, now - rows.timestamp(trial.datetime_start))
    return RunningTrial(
        number=trial.number,
        epochs=max(curve, default=0),
        worker=trial.worker,
        attempt=trial.attempt,
        curve=[value for _, value in sorted(curve.items())],
        seconds=since_start if trial.trained_seconds is None else trial.trained_seconds,
    )


def _judged_curves(connection: sa.Connection, ids: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return {trial id: {step: value}} of what Optuna was told."""
    curves: dict[int, dict[int, float]] = {trial_id: {} for trial_id in ids}
    for chunk in rows.chunks(ids):
        for row in connection.execute(
            sa.select(
                intermediate_values.c.trial_id,
                intermediate_values.c.step,
                intermediate_values.c.intermediate_value,
                intermediate_values.c.intermediate_value_type,
            ).where(intermediate_values.c.trial_id.in_(chunk))
        ):
            curves[row.trial_id][row.step] = restored(row.intermediate_value, row.intermediate_value_type)
    return curves


# --- what finished trials decide --------------------------------------------------------------------------------------


def _best(connection: sa.Connection, study: Study) -> Best | None:
    found = rows.ranked(connection, study, 1)
    return Best(number=found[0].number, value=rows.value_of(found[0])) if found else None


def _failures(connection: sa.Connection, study: Study, fails: int) -> list[FailureCount]:
    """Return the kinds of failure that occurred, the most frequent first.

    Args:
        fails: how many trials are FAIL.
    """
    ours = hpo_failures.c.study_uid == study.uid
    kinds = connection.execute(
        sa.select(
            hpo_failures.c.kind,
            sa.func.count().label("times"),
            sa.func.sum(sa.case((hpo_failures.c.verdict == Verdict.RETRY, 1), else_=0)).label("retried"),
        )
        .where(ours)
        .group_by(hpo_failures.c.kind)
    ).all()
    found = [
        FailureCount(
            kind=row.kind, count=row.times, retried=int(row.retried), message=_last_message(connection, ours, row.kind)
        )
        for row in kinds
    ]
    if fails and (foreign := _foreign_failures(connection, study)):
        found.append(FailureCount(kind="foreign", count=foreign, retried=0, message=""))
    return sorted(found, key=lambda failure: (-failure.count, failure.kind))


def _last_message(connection: sa.Connection, ours: sa.ColumnElement[bool], kind: str) -> str:
    last = hpo_failures.c.failed_at.desc(), hpo_failures.c.trial_id.desc()
    found = sa.select(hpo_failures.c.message).where(ours, hpo_failures.c.kind == kind).order_by(*last).limit(1)
    return str(connection.execute(found).scalar_one())


def _foreign_failures(connection: sa.Connection, study: Study) -> int:
    """Count the FAIL trials that have no outcome of ours: somebody else's."""
    found = (
        sa.select(sa.func.count())
        .select_from(rows.with_ours(study))
        .where(trials.c.study_id == study.study_id, trials.c.state == TrialState.FAIL, hpo_trials.c.outcome.is_(None))
    )
    return int(connection.execute(found).scalar_one())


# --- time -------------------------------------------------------------------------------------------------------------


def _elapsed(states: Sequence[Any], until: float | None) -> float:
    starts = [state.first_start for state in states if state.first_start]
    ends = [rows.timestamp(state.last_end) for state in states if state.last_end]
    if not starts:
        return 0.0
    started = rows.timestamp(min(starts))
    return max(0.0, (until if until is not None else max(ends, default=started)) - started)


def _spans(connection: sa.Connection, study: Study) -> list[tuple[float, float]]:
    """Return (start, end) of the last trials that ran to an end; not of those taken up twice, which hold a pause."""
    found = connection.execute(
        sa.select(trials.c.datetime_start, trials.c.datetime_complete)
        .select_from(rows.with_ours(study))
        .where(
            trials.c.study_id == study.study_id,
            trials.c.state.in_(rows.FINISHED),
            trials.c.datetime_start.is_not(None),
            trials.c.datetime_complete.is_not(None),
            RAN,
            sa.func.coalesce(hpo_trials.c.attempt, 1) == 1,
        )
        .order_by(trials.c.trial_id.desc())
        .limit(WINDOW)
    )
    return [(rows.timestamp(start), rows.timestamp(end)) for start, end in found]


def _pace(spans: Sequence[tuple[float, float]]) -> float | None:
    """Return the seconds per finished trial over the time in which at least one of them ran; None for fewer than two.

    Hours when nobody worked do not count, and trials side by side make it shorter.
    """
    if len(spans) < 2:
        return None
    busy, until = 0.0, -math.inf
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / len(spans)


def _seconds_left(counts: Mapping[str, int], budget: int, pace: float | None, *, stopped: bool) -> float | None:
    """Return how long the trials ahead take at this pace; a running one counts as half done."""
    if pace is None:
        return None
    ahead = counts["running"] + counts["parked"]
    if not stopped:
        ahead = max(ahead, budget - counts["complete"] - counts["pruned"] - counts["fail"] - counts["foreign"])
    return max(0.0, ahead - counts["running"] / 2) * pace
