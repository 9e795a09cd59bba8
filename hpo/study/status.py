"""One study at one moment: trials by state, the best, what runs, what is parked, what failed, how long it takes.

Plain statements on Optuna's tables and ours, a fixed few of them however many trials there are; nothing here writes or
takes a lock. A first reading looks at every trial once; one that goes on from an earlier one looks at those alone that
are new or had not ended by then, so a refresh costs the same however many have finished.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from heapq import nlargest
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.spec.failures import Verdict
from hpo.storage.tables import FINISHED, hpo_failures, intermediate_values, living_row, restored, trials
from hpo.storage.trial_rows import chunks
from hpo.study import query
from hpo.study.study import Study

WINDOW = 128  # finished trials from which the speed is taken: some waves of a machine full of GPUs


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best COMPLETE trial that violates no constraint; of several objectives the best in the first."""

    number: int
    value: float


@dataclass(frozen=True, kw_only=True)
class FrontTrial:
    """A trial that none beats."""

    number: int
    values: dict[str, float]  # by objective


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
    objectives: dict[str, str] = field(default_factory=dict)  # name -> direction, if there are several
    front: list[FrontTrial] = field(default_factory=list)  # the best in the first objective first, likewise
    infeasible: int = 0  # COMPLETE trials that violate a constraint

    @property
    def searched_by(self) -> str:
        """What proposes its trials, and what ends them early."""
        return f"sampler {self.sampler}, pruner {self.pruner}"

    @property
    def finished(self) -> int:
        return self.counts["complete"] + self.counts["pruned"] + self.counts["fail"]

    @property
    def is_over(self) -> bool:
        """Whether a run has nothing to do: no trial to go on with, and no new one allowed."""
        unfinished = self.counts["parked"] + self.counts["running"]
        return not unfinished and (self.spent >= self.budget or self.stop_reason is not None)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What trials add up to; it grows by what is added and forgets nothing that matters later."""

    states: Counter[TrialState] = field(default_factory=Counter)  # how many trials are in each
    foreign_fails: int = 0  # FAIL without an outcome of ours: somebody else's
    first_start: datetime | None = None  # UTC, without a zone
    last_end: datetime | None = None  # likewise
    best: Best | None = None
    front: tuple[
        tuple[Any, query.Judged], ...
    ] = ()  # of several objectives: the trials that lead, and what each came to
    infeasible: int = 0  # COMPLETE trials that violate a constraint
    spans: tuple[tuple[int, datetime, datetime], ...] = ()  # number, start and end of the last that ran to an end

    def plus(self, found: Sequence[Any], study: Study, judged: Mapping[int, query.Judged]) -> Tally:
        """Return the tally with more trials, each a row of `query.since`.

        Args:
            judged: what the COMPLETE ones of them came to, by id.
        """
        complete = [row for row in found if row.state == TrialState.COMPLETE and row.value_type is not None]
        feasible = [row for row in complete if not judged[row.trial_id].violated]
        # One that is added finished, as by a fork, took no time: it has one time as its start and its end.
        ran = [row for row in found if row.datetime_start != row.datetime_complete]
        return Tally(
            states=self.states + Counter(row.state for row in found),
            foreign_fails=self.foreign_fails
            + sum(row.state == TrialState.FAIL and row.outcome is None for row in found),
            first_start=min(filter(None, [self.first_start, *(row.datetime_start for row in ran)]), default=None),
            last_end=max(filter(None, [self.last_end, *(row.datetime_complete for row in ran)]), default=None),
            best=_best(self.best, feasible, str(study.spec.direction)),
            front=_front(study, [*self.front, *((row, judged[row.trial_id]) for row in feasible)]),
            infeasible=self.infeasible + len(complete) - len(feasible),
            spans=tuple(nlargest(WINDOW, [*self.spans, *_spans(ran)])),
        )


@dataclass(frozen=True, kw_only=True)
class Past:
    """What was read of a study and stands: a reading that goes on from here need not read it again."""

    cursor: query.Cursor = field(default_factory=query.Cursor)
    tally: Tally = field(default_factory=Tally)  # of the trials that the cursor has passed for good
    recorded: int = 0  # failures
    failures: Sequence[FailureCount] = ()  # by kind, what they say


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A study as it was read."""

    summary: Summary
    ended: Sequence[int]  # ids of the trials that have ended since the reading that this one goes on from
    past: Past


def read(study: Study, past: Past | None = None, *, clock: Callable[[], float] = time.time) -> Reading:
    """Read how a study stands; StudyError if it was deleted meanwhile.

    Args:
        past: what an earlier reading of the study left; without it every trial is read.
    """
    past = past or Past()
    with study.storage.engine.connect() as connection:
        row = living_row(connection, study.study_id)
        if row is None or row.uid != study.uid:
            raise StudyError(f"study {study.name!r} was deleted; `hpo run` makes a new one")
        news = query.since(connection, study, past.cursor)
        judged = query.judged(connection, study, news.complete)
        running = [trial for trial in news.pending if trial.state == TrialState.RUNNING]
        live = [trial for trial in running if trial.live]
        curves = _judged_curves(connection, [trial.trial_id for trial in live])
        trained = _trained_seconds(connection, study, [trial.trial_id for trial in live])
        recorded = _recorded_failures(connection, study)
        failures = past.failures if recorded == past.recorded else _failures(connection, study)
    final = past.tally.plus(news.final, study, judged)
    tally = final.plus(news.pending, study, judged)
    parked = [trial for trial in running if trial.attempt and not trial.live]
    counts = {
        "complete": tally.states[TrialState.COMPLETE],
        "pruned": tally.states[TrialState.PRUNED],
        "fail": tally.states[TrialState.FAIL],
        "running": len(live),
        "parked": len(parked),
        "foreign": len(running) - len(live) - len(parked),
        "waiting": tally.states[TrialState.WAITING],
    }
    budget, pace = row.trials + row.imported, _pace(tally.spans)
    summary = Summary(
        name=study.name,
        direction=str(study.spec.direction),
        sampler=str(study.spec.sampler.get("name")),
        pruner=str(study.spec.pruner.get("name")),
        counts=counts,
        budget=budget,
        spent=sum(counts.values()) - counts["waiting"],
        best=tally.best,
        stop_reason=row.stop_reason,
        hold=row.hold,
        running=[_running(trial, curves[trial.trial_id], trained.get(trial.trial_id), clock()) for trial in live],
        parked=[ParkedTrial(number=trial.number, epoch=trial.checkpoint_epoch or 0) for trial in parked],
        failures=with_foreign(failures, tally.foreign_fails),
        seconds=_elapsed(tally, clock() if live else None),
        seconds_per_trial=pace,
        seconds_left=_seconds_left(counts, budget, pace, stopped=row.stop_reason is not None),
        objectives=dict(study.spec.objectives),
        front=[
            FrontTrial(number=one.number, values=query.named(study, came_to.values)) for one, came_to in tally.front
        ],
        infeasible=tally.infeasible,
    )
    after = Past(cursor=news.cursor, tally=final, recorded=recorded, failures=failures)
    return Reading(summary=summary, ended=news.ended, past=after)


def summarize(study: Study, *, clock: Callable[[], float] = time.time) -> Summary:
    """Read a study's summary from scratch; StudyError if it was deleted meanwhile."""
    return read(study, clock=clock).summary


# --- what trials add up to --------------------------------------------------------------------------------------------


def _best(known: Best | None, found: Sequence[Any], direction: str) -> Best | None:
    """Return the best of what is known and of COMPLETE trials found, as `query.ranked` has them: of equals the lower number."""
    sign = -1 if direction == "maximize" else 1
    keys = [(sign * query.value_of(row), row.number) for row in found]
    if known:
        keys.append((sign * known.value, known.number))
    if not keys:
        return None
    value, number = min(keys)
    return Best(number=number, value=sign * value)


def _front(study: Study, found: Sequence[tuple[Any, query.Judged]]) -> tuple[tuple[Any, query.Judged], ...]:
    """Return those that lead of COMPLETE trials and what they came to, if there are several objectives."""
    if not study.spec.objectives:
        return ()
    numbers = {row.trial_id: row.number for row, _ in found}
    known = {row.trial_id: came_to for row, came_to in found}
    return tuple(found[position] for position in query.positions(study, numbers, known))


def _spans(ran: Sequence[Any]) -> list[tuple[int, datetime, datetime]]:
    """Return (number, start, end) of trials that ran to an end; not of those taken up twice, which hold a pause."""
    return [
        (row.number, row.datetime_start, row.datetime_complete)
        for row in ran
        if row.state in FINISHED and row.datetime_start and row.datetime_complete and row.attempt in (None, 1)
    ]


# --- what runs --------------------------------------------------------------------------------------------------------


def _running(trial: Any, curve: Mapping[int, float], trained: float | None, now: float) -> RunningTrial:
    since_start = max(0.0, now - query.timestamp(trial.datetime_start))
    return RunningTrial(
        number=trial.number,
        epochs=max(curve, default=0),
        worker=trial.worker,
        attempt=trial.attempt,
        curve=[value for _, value in sorted(curve.items())],
        seconds=since_start if trained is None else trained,
    )


def _trained_seconds(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, float | None]:
    """Return {trial id: seconds in training}, None for one none of whose epochs was timed."""
    timed = sa.select(trials.c.trial_id, query.trained_seconds(study))
    return {
        row.trial_id: row.trained_seconds
        for chunk in chunks(ids)
        for row in connection.execute(timed.where(trials.c.trial_id.in_(chunk)))
    }


def _judged_curves(connection: sa.Connection, ids: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return {trial id: {step: value}} of what Optuna was told."""
    curves: dict[int, dict[int, float]] = {trial_id: {} for trial_id in ids}
    for chunk in chunks(ids):
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


# --- failures ---------------------------------------------------------------------------------------------------------


def _recorded_failures(connection: sa.Connection, study: Study) -> int:
    """Count the failures recorded: by the table's key alone, which says whether there is anything to read again.

    The rows are many and long, and no index leads to the new ones: a worker may record late that it lost a trial which
    finished long ago. But each is a row of its own, since its key holds attempt and kind, and none is ever deleted; only
    what was recorded and is sent again, because the answer was lost, overwrites a row, and says the same.
    """
    of_study = sa.select(sa.func.count()).where(hpo_failures.c.study_uid == study.uid)
    return int(connection.execute(of_study).scalar_one())


def _failures(connection: sa.Connection, study: Study) -> list[FailureCount]:
    """Return the kinds of failure of which something is recorded, with what the last one of each said."""
    kind, latest = hpo_failures.c.kind, [hpo_failures.c.failed_at.desc(), hpo_failures.c.trial_id.desc()]
    retried = sa.case((hpo_failures.c.verdict == Verdict.RETRY, 1), else_=0)
    found = (
        sa.select(
            kind,
            hpo_failures.c.message,
            sa.func.count().over(partition_by=kind).label("times"),
            sa.func.sum(retried).over(partition_by=kind).label("retried"),
            sa.func.row_number().over(partition_by=kind, order_by=latest).label("place"),
        )
        .where(hpo_failures.c.study_uid == study.uid)
        .subquery()
    )
    return [
        FailureCount(kind=row.kind, count=row.times, retried=int(row.retried), message=row.message)
        for row in connection.execute(sa.select(found).where(found.c.place == 1))
    ]


def with_foreign(failures: Sequence[FailureCount], foreign: int) -> list[FailureCount]:
    """Return the failures, those of foreign trials included, the most frequent first."""
    found = [*failures]
    if foreign:
        found.append(FailureCount(kind="foreign", count=foreign, retried=0, message=""))
    return sorted(found, key=lambda failure: (-failure.count, failure.kind))


# --- time -------------------------------------------------------------------------------------------------------------


def _elapsed(tally: Tally, until: float | None) -> float:
    if tally.first_start is None:
        return 0.0
    started = query.timestamp(tally.first_start)
    ended = query.timestamp(tally.last_end) if tally.last_end else started
    return max(0.0, (ended if until is None else until) - started)


def _pace(spans: Sequence[tuple[int, datetime, datetime]]) -> float | None:
    """Return the seconds per finished trial over the time in which at least one of them ran; None for fewer than two.

    Hours when nobody worked do not count, and trials side by side make it shorter.
    """
    if len(spans) < 2:
        return None
    busy, until = 0.0, -math.inf
    for start, end in sorted((query.timestamp(start), query.timestamp(end)) for _, start, end in spans):
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
