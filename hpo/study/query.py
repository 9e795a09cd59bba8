"""The queries of `hpo.study`: trials, changes since a cursor, curves, parameters, failures, signs of trouble.

Nothing here writes or takes a lock. No other module of `hpo.study` holds SQL.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hpo.errors import StudyError
from hpo.queue import lease_clock, workers
from hpo.queue.workers import LAUNCHER, TICKS_PER_LEASE
from hpo.spec import space
from hpo.spec.failures import Verdict
from hpo.storage import clock
from hpo.storage.sql import chunks
from hpo.storage.tables import (
    CONSTRAINTS,
    FINISHED,
    VALUE_TYPE,
    hpo_curves,
    hpo_failures,
    hpo_test_openings,
    hpo_trials,
    hpo_workers,
    intermediate_values,
    restored,
    restored_choices,
    restored_param,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)
from hpo.study import program_folder
from hpo.study.study import Study

STATE = sa.type_coerce(trials.c.state, sa.String).label("state")  # a string: Optuna need not be loaded
#: The first columns of every select of trials with their values.
OF_TRIAL = (trials.c.trial_id, trials.c.number, STATE, trial_values.c.value, trial_values.c.value_type)
SECONDS = "seconds"  # the raw metric that holds the seconds of each epoch
PAGE = 1000  # trials whose rows are in memory at once; the rows of 10,000 take 12 MiB


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A reader's position in a study: the highest trial number read, and the trials that may still change.

    A time would not do: clocks differ between workers, and trials do not end in the order of their numbers. A number is
    given under a lock that is held until the commit. So no trial appears later below a number that was read.
    """

    last: int = -1  # the highest number read
    open: frozenset[int] = frozenset()  # ids of trials that have not ended
    unsettled: frozenset[int] = frozenset()  # ids of trials that another program ended and whose row of ours is open


@dataclass(frozen=True, kw_only=True)
class StudyUpdate:
    """A page of the trials that were not final at a cursor, as they are now. The rows are those of `_standing`, by number."""

    final: Sequence[Any]  # they never change again
    pending: Sequence[Any]  # all others
    ended: Sequence[int]  # ids of those that have ended since the cursor
    cursor: Cursor  # for the next read, once this page and those before it are read


def since(connection: sa.Connection, study: Study, cursor: Cursor) -> Iterator[StudyUpdate]:
    """Yield the changes since a cursor. Trials that were final at the cursor are not read again."""
    after = Cursor(last=cursor.last)
    for rows in _pages(connection, study, cursor):
        final: list[Any] = []
        pending: list[Any] = []
        for row in rows:
            (final if _is_final(row) else pending).append(row)
        after = Cursor(
            last=max([after.last, *(row.number for row in rows)]),
            open=after.open | {row.trial_id for row in pending if row.state not in FINISHED},
            unsettled=after.unsettled | {row.trial_id for row in pending if row.state in FINISHED},
        )
        yield StudyUpdate(
            final=final,
            pending=pending,
            ended=[row.trial_id for row in rows if row.state in FINISHED and row.trial_id not in cursor.unsettled],
            cursor=after,
        )


def _pages(connection: sa.Connection, study: Study, cursor: Cursor) -> Iterator[Sequence[Any]]:
    standing = _standing(connection, study)
    for ids in chunks(sorted(cursor.open | cursor.unsettled)):
        yield connection.execute(standing.where(trials.c.trial_id.in_(ids))).all()
    yield from connection.execute(standing.where(trials.c.number > cursor.last)).partitions(PAGE)


def _standing(connection: sa.Connection, study: Study) -> sa.Select[Any]:
    """Select the status of trials. These are plain columns, so a first read of thousands of trials is fast."""
    return (
        sa.select(
            *OF_TRIAL,
            trials.c.datetime_start,
            trials.c.datetime_complete,
            hpo_trials.c.worker,
            hpo_trials.c.attempt,
            hpo_trials.c.settled,
            hpo_trials.c.outcome,
            hpo_trials.c.checkpoint_epoch,
            lease_clock.is_live(connection.dialect.name).label("live"),
        )
        .select_from(with_value(study))
        .where(trials.c.study_id == study.study_id)
        .order_by(trials.c.number)
    )


def _is_final(row: Any) -> bool:
    """Return whether a trial has ended for Optuna and, if it is ours, is settled. Such a trial never changes."""
    return row.state in FINISHED and row.settled is not False


def with_ours(study: Study) -> sa.Join:
    """Join trials with our rows. Our columns are NULL for a foreign trial."""
    return sa.outerjoin(
        trials, hpo_trials, sa.and_(hpo_trials.c.trial_id == trials.c.trial_id, hpo_trials.c.study_uid == study.uid)
    )


def with_value(study: Study) -> sa.Join:
    """Join trials with our rows and the values of the first objective. Missing ones are NULL."""
    return with_ours(study).outerjoin(
        trial_values, sa.and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0)
    )


def trained_seconds(study: Study) -> sa.Label[float | None]:
    """Return a column with a trial's seconds in training, without parked time. NULL if no epoch was timed."""
    of_trial = sa.and_(
        hpo_curves.c.study_uid == study.uid,
        hpo_curves.c.trial_id == trials.c.trial_id,
        hpo_curves.c.metric == SECONDS,
    )
    total = sa.select(sa.func.sum(hpo_curves.c.value)).where(of_trial).correlate(trials)
    return total.scalar_subquery().label("trained_seconds")


def seconds_trained(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, float | None]:
    """Return {trial id: seconds in training}, None for a trial without a timed epoch."""
    timed = sa.select(trials.c.trial_id, trained_seconds(study))
    return {
        row.trial_id: row.trained_seconds
        for chunk in chunks(ids)
        for row in connection.execute(timed.where(trials.c.trial_id.in_(chunk)))
    }


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A trial's values by objective, and its constraints by name. A constraint above 0 is violated."""

    values: tuple[float, ...] = ()
    constraints: dict[str, float] = field(default_factory=dict)

    @property
    def violation(self) -> float:
        """The sum of the violations."""
        return sum(violation for violation in self.constraints.values() if violation > 0)

    @property
    def violated(self) -> list[str]:
        """The names of the violated constraints."""
        return [name for name, violation in self.constraints.items() if violation > 0]


def is_plain(study: Study) -> bool:
    """Return whether trials are judged by one value alone. A user's own objective may set constraints at any time."""
    return study.spec.is_declared and not (study.spec.objectives or study.spec.constraints)


def judged(connection: sa.Connection, study: Study, found: Sequence[Any]) -> dict[int, Judged]:
    """Return {trial id: values and constraints}. For a plain study (`is_plain`) nothing is read, and both are empty.

    Args:
        connection: an open connection.
        study: the trials' study.
        found: rows that begin with OF_TRIAL.
    """
    ids = [row.trial_id for row in found]
    if is_plain(study):
        return dict.fromkeys(ids, Judged())
    values = {row.trial_id: [] if row.value_type is None else [value_of(row)] for row in found}
    constraints: dict[int, dict[str, float]] = {trial_id: {} for trial_id in ids}
    further = sa.select(trial_values).where(trial_values.c.objective > 0).order_by(trial_values.c.objective)
    attribute = trial_system_attributes.c
    said = sa.select(attribute.trial_id, attribute.key, attribute.value_json).where(
        attribute.key.like(f"{CONSTRAINTS}%")
    )
    for chunk in chunks(ids):
        if study.spec.objectives:
            for row in connection.execute(further.where(trial_values.c.trial_id.in_(chunk))):
                values[row.trial_id].append(value_of(row))
        of_chunk = said.where(attribute.trial_id.in_(chunk)).order_by(attribute.trial_system_attribute_id)
        for row in connection.execute(of_chunk):
            constraints[row.trial_id] |= _constraints(row.key, json.loads(row.value_json))
    return {trial_id: Judged(values=tuple(values[trial_id]), constraints=constraints[trial_id]) for trial_id in ids}


def _constraints(key: str, told: Any) -> dict[str, float]:
    if isinstance(told, list):  # as Optuna 4 wrote them
        return {str(index): float(violation) for index, violation in enumerate(told)}
    return {key.removeprefix(f"{CONSTRAINTS}:"): float(told)}


def named(study: Study, values: Sequence[float]) -> dict[str, float]:
    """Return a trial's values by the names of the objectives. Empty with one objective."""
    goals = study.spec.goals
    return dict(zip(goals.names, values, strict=False)) if goals.are_several else {}


def best_trials(connection: sa.Connection, study: Study) -> list[Any]:
    """Return the COMPLETE trials that violate nothing, best first, as rows of `results`.

    With several objectives, only the Pareto front is returned. The first objective decides the order.
    """
    of_complete = results(study).where(trials.c.state == "COMPLETE", trial_values.c.value_type.is_not(None))
    found = connection.execute(of_complete.order_by(trials.c.number)).all()
    known = judged(connection, study, found)
    return [found[position] for position in positions(study, {row.trial_id: row.number for row in found}, known)]


def positions(study: Study, numbers: Mapping[int, int], known: Mapping[int, Judged]) -> list[int]:
    """Return the positions in `numbers` of the trials that `best_trials` returns, in its order.

    Args:
        study: the trials' study.
        numbers: {trial id: number} of COMPLETE trials.
        known: {trial id: values and constraints}.
    """
    if not numbers:
        return []
    import numpy as np  # loading it takes longer than reading a study with one objective

    from hpo.study import pareto

    values = np.array([known[trial_id].values for trial_id in numbers])
    violations = np.array([known[trial_id].violation for trial_id in numbers])
    found: list[int] = pareto.best_trials(
        study.spec.goals, np.array(list(numbers.values())), values, violations
    ).tolist()
    return found


def ranked(connection: sa.Connection, study: Study, k: int | None) -> Sequence[Any]:
    """Return the `k` best COMPLETE trials, all of them for None. Ties go to the lower number.

    Only foreign trials have infinite values.
    """
    rank = sa.case(
        (trial_values.c.value_type == VALUE_TYPE.INF_NEG, -1),
        (trial_values.c.value_type == VALUE_TYPE.INF_POS, 1),
        else_=0,
    )
    keys = [rank, trial_values.c.value]
    order = [key.desc() for key in keys] if study.spec.direction == "maximize" else [key.asc() for key in keys]
    return connection.execute(
        results(study)
        .where(trials.c.state == "COMPLETE", trial_values.c.value_type.is_not(None))
        .order_by(*order, trials.c.number)
        .limit(k)
    ).all()


def results(study: Study) -> sa.Select[Any]:
    """Select the columns of a trial's result."""
    return (
        sa.select(
            *OF_TRIAL,
            hpo_trials.c.attempt,
            hpo_trials.c.receipt,
            hpo_trials.c.checkpoint_path,
        )
        .select_from(with_value(study))
        .where(trials.c.study_id == study.study_id)
    )


def result(connection: sa.Connection, study: Study, number: int) -> Any:
    """Return one trial's row of `results`, None if no trial has this number."""
    return connection.execute(results(study).where(trials.c.number == number)).one_or_none()


def count_finished(connection: sa.Connection, study: Study) -> int:
    """Count the trials that have ended."""
    ended = sa.select(sa.func.count()).where(trials.c.study_id == study.study_id, trials.c.state.in_(FINISHED))
    return int(connection.execute(ended).scalar_one())


def last_number(connection: sa.Connection, study: Study) -> int | None:
    """Return the highest trial number of a study, None if it has no trial."""
    last = sa.select(sa.func.max(trials.c.number)).where(trials.c.study_id == study.study_id)
    found: int | None = connection.execute(last).scalar_one()
    return found


def no_such_trial(connection: sa.Connection, study: Study, number: int) -> StudyError:
    """Return the error for a trial number that a study does not have."""
    last = last_number(connection, study)
    known = "it has none yet" if last is None else f"its trials are 0 to {last}"
    return StudyError(f"study {study.name!r} has no trial {number}; {known}")


def trial(connection: sa.Connection, study: Study, number: int) -> Any:
    """Return one trial's row, whatever its state; None if no trial has this number."""
    return connection.execute(
        sa.select(
            *OF_TRIAL,
            hpo_trials.c.outcome,
            hpo_trials.c.reason,
            hpo_trials.c.attempt,
            hpo_trials.c.worker,
            hpo_trials.c.checkpoint_path,
            lease_clock.is_live(connection.dialect.name).label("live"),
            _epochs(),
            _reports(),
        )
        .select_from(with_value(study))
        .where(trials.c.study_id == study.study_id, trials.c.number == number)
    ).one_or_none()


def ended(connection: sa.Connection, study: Study, ids: Sequence[int]) -> list[Any]:
    """Return rows of ended trials, each with what one line about it shows."""
    found = sa.select(
        *OF_TRIAL,
        trials.c.datetime_start,
        trials.c.datetime_complete,
        hpo_trials.c.outcome,
        _epochs(),
        _reports(),
        trained_seconds(study),
    ).select_from(with_value(study))
    return [row for chunk in chunks(ids) for row in connection.execute(found.where(trials.c.trial_id.in_(chunk)))]


def _epochs() -> sa.Label[int | None]:
    """Return a column with the last step that a trial reported, NULL if it reported none."""
    last = sa.select(sa.func.max(intermediate_values.c.step)).where(intermediate_values.c.trial_id == trials.c.trial_id)
    return last.correlate(trials).scalar_subquery().label("epochs")


def _reports() -> sa.Label[int]:
    """Return a column with the number of steps that a trial reported."""
    count = sa.select(sa.func.count()).where(intermediate_values.c.trial_id == trials.c.trial_id)
    return count.correlate(trials).scalar_subquery().label("reports")


def settled(connection: sa.Connection, study: Study, numbers: Collection[int]) -> set[int]:
    """Return the numbers of those of these trials that are settled."""
    ours = sa.select(trials.c.number).join(hpo_trials, hpo_trials.c.trial_id == trials.c.trial_id)
    return set(
        connection.execute(
            ours.where(
                hpo_trials.c.study_uid == study.uid,
                hpo_trials.c.settled.is_(True),
                trials.c.study_id == study.study_id,
                trials.c.number.in_(numbers),
            )
        ).scalars()
    )


# --- curves, costs, parameters ----------------------------------------------------------------------------------------


def raw_curves(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, list[float]]]:
    """Return {trial id: {metric: values by epoch}}, the metrics in alphabetical order."""
    curves: dict[int, dict[str, list[float]]] = {trial_id: {} for trial_id in ids}
    for chunk in chunks(ids):
        for row in connection.execute(
            sa.select(hpo_curves.c.trial_id, hpo_curves.c.metric, hpo_curves.c.value)
            .where(hpo_curves.c.study_uid == study.uid, hpo_curves.c.trial_id.in_(chunk))
            .order_by(hpo_curves.c.trial_id, hpo_curves.c.metric, hpo_curves.c.epoch)
        ):
            value = math.nan if row.value is None else row.value
            curves[row.trial_id].setdefault(row.metric, []).append(value)
    return curves


def raw_curve(connection: sa.Connection, study: Study, ids: Sequence[int], metric: str) -> dict[int, list[float]]:
    """Return {trial id: values of one metric by epoch}."""
    curves: dict[int, list[float]] = {trial_id: [] for trial_id in ids}
    for chunk in chunks(ids):
        for row in connection.execute(
            sa.select(hpo_curves.c.trial_id, hpo_curves.c.value)
            .where(hpo_curves.c.study_uid == study.uid, hpo_curves.c.trial_id.in_(chunk), hpo_curves.c.metric == metric)
            .order_by(hpo_curves.c.trial_id, hpo_curves.c.epoch)
        ):
            curves[row.trial_id].append(math.nan if row.value is None else row.value)
    return curves


def largest(connection: sa.Connection, study: Study, metric: str) -> float | None:
    """Return the largest value of a raw metric over all trials, None if it was not measured."""
    of_metric = sa.and_(hpo_curves.c.study_uid == study.uid, hpo_curves.c.metric == metric)
    found: float | None = connection.execute(sa.select(sa.func.max(hpo_curves.c.value)).where(of_metric)).scalar_one()
    return found


def failed_attempts(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, int]:
    """Return {trial id: number of its attempts that failed}, without trials that never failed."""
    of_trial = hpo_failures.c.trial_id
    counted = sa.select(of_trial, sa.func.count(sa.distinct(hpo_failures.c.attempt)).label("times")).group_by(of_trial)
    return {
        row.trial_id: row.times
        for chunk in chunks(ids)
        for row in connection.execute(counted.where(hpo_failures.c.study_uid == study.uid, of_trial.in_(chunk)))
    }


def judged_curves(connection: sa.Connection, ids: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return {trial id: {step: value}} of Optuna's intermediate values, which pruners see."""
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


def user_attributes(connection: sa.Connection, trial_id: int) -> dict[str, Any]:
    """Return a trial's user attributes, ours included, in the order in which they were set."""
    attribute = trial_user_attributes.c
    told = connection.execute(
        sa.select(attribute.key, attribute.value_json)
        .where(attribute.trial_id == trial_id)
        .order_by(attribute.trial_user_attribute_id)
    )
    return {key: json.loads(text) for key, text in told}


def with_attribute(connection: sa.Connection, study: Study, key: str) -> dict[int, Any]:
    """Return {trial id: value of a user attribute} of the trials that have it."""
    attribute = trial_user_attributes.c
    told = (
        sa.select(attribute.trial_id, attribute.value_json)
        .join(trials, trials.c.trial_id == attribute.trial_id)
        .where(trials.c.study_id == study.study_id, attribute.key == key)
    )
    return {trial_id: json.loads(text) for trial_id, text in connection.execute(told)}


def complete_values(connection: sa.Connection, study: Study) -> list[float]:
    """Return the first value of each COMPLETE trial, those that violate a constraint included."""
    found = sa.select(trial_values.c.value, trial_values.c.value_type).select_from(with_value(study))
    of_complete = found.where(trials.c.study_id == study.study_id, trials.c.state == "COMPLETE")
    return [value_of(row) for row in connection.execute(of_complete.where(trial_values.c.value_type.is_not(None)))]


def params(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return {trial id: {parameter: value}} in the order of suggestion. Lists and tables are as in the study file."""
    found: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in ids}
    structured = {
        path: {space.encode(option): option for option in parameter.options if isinstance(option, list | dict)}
        for path, parameter in space.parameters(study.spec.tree)
        if isinstance(parameter, space.Choices)
    }
    for chunk in chunks(ids):
        for row in connection.execute(
            sa.select(
                trial_params.c.trial_id,
                trial_params.c.param_name,
                trial_params.c.param_value,
                trial_params.c.distribution_json,
            )
            .where(trial_params.c.trial_id.in_(chunk))
            .order_by(trial_params.c.param_id)
        ):
            value = restored_param(row.param_value, row.distribution_json)
            if isinstance(value, str):
                value = structured.get(row.param_name, {}).get(value, value)
            found[row.trial_id][row.param_name] = value
    return found


def receipts(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return {trial id: receipt}, an empty one for a trial without."""
    found: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in ids}
    recorded = sa.select(hpo_trials.c.trial_id, hpo_trials.c.receipt).where(
        hpo_trials.c.study_uid == study.uid, hpo_trials.c.receipt.is_not(None)
    )
    for chunk in chunks(ids):
        for row in connection.execute(recorded.where(hpo_trials.c.trial_id.in_(chunk))):
            found[row.trial_id] = json.loads(row.receipt)
    return found


def choices(connection: sa.Connection, ids: Sequence[int]) -> dict[int, dict[str, list[Any]]]:
    """Return {trial id: {categorical parameter: recorded choices}}."""
    found: dict[int, dict[str, list[Any]]] = {trial_id: {} for trial_id in ids}
    recorded = sa.select(trial_params.c.trial_id, trial_params.c.param_name, trial_params.c.distribution_json)
    for chunk in chunks(ids):
        for row in connection.execute(recorded.where(trial_params.c.trial_id.in_(chunk))):
            if (options := restored_choices(row.distribution_json)) is not None:
                found[row.trial_id][row.param_name] = options
    return found


def distributions(connection: sa.Connection, ids: Sequence[int]) -> dict[str, set[str]]:
    """Return {parameter: its distributions in these trials, as Optuna's JSON}."""
    found: dict[str, set[str]] = {}
    recorded = sa.select(trial_params.c.param_name, trial_params.c.distribution_json).distinct()
    for chunk in chunks(ids):
        for name, distribution in connection.execute(recorded.where(trial_params.c.trial_id.in_(chunk))):
            found.setdefault(name, set()).add(distribution)
    return found


# --- failures ---------------------------------------------------------------------------------------------------------


def failures_of(connection: sa.Connection, study: Study, trial_id: int) -> Sequence[Any]:
    """Return the recorded failures of a trial, in the order of its attempts."""
    return connection.execute(
        sa.select(hpo_failures)
        .where(hpo_failures.c.study_uid == study.uid, hpo_failures.c.trial_id == trial_id)
        .order_by(hpo_failures.c.attempt, hpo_failures.c.failed_at)
    ).all()


def count_failures(connection: sa.Connection, study: Study) -> int:
    """Count the recorded failures by the table's key alone. An unchanged count means that there is nothing new to read.

    The rows are many and long, and no index leads to the new ones: a worker may record a failure of a trial that ended
    long ago. The count is enough. Each failure has a row of its own, and no row is deleted. A failure that is sent
    again, because the answer was lost, overwrites its row with the same content.
    """
    of_study = sa.select(sa.func.count()).where(hpo_failures.c.study_uid == study.uid)
    return int(connection.execute(of_study).scalar_one())


def failures_by_kind(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return a row for each recorded kind of failure: its count, how many were retried, and the latest message."""
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
    return connection.execute(sa.select(found).where(found.c.place == 1)).all()


def count_openings(connection: sa.Connection, study: Study) -> int:
    """Return how often the study's test split was opened, as far as it is recorded."""
    counted = sa.select(sa.func.count()).where(hpo_test_openings.c.study_uid == study.uid)
    return int(connection.execute(counted).scalar_one())


# --- signs of trouble -------------------------------------------------------------------------------------------------


def expired(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return our RUNNING trials whose lease has expired and that no reaper has taken yet."""
    return connection.execute(
        _ours(study).where(
            hpo_trials.c.settled.is_(False),
            trials.c.state == "RUNNING",
            lease_clock.has_passed(connection.dialect.name, hpo_trials.c.lease_until, hpo_trials.c.lease_clock),
        )
    ).all()


def ended_elsewhere(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return our trials that another program has ended and whose row of ours is open."""
    is_open = sa.and_(hpo_trials.c.settled.is_(False), trials.c.state.in_(FINISHED))
    return connection.execute(_ours(study).where(is_open)).all()


def _ours(study: Study) -> sa.Select[Any]:
    return (
        sa.select(hpo_trials.c.study_uid, hpo_trials.c.trial_id, trials.c.number, hpo_trials.c.worker)
        .join(hpo_trials, hpo_trials.c.trial_id == trials.c.trial_id)
        .where(hpo_trials.c.study_uid == study.uid)
        .order_by(trials.c.number)
    )


def foreign_running(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return number and start of the foreign RUNNING trials."""
    return connection.execute(
        sa.select(trials.c.number, trials.c.datetime_start)
        .select_from(with_ours(study))
        .where(
            trials.c.study_id == study.study_id,
            trials.c.state == "RUNNING",
            hpo_trials.c.trial_id.is_(None),
        )
        .order_by(trials.c.number)
    ).all()


def held_elsewhere(study: Study) -> Sequence[Any]:
    """Return (number, worker, lease_clock) of trials leased by the clock of another machine.

    Such leases never expire here.
    """
    with study.storage.engine.connect() as connection:
        held = connection.execute(
            sa.select(trials.c.number, hpo_trials.c.worker, hpo_trials.c.lease_clock)
            .select_from(with_ours(study))
            .where(trials.c.study_id == study.study_id, hpo_trials.c.lease_clock.is_not(None))
            .order_by(trials.c.number)
        ).all()
    return [row for row in held if lease_clock.is_elsewhere(row.lease_clock)]


def living_workers(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return the rows of the workers that were seen within one lease and have not left."""
    return connection.execute(
        sa.select(hpo_workers).where(
            hpo_workers.c.study_uid == study.uid,
            hpo_workers.c.left_at.is_(None),
            workers.seen_lately(connection.dialect.name, study.spec.recovery.lease_seconds),
        )
    ).all()


def hosts(connection: sa.Connection, study: Study) -> list[str]:
    """Return the hosts of all workers that a study has had."""
    found = sa.select(hpo_workers.c.host).where(hpo_workers.c.study_uid == study.uid).distinct()
    return list(connection.execute(found).scalars())


def lives(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return (clock, started_at, until) of each worker of the study, until it left or was last seen.

    A worker that has not left lives until its next stamp is due, if its clock can be read here.
    """
    dialect, columns = connection.dialect.name, hpo_workers.c
    due = columns.seen_at + study.spec.recovery.lease_seconds / TICKS_PER_LEASE
    now = lease_clock.now(dialect)
    is_mine = columns.clock.is_not_distinct_from(lease_clock.name(dialect))
    living = sa.case((sa.not_(is_mine), columns.seen_at), (due < now, due), else_=now)
    return connection.execute(
        sa.select(columns.clock, columns.started_at, sa.func.coalesce(columns.left_at, living).label("until")).where(
            columns.study_uid == study.uid, ~columns.worker.startswith(LAUNCHER)
        )
    ).all()


def workers_since_boot(connection: sa.Connection, study: Study) -> Sequence[Any]:
    """Return (worker, booted_at) of all workers, living or not, that started on this machine since it booted."""
    columns = hpo_workers.c
    return connection.execute(
        sa.select(columns.worker, columns.booted_at).where(
            columns.study_uid == study.uid, columns.clock == clock.name(), columns.booted_at.is_not(None)
        )
    ).all()


# --- from columns to values -------------------------------------------------------------------------------------------


def checkpoint_of(study: Study, row: Any) -> str | None:
    """Return the path of a trial's checkpoint file, None if it has none or the file was deleted.

    Of a command it is the folder in which the program has saved, None if that holds no files.
    """
    path: str | None = row.checkpoint_path
    if not path or not Path(path).exists():
        return None
    if not study.spec.command:
        return path
    folder = program_folder.newest(Path(path).parent)
    return str(folder) if program_folder.holds_files(folder) else None


def state_of(row: Any) -> str:
    """Return the state of a row's trial: Optuna's in lower case, but for a RUNNING one running, parked or foreign."""
    if row.state != "RUNNING":
        return str(row.state.lower())
    if row.attempt is None:
        return "foreign"
    return "running" if row.live else "parked"


def value_of(row: Any) -> float:
    """Return the value of a row as a float, which may be infinite."""
    return restored(row.value, row.value_type)


def timestamp(moment: datetime | None) -> float:
    """Return the seconds since 1970 of a stored time (UTC without a zone). A missing time is now."""
    return moment.replace(tzinfo=UTC).timestamp() if moment else time.time()
