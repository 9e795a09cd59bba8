"""What the readers of a study share: trials joined with what we know of them, what is new, from columns to values."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from hpo.queue import lease_clock
from hpo.spec import space
from hpo.storage.finished_trials import CONSTRAINTS
from hpo.storage.tables import (
    FINISHED,
    VALUE_TYPE,
    hpo_curves,
    hpo_trials,
    restored,
    trial_params,
    trial_system_attributes,
    trial_values,
    trials,
)
from hpo.storage.trial_rows import chunks, distribution_of
from hpo.study import pareto
from hpo.study.study import Study

SECONDS = "seconds"  # the metric in which our training tells how long an epoch took


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far a reader has come in a study: past every trial up to a number, but for those that may yet change.

    Not a time: clocks differ between workers, and a trial may end long after those that were started later. Numbers are
    given out under a lock that is held to the commit, so none turns up below one that was read.
    """

    last: int = -1  # the highest number read
    open: frozenset[int] = frozenset()  # ids of trials that have not ended
    unsettled: frozenset[int] = frozenset()  # of those that another program ended, until our row of them is closed too


@dataclass(frozen=True, kw_only=True)
class StudyUpdate:
    """The trials that were not final at a cursor, as they are now: see `_standing`, in the order of their numbers."""

    final: Sequence[Any]  # nothing changes them any more
    pending: Sequence[Any]  # all others
    ended: Sequence[int]  # ids of those that have ended since
    cursor: Cursor  # past all of this

    @property
    def complete(self) -> Sequence[Any]:
        """Those of them that are COMPLETE."""
        return [row for row in (*self.final, *self.pending) if row.state == TrialState.COMPLETE]


def since(connection: sa.Connection, study: Study, cursor: Cursor) -> StudyUpdate:
    """Return what has happened since a cursor: neither trials nor anything of theirs that it has passed is read again."""
    standing = _standing(connection, study)
    known = sorted(cursor.open | cursor.unsettled)
    again = [row for ids in chunks(known) for row in connection.execute(standing.where(trials.c.trial_id.in_(ids)))]
    found = [*again, *connection.execute(standing.where(trials.c.number > cursor.last))]
    pending = [row for row in found if not _is_final(row)]
    return StudyUpdate(
        final=[row for row in found if _is_final(row)],
        pending=pending,
        ended=[row.trial_id for row in found if row.state in FINISHED and row.trial_id not in cursor.unsettled],
        cursor=Cursor(
            last=max([cursor.last, *(row.number for row in found)]),
            open=frozenset(row.trial_id for row in pending if row.state not in FINISHED),
            unsettled=frozenset(row.trial_id for row in pending if row.state in FINISHED),
        ),
    )


def _standing(connection: sa.Connection, study: Study) -> sa.Select[Any]:
    """Select how each trial stands: plain columns, so that even a first look at thousands is soon done."""
    return (
        sa.select(
            trials.c.trial_id,
            trials.c.number,
            trials.c.state,
            trials.c.datetime_start,
            trials.c.datetime_complete,
            trial_values.c.value,
            trial_values.c.value_type,
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
    """Say whether a trial has ended for Optuna, which changes it no more, and for us, if it was ours."""
    return row.state in FINISHED and row.settled is not False


def held_elsewhere(study: Study) -> Sequence[Any]:
    """Return (number, worker) of the trials whose leases are by the clock of another machine: here they never run out."""
    with study.storage.engine.connect() as connection:
        held = connection.execute(
            sa.select(trials.c.number, hpo_trials.c.worker, hpo_trials.c.lease_clock)
            .select_from(with_ours(study))
            .where(trials.c.study_id == study.study_id, hpo_trials.c.lease_clock.is_not(None))
            .order_by(trials.c.number)
        ).all()
    return [row for row in held if lease_clock.is_elsewhere(row.lease_clock)]


def with_ours(study: Study) -> sa.Join:
    """Join trials with our row of each; its columns are NULL for a trial that is not ours."""
    return sa.outerjoin(
        trials, hpo_trials, sa.and_(hpo_trials.c.trial_id == trials.c.trial_id, hpo_trials.c.study_uid == study.uid)
    )


def with_value(study: Study) -> sa.Join:
    """Join trials with our row and the value of each; its columns are NULL for a trial that has none."""
    return with_ours(study).outerjoin(
        trial_values, sa.and_(trial_values.c.trial_id == trials.c.trial_id, trial_values.c.objective == 0)
    )


def trained_seconds(study: Study) -> sa.Label[float | None]:
    """Return the column that sums a trial's time in training, without its time parked; NULL where no epoch was timed."""
    of_trial = sa.and_(
        hpo_curves.c.study_uid == study.uid,
        hpo_curves.c.trial_id == trials.c.trial_id,
        hpo_curves.c.metric == SECONDS,
    )
    total = sa.select(sa.func.sum(hpo_curves.c.value)).where(of_trial).correlate(trials)
    return total.scalar_subquery().label("trained_seconds")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a trial came to: its values by objective, and what it says of its constraints, more than 0 being a violation."""

    values: tuple[float, ...] = ()
    constraints: dict[str, float] = field(default_factory=dict)

    @property
    def violation(self) -> float:
        return sum(violation for violation in self.constraints.values() if violation > 0)

    @property
    def violated(self) -> list[str]:
        """The names of the constraints that are violated."""
        return [name for name, violation in self.constraints.items() if violation > 0]


def is_plain(study: Study) -> bool:
    """Say whether all that trials are judged by is one value: a user's own objective may set constraints at any time."""
    return not (study.spec.objective or study.spec.objectives or study.spec.constraints)


def judged(connection: sa.Connection, study: Study, found: Sequence[Any]) -> dict[int, Judged]:
    """Return what trials of a study came to, by id; of a plain one nothing is read, and nothing told.

    Args:
        found: rows with the trials' ids and first values.
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
    """Return a trial's values by the names of the study's objectives; none if there is one objective."""
    goals = study.spec.goals
    return dict(zip(goals.names, values, strict=False)) if goals.are_several else {}


def best_trials(connection: sa.Connection, study: Study) -> list[Any]:
    """Return the rows of `results` of the trials that lead: of several objectives the front, else all COMPLETE ones that
    violate nothing, the best in the first objective first.
    """
    of_complete = results(study).where(trials.c.state == TrialState.COMPLETE, trial_values.c.value_type.is_not(None))
    found = connection.execute(of_complete.order_by(trials.c.number)).all()
    known = judged(connection, study, found)
    return [found[position] for position in positions(study, {row.trial_id: row.number for row in found}, known)]


def positions(study: Study, numbers: Mapping[int, int], known: Mapping[int, Judged]) -> list[int]:
    """Return which of these COMPLETE trials lead, as positions, likewise.

    Args:
        numbers: by the trials' ids.
        known: what each came to, by id.
    """
    if not numbers:
        return []
    values = np.array([known[trial_id].values for trial_id in numbers])
    violations = np.array([known[trial_id].violation for trial_id in numbers])
    found: list[int] = pareto.best_trials(
        study.spec.goals, np.array(list(numbers.values())), values, violations
    ).tolist()
    return found


def ranked(connection: sa.Connection, study: Study, k: int) -> Sequence[Any]:
    """Return the `k` best COMPLETE trials; infinite values (only foreign trials have them) in order, then by number."""
    rank = sa.case(
        (trial_values.c.value_type == VALUE_TYPE.INF_NEG, -1),
        (trial_values.c.value_type == VALUE_TYPE.INF_POS, 1),
        else_=0,
    )
    keys = [rank, trial_values.c.value]
    order = [key.desc() for key in keys] if study.spec.direction == "maximize" else [key.asc() for key in keys]
    return connection.execute(
        results(study)
        .where(trials.c.state == TrialState.COMPLETE, trial_values.c.value_type.is_not(None))
        .order_by(*order, trials.c.number)
        .limit(k)
    ).all()


def results(study: Study) -> sa.Select[Any]:
    """Select what a trial's result is made from."""
    return (
        sa.select(
            trials.c.trial_id,
            trials.c.number,
            trials.c.state,
            trial_values.c.value,
            trial_values.c.value_type,
            hpo_trials.c.attempt,
            hpo_trials.c.receipt,
            hpo_trials.c.checkpoint_path,
        )
        .select_from(with_value(study))
        .where(trials.c.study_id == study.study_id)
    )


def params(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return {trial id: {parameter: value}} in the order of suggestion, lists and tables as the study file has them."""
    found: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in ids}
    if not ids:
        return found
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
            value = distribution_of(row.distribution_json).to_external_repr(row.param_value)
            if isinstance(value, str):
                value = structured.get(row.param_name, {}).get(value, value)
            found[row.trial_id][row.param_name] = value
    return found


def distributions(connection: sa.Connection, ids: Sequence[int]) -> dict[int, dict[str, BaseDistribution]]:
    """Return {trial id: {parameter: distribution}} as they are recorded."""
    found: dict[int, dict[str, BaseDistribution]] = {trial_id: {} for trial_id in ids}
    recorded = sa.select(trial_params.c.trial_id, trial_params.c.param_name, trial_params.c.distribution_json)
    for chunk in chunks(ids):
        for row in connection.execute(recorded.where(trial_params.c.trial_id.in_(chunk))):
            found[row.trial_id][row.param_name] = distribution_of(row.distribution_json)
    return found


def value_of(row: Any) -> float:
    """Return a trial's value as a float, infinite ones included."""
    return restored(row.value, row.value_type)


def timestamp(moment: datetime | None) -> float:
    """Return seconds since 1970 for a time as Optuna stores it, UTC without a zone; a missing one is now."""
    return moment.replace(tzinfo=UTC).timestamp() if moment else time.time()
