"""The summary of one study: trials by state, the best, running and parked trials, failures and speed.

Nothing here writes or takes a lock. A first reading reads every trial. A later reading reads only the trials that are
new or had not ended, so a refresh costs the same however many trials have finished.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from heapq import nlargest, nsmallest
from itertools import islice
from typing import Any

from hpo.errors import StudyError
from hpo.queue import limits
from hpo.queue.limits import Limit
from hpo.spec import metrics
from hpo.storage import sql, study_rows
from hpo.storage.tables import FINISHED, STOPPED, Hold
from hpo.strategy import auto_sampler
from hpo.study import interval
from hpo.study.interval import Interval
from hpo.study.query import changes, failure_rows, ranking, recorded, trial_columns
from hpo.study.study import Study

LEADING = 100  # best trials that are kept in sight; what is said of the best tenth is said of at most so many
WINDOW = 128  # finished trials over which the speed is measured: several rounds of a machine with many GPUs


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best COMPLETE trial that violates no constraint. With several objectives, the first one decides."""

    number: int
    value: float
    interval: Interval | None = None  # of the value, if there is one
    rivals: int | None = None  # other COMPLETE trials without a violation whose values lie in the interval
    task: str | None = None  # of the data, if the trial's receipt names it


@dataclass(frozen=True, kw_only=True)
class FrontTrial:
    """A trial on the Pareto front."""

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
    failed: int = 0  # attempts that failed; others before this one only waited for a stack or a worker
    unit: str = "epoch"  # of `epochs`; "step" for an objective of the user's own, whose last step it is
    seconds: float  # in training, over the finished epochs; since the trial's start if no epoch was timed


@dataclass(frozen=True, kw_only=True)
class ParkedTrial:
    """A parked trial and the epoch of its checkpoint, 0 without a checkpoint."""

    number: int
    epoch: int
    unit: str = "epoch"  # of `epoch`; "step" for an objective of the user's own, whose last step it is
    has_checkpoint: bool = False  # without one it starts again, as with a user's own objective


@dataclass(frozen=True, kw_only=True)
class FailureCount:
    """A kind of failure: how many attempts failed so, how many of them were retried, and the latest message."""

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
    counts: dict[str, int]  # by complete, pruned, fail, running, parked, foreign and waiting; each trial counts once
    budget: int  # rows that may be spent, those that a fork copied included
    spent: int  # rows in any state but WAITING
    best: Best | None
    stop_reason: str | None
    hold: str | None  # if set, nothing is claimed, not even parked trials; see `tables.Hold`
    running: list[RunningTrial]
    parked: list[ParkedTrial]
    failures: list[FailureCount]
    seconds: float  # in which a worker was there; without workers, from the first start to the last end
    seconds_per_trial: float | None  # see `_pace`; None until two have finished
    seconds_left: float | None  # None if `seconds_per_trial` is
    objectives: dict[str, str] = field(default_factory=dict)  # name -> direction, if there are several
    front: list[FrontTrial] = field(default_factory=list)  # likewise; the best in the first one first
    infeasible: int = 0  # COMPLETE trials that violate a constraint
    logs: str | None = None  # the folder of what workers print; None of a study of Optuna's own
    bucket: str | None = None  # where checkpoints lie, if that is no folder
    imported: int = 0  # finished trials that a fork copied; also in `counts`, `budget` and `spent`
    metric: str | None = None  # the only objective of a declared training
    value_rule: str | None = None  # which epochs of the metric's curve are a trial's value
    limits: list[Limit] = field(default_factory=list)  # beside the number of trials
    is_grid: bool = False  # its sampler is the grid, by its name or since `auto` stands for it
    code_changes: int = 0  # changes of the user's own code that `--allow-code-change` has accepted

    @property
    def searched_by(self) -> str:
        """The names of its sampler and its pruner."""
        return f"sampler {self.sampler}, pruner {self.pruner}"

    @property
    def finished(self) -> int:
        return self.counts["complete"] + self.counts["pruned"] + self.counts["fail"]

    @property
    def own_finished(self) -> int:
        """The number of finished trials without those that a fork copied."""
        return self.finished - self.imported

    @property
    def own_budget(self) -> int:
        """The budget without the trials that a fork copied, as a study file or `--trials` sets it."""
        return self.budget - self.imported

    @property
    def is_over(self) -> bool:
        """Whether no trial is left to train: none is parked or running, and no new one is allowed."""
        unfinished = self.counts["parked"] + self.counts["running"]
        return not unfinished and (self.spent >= self.budget or self.stop_reason is not None)

    @property
    def has_failed(self) -> bool:
        """Whether the study stopped itself after failures, or is over and every trial has failed."""
        return self.hold == Hold.BROKEN or (self.is_over and self.finished == self.counts["fail"] > 0)


@dataclass(frozen=True, kw_only=True)
class Leading:
    """One of the best COMPLETE trials that violate no constraint."""

    trial_id: int
    number: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Totals over trials."""

    states: Counter[str] = field(default_factory=Counter)  # how many trials are in each, by name
    foreign_fails: int = 0  # FAIL trials without an outcome of ours
    stopped_fails: int = 0  # FAIL trials that a person ended before they had a value
    first_start: datetime | None = None  # UTC, without a zone
    last_end: datetime | None = None  # likewise
    front: tuple[tuple[Any, ranking.Judged], ...] = ()  # with several objectives: the rows on the Pareto front
    leading: tuple[Leading, ...] = ()  # the best trials by the first objective
    infeasible: int = 0  # COMPLETE trials that violate a constraint
    shares: Counter[float] = field(default_factory=Counter)  # trials by value, if the metric is a share of examples
    spans: tuple[tuple[int, datetime, datetime], ...] = ()  # see `_spans`; of the WINDOW highest numbers

    @property
    def best(self) -> Best | None:
        return Best(number=self.leading[0].number, value=self.leading[0].value) if self.leading else None

    def plus(self, found: Sequence[Any], study: Study, connection: sql.Connection) -> Tally:
        """Return a new tally with more trials.

        Args:
            found: rows of `changes.since`, by number.
            study: the trials' study.
            connection: for the values and constraints of the COMPLETE trials among them.
        """
        complete = [row for row in found if row.state == "COMPLETE" and row.value_type is not None]
        judged = ranking.judged(connection, study, complete)
        feasible = [row for row in complete if not judged[row.trial_id].violated]
        # A trial that was added as finished, for example by a fork, has equal start and end times.
        ran = [row for row in found if row.datetime_start != row.datetime_complete]
        return Tally(
            states=self.states + Counter(row.state for row in found),
            foreign_fails=self.foreign_fails + sum(row.state == "FAIL" and row.outcome is None for row in found),
            stopped_fails=self.stopped_fails + sum(row.state == "FAIL" and row.outcome == STOPPED for row in found),
            first_start=min(filter(None, [self.first_start, *(row.datetime_start for row in ran)]), default=None),
            last_end=max(filter(None, [self.last_end, *(row.datetime_complete for row in ran)]), default=None),
            front=_front(study, self.front, feasible, judged),
            leading=_leading(self.leading, feasible, str(study.spec.direction)),
            infeasible=self.infeasible + len(complete) - len(feasible),
            shares=self.shares + _shares(study, feasible),
            spans=tuple(nlargest(WINDOW, [*self.spans, *_spans(ran)])),
        )


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a reading keeps for the next one, which then need not read it again."""

    cursor: changes.Cursor = field(default_factory=changes.Cursor)
    tally: Tally = field(default_factory=Tally)  # of the final trials
    failures_recorded: int = 0  # their number
    failures: Sequence[FailureCount] = ()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The result of one reading."""

    summary: Summary
    ended: Sequence[int]  # ids of the trials that have ended since the earlier reading
    live: Mapping[int, int]  # running trials: id by number
    leading: Sequence[Leading]  # the best trials by the first objective
    past: Past


def read(study: Study, past: Past | None = None, *, clock: Callable[[], float] = time.time) -> Reading:
    """Read a study's summary. Raises StudyError if the study was deleted meanwhile.

    Args:
        study: the study.
        past: what an earlier reading kept; without it, every trial is read.
        clock: returns seconds since 1970.
    """
    past = past or Past()
    with study.storage.engine.connect() as connection:
        row = study_rows.living_row(connection, study.study_id)
        if row is None or row.uid != study.uid:
            raise StudyError(f"study {study.name!r} was deleted; `hpo run` makes a new one")
        final, cursor = past.tally, past.cursor
        pending: list[Any] = []
        ended: list[int] = []
        for news in changes.since(connection, study, past.cursor):
            final, cursor = final.plus(news.final, study, connection), news.cursor
            pending += news.pending
            ended += news.ended
        tally = final.plus(pending, study, connection)
        running = [trial for trial in pending if trial.state == "RUNNING"]
        live = [trial for trial in running if trial.live]
        curves = recorded.judged_curves(connection, [trial.trial_id for trial in live])
        again = failure_rows.failed_attempts(connection, study, [trial.trial_id for trial in live if trial.attempt > 1])
        trained = trial_columns.seconds_trained(connection, study, [trial.trial_id for trial in live])
        worked = limits.worker_time(connection, row)
        limited = limits.look(connection, row)
        count = failure_rows.count_failures(connection, study)
        failures = (
            past.failures
            if count == past.failures_recorded
            else _failures(failure_rows.failures_by_kind(connection, study))
        )
        best = _with_interval(connection, study, tally)
    parked = [trial for trial in running if trial.attempt and not trial.live]
    counts = {
        "complete": tally.states["COMPLETE"],
        "pruned": tally.states["PRUNED"],
        "fail": tally.states["FAIL"],
        "running": len(live),
        "parked": len(parked),
        "foreign": len(running) - len(live) - len(parked),
        "waiting": tally.states["WAITING"],
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
        best=best,
        stop_reason=row.stop_reason,
        hold=row.hold,
        running=[
            replace(
                _running(
                    trial, curves[trial.trial_id], trained.get(trial.trial_id), again.get(trial.trial_id, 0), clock()
                ),
                unit="epoch" if study.spec.is_declared else "step",
            )
            for trial in live
        ],
        parked=[_parked(study, trial) for trial in parked],
        failures=with_unrecorded(failures, foreign=tally.foreign_fails, stopped=tally.stopped_fails),
        seconds=worked.wall if worked else _elapsed(tally, clock() if live else None),
        seconds_per_trial=pace,
        seconds_left=_soonest(
            _seconds_left(counts, budget, pace, stopped=row.stop_reason is not None),
            limited,
            is_held=row.hold in (Hold.SPENT, Hold.COPIED),
        ),
        limits=limited,
        objectives=dict(study.spec.objectives),
        front=[
            FrontTrial(number=one.number, values=ranking.named(study, came_to.values)) for one, came_to in tally.front
        ],
        infeasible=tally.infeasible,
        imported=row.imported,
        logs=str(study.logs),
        bucket=None if study.store.is_folder else study.store.place,
        metric=interval.metric_of(study.spec),
        value_rule=study.spec.value,
        is_grid=auto_sampler.name_of(study.spec) == "grid",
        code_changes=len(json.loads(row.code_changes)),
    )
    after = Past(cursor=cursor, tally=final, failures_recorded=count, failures=failures)
    return Reading(
        summary=summary,
        ended=ended,
        live={trial.number: trial.trial_id for trial in live},
        leading=tally.leading,
        past=after,
    )


def summarize(study: Study, *, clock: Callable[[], float] = time.time) -> Summary:
    """Read a study's summary from every trial. Raises StudyError if the study was deleted meanwhile."""
    return read(study, clock=clock).summary


# --- totals over trials -----------------------------------------------------------------------------------------------


def _shares(study: Study, found: Sequence[Any]) -> Counter[float]:
    """Return the number of these trials by value; none if the study's metric is no share of examples."""
    metric = interval.metric_of(study.spec)
    return Counter(map(trial_columns.value_of, found) if metric and metrics.is_share(metric) else ())


def _with_interval(connection: sql.Connection, study: Study, tally: Tally) -> Best | None:
    """Return the best trial with the interval of its value and the number of its rivals."""
    best = tally.best
    if best is None or not tally.shares:
        return best
    row = ranking.result(connection, study, best.number)  # None if the study was deleted meanwhile
    receipt = json.loads((row and row.receipt) or "{}")
    best = replace(best, task=receipt.get(interval.TASK_KEY))
    found = interval.of_trial(study.spec, best.value, receipt)
    if found is None:
        return best
    rivals = sum(count for value, count in tally.shares.items() if value in found) - 1
    return replace(best, interval=found, rivals=rivals)


def _leading(known: Sequence[Leading], found: Sequence[Any], direction: str) -> tuple[Leading, ...]:
    """Return the best of the known and the found trials. Of equals the lower number leads, as in `ranking.ranked`."""
    sign = -1 if direction == "maximize" else 1
    new = nsmallest(LEADING, found, key=lambda row: (sign * trial_columns.value_of(row), row.number))
    both = [
        *known,
        *(Leading(trial_id=row.trial_id, number=row.number, value=trial_columns.value_of(row)) for row in new),
    ]
    return tuple(nsmallest(LEADING, both, key=lambda one: (sign * one.value, one.number)))


def _front(
    study: Study,
    front: Sequence[tuple[Any, ranking.Judged]],
    feasible: Sequence[Any],
    judged: Mapping[int, ranking.Judged],
) -> tuple[tuple[Any, ranking.Judged], ...]:
    """Return the rows on the Pareto front of an earlier front and further rows. Empty with one objective."""
    if not study.spec.objectives:
        return ()
    found = [*front, *((row, judged[row.trial_id]) for row in feasible)]
    numbers = {row.trial_id: row.number for row, _ in found}
    known = {row.trial_id: came_to for row, came_to in found}
    return tuple(found[position] for position in ranking.positions(study, numbers, known))


def _spans(ran: Sequence[Any]) -> list[tuple[int, datetime, datetime]]:
    """Return (number, start, end) of the last WINDOW trials that have ended.

    Trials of several attempts are left out: their time includes a pause.
    """
    found = (
        (row.number, row.datetime_start, row.datetime_complete)
        for row in reversed(ran)
        if row.state in FINISHED and row.datetime_start and row.datetime_complete and row.attempt in (None, 1)
    )
    return list(islice(found, WINDOW))


# --- running trials ---------------------------------------------------------------------------------------------------


def _running(trial: Any, curve: Mapping[int, float], trained: float | None, failed: int, now: float) -> RunningTrial:
    since_start = max(0.0, now - trial_columns.timestamp(trial.datetime_start))
    return RunningTrial(
        number=trial.number,
        epochs=max(curve, default=0),
        worker=trial.worker,
        attempt=trial.attempt,
        failed=failed,
        curve=[value for _, value in sorted(curve.items())],
        seconds=since_start if trained is None else trained,
    )


def _parked(study: Study, trial: Any) -> ParkedTrial:
    return ParkedTrial(
        number=trial.number,
        epoch=max(trial.checkpoint_epoch or 0, 0),
        unit="epoch" if study.spec.is_declared else "step",
        has_checkpoint=trial.checkpoint_epoch is not None,
    )


# --- failures ---------------------------------------------------------------------------------------------------------


def _failures(found: Sequence[Any]) -> list[FailureCount]:
    return [
        FailureCount(kind=row.kind, count=row.times, retried=int(row.retried), message=row.message) for row in found
    ]


def with_unrecorded(failures: Sequence[FailureCount], *, foreign: int, stopped: int = 0) -> list[FailureCount]:
    """Return the failures, the most frequent first, with the FAIL trials for which no failed attempt is recorded.

    Args:
        failures: the recorded failures.
        foreign: how many FAIL trials are of other programs.
        stopped: how many FAIL trials a person has ended.
    """
    found = [*failures]
    if stopped:
        found.append(FailureCount(kind=STOPPED, count=stopped, retried=0, message="ended by a person"))
    if foreign:
        found.append(FailureCount(kind="foreign", count=foreign, retried=0, message=""))
    return sorted(found, key=lambda failure: (-failure.count, failure.kind))


# --- time -------------------------------------------------------------------------------------------------------------


def _elapsed(tally: Tally, until: float | None) -> float:
    if tally.first_start is None:
        return 0.0
    started = trial_columns.timestamp(tally.first_start)
    ended = trial_columns.timestamp(tally.last_end) if tally.last_end else started
    return max(0.0, (ended if until is None else until) - started)


def _pace(spans: Sequence[tuple[int, datetime, datetime]]) -> float | None:
    """Return the busy seconds per trial, None for fewer than two trials.

    Busy time is the time in which at least one of these trials ran. So idle hours do not count, and parallel trials
    share their time.
    """
    if len(spans) < 2:
        return None
    return covered((trial_columns.timestamp(start), trial_columns.timestamp(end)) for _, start, end in spans) / len(
        spans
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time that spans (start, end) cover together. Overlaps count once."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _soonest(by_trials: float | None, limited: Sequence[Limit], *, is_held: bool) -> float | None:
    """Return when the first of the budget's limits is spent, in seconds from now; None if it is, or if nothing is known."""
    if is_held:
        return None
    ends = [limit.seconds_left for limit in limited if limit.seconds_left is not None]
    return min([*ends, *([] if by_trials is None else [by_trials])], default=None)


def _seconds_left(counts: Mapping[str, int], budget: int, pace: float | None, *, stopped: bool) -> float | None:
    """Return how many seconds the remaining trials take at this pace. A running trial counts as half done."""
    if pace is None:
        return None
    ahead = counts["running"] + counts["parked"]
    if not stopped:
        ahead = max(ahead, budget - counts["complete"] - counts["pruned"] - counts["fail"] - counts["foreign"])
    return max(0.0, ahead - counts["running"] / 2) * pace
