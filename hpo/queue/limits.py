"""Limits of a study beside its number of trials: wall clock, GPU-hours, a target, trials without a gain.

What is used of them is computed from the rows of workers and of trials, so it is the same for every worker, and a killed one
loses nothing of it. The limits are those of the study's stored spec, which the last `hpo run` set.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import sqlalchemy as sa

from hpo.queue import lease_clock
from hpo.queue.workers import LAUNCHER, TICKS_PER_LEASE
from hpo.spec.budget import HOUR, SIGN, Budget
from hpo.spec.recovery import Recovery
from hpo.storage import sql, study_rows
from hpo.storage.tables import (
    CONSTRAINTS,
    Hold,
    hpo_studies,
    hpo_workers,
    study_directions,
    trial_system_attributes,
    trial_values,
    trials,
)

OF_TIME = ("wall_clock", "gpu_hours")  # running trials are parked; at the other limits they go on to their ends
BY_UUID = ("GPU-", "MIG-")  # how CUDA_VISIBLE_DEVICES begins where it says which GPUs of the machine they are


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A limit, and how much of it is used."""

    key: str  # of [budget]
    given: str  # as the study file has it
    wanted: float  # seconds, GPU-seconds, a value, or a number of trials
    used: float | None  # in the same unit; the best value, None before there is one
    is_spent: bool
    trial: int | None = None  # the best one
    seconds_left: float | None = None  # at the present number of workers; None if it is not known


@dataclass(frozen=True, kw_only=True)
class WorkerTime:
    """For how long a study has had workers."""

    wall: float  # seconds in which at least one was there, summed over clocks
    gpu: float  # seconds in which at least one occupied a device, summed over devices
    devices: int  # that are occupied now


@lru_cache(maxsize=8)
def budget_and_recovery(spec: str) -> tuple[Budget, Recovery]:
    """Return these sections of a stored spec. A worker asks for the same ones in each claim."""
    document = json.loads(spec)
    return Budget.model_validate(document.get("budget", {})), Recovery.model_validate(document.get("recovery", {}))


def look(connection: sa.Connection, study: Any, *, values: bool = True) -> list[Limit]:
    """Return the limits of a study and what is used of them.

    Args:
        connection: an open connection.
        study: our row of the study.
        values: also those that depend on the values of trials.
    """
    budget, _ = budget_and_recovery(study.spec)
    found: list[Limit] = []
    if budget.wall_clock or budget.gpu_hours:
        time = worker_time(connection, study, devices=budget.gpu_hours is not None)
        found += _of_time(budget, time or WorkerTime(wall=0.0, gpu=0.0, devices=0))
    if values and (budget.target is not None or budget.patience is not None):
        found += _of_values(connection, study, budget)
    return found


# --- time -------------------------------------------------------------------------------------------------------------


def _of_time(budget: Budget, found: WorkerTime) -> list[Limit]:
    limits = []
    if budget.wall_clock is not None and (wanted := budget.wall_clock_seconds) is not None:
        limits.append(_time("wall_clock", budget.wall_clock, wanted, found.wall, rate=1))
    if budget.gpu_hours is not None:
        limits.append(
            _time("gpu_hours", f"{budget.gpu_hours:g}", budget.gpu_hours * HOUR, found.gpu, rate=found.devices)
        )
    return limits


def _time(key: str, given: str, wanted: float, used: float, *, rate: int) -> Limit:
    left = max(0.0, wanted - used) / rate if rate else None
    return Limit(key=key, given=given, wanted=wanted, used=used, is_spent=used >= wanted, seconds_left=left)


def worker_time(connection: sa.Connection, study: Any, *, devices: bool = False) -> WorkerTime | None:
    """Return for how long a study has had workers, until each left or was last seen; None if it never had one.

    A worker that has not left counts until its next stamp is due, if its clock can be read here. Workers with the same GPUs
    count once, if their names say which GPUs these are. A worker on the CPU counts as one device.

    Args:
        connection: an open connection.
        study: our row of the study.
        devices: read also what each occupies. A database of an earlier version may lack that.
    """
    parameters = {"uid": study.uid, "lease": budget_and_recovery(study.spec)[1].lease_seconds}
    row = connection.execute(_worker_time(connection.dialect.name, devices=devices), parameters).one()
    return None if row[0] is None else WorkerTime(wall=row[0], gpu=row[1], devices=int(row[2]))


@cache
def _worker_time(dialect: str, *, devices: bool) -> Any:
    lives = _lives(dialect, devices=devices).subquery().c
    order, before = (lives.start, lives.end), (None, -1)
    until = sa.func.max(lives.end).over(partition_by=lives.clock, order_by=order, rows=before)
    until_there = sa.func.max(lives.end).over(partition_by=(lives.clock, lives.place), order_by=order, rows=before)
    gains = sa.select(
        lives.clock,
        lives.place,
        lives.devices,
        lives.is_here,
        _gain(lives.start, lives.end, until).label("wall"),
        _gain(lives.start, lives.end, until_there).label("gpu"),
    ).subquery()
    of_place = (
        sa.select(
            sa.func.sum(gains.c.wall).label("wall"),
            (sa.func.sum(gains.c.gpu) * gains.c.devices).label("gpu"),
            (sa.func.max(gains.c.is_here) * gains.c.devices).label("devices"),
        )
        .group_by(gains.c.clock, gains.c.place, gains.c.devices)
        .subquery()
        .c
    )
    return sa.select(sa.func.sum(of_place.wall), sa.func.sum(of_place.gpu), sa.func.sum(of_place.devices))


def _gain(start: Any, end: Any, until: Any) -> Any:
    """Return what a span adds to the spans that began before it and that last `until`."""
    return sa.case((until >= end, 0.0), (until > start, end - until), (end > start, end - start), else_=0.0)


def _lives(dialect: str, *, devices: bool) -> sa.Select[Any]:
    """Return a statement that reads (clock, place, devices, start, end, is_here) of each worker."""
    columns = hpo_workers.c
    lease = sa.bindparam("lease", type_=sa.Double)
    due = columns.seen_at + lease / TICKS_PER_LEASE
    now = lease_clock.now(dialect)
    is_mine = columns.clock.is_not_distinct_from(lease_clock.name(dialect))
    living = sa.case((sa.not_(is_mine), columns.seen_at), (due < now, due), else_=now)
    place: sa.ColumnElement[Any] = columns.worker
    count: sa.ColumnElement[Any] = sa.literal(1)
    if devices:
        gpus = sa.func.replace(sa.func.coalesce(columns.gpus, ""), " ", "")
        has_gpus = gpus.not_in(["", "-1"])
        place = sa.case((sa.or_(*(gpus.startswith(sign) for sign in BY_UUID)), gpus), else_=columns.worker)
        commas = sa.func.length(gpus) - sa.func.length(sa.func.replace(gpus, ",", ""))
        count = sa.case((has_gpus, 1 + commas), else_=1)
    return sa.select(
        columns.clock,
        place.label("place"),
        count.label("devices"),
        columns.started_at.label("start"),
        sa.func.coalesce(columns.left_at, living).label("end"),
        sa.case((sa.and_(columns.left_at.is_(None), is_mine, due + lease > now), 1), else_=0).label("is_here"),
    ).where(columns.study_uid == sa.bindparam("uid"), ~columns.worker.startswith(LAUNCHER))


# --- values -----------------------------------------------------------------------------------------------------------


def _of_values(connection: sa.Connection, study: Any, budget: Budget) -> list[Limit]:
    directed = sa.select(study_directions.c.direction).where(
        study_directions.c.study_id == study.study_id, study_directions.c.objective == 0
    )
    sign = -1 if connection.execute(directed).scalar_one().name == "MAXIMIZE" else 1
    best = _best(connection, study, sign)
    limits = []
    if (wanted := budget.target) is not None:
        is_spent = best is not None and sign * best.value <= sign * wanted
        used, number = (best.value, best.number) if best else (None, None)
        limits.append(
            Limit(key="target", given=f"{wanted:g}", wanted=wanted, used=used, is_spent=is_spent, trial=number)
        )
    if (patience := budget.patience) is not None:
        without = 0 if best is None else _ended_since(connection, study, best.datetime_complete)
        number = best.number if best else None
        is_spent = without >= patience
        limits.append(
            Limit(key="patience", given=str(patience), wanted=patience, used=without, is_spent=is_spent, trial=number)
        )
    return limits


def _best(connection: sa.Connection, study: Any, sign: int) -> Any:
    """Return (number, value, datetime_complete) of the best COMPLETE trial that violates nothing; of equals the first."""
    found = (
        sa.select(trials.c.trial_id, trials.c.number, trial_values.c.value, trials.c.datetime_complete)
        .join(trial_values, trial_values.c.trial_id == trials.c.trial_id)
        .where(
            trials.c.study_id == study.study_id,
            trials.c.state == "COMPLETE",
            trial_values.c.objective == 0,
            trial_values.c.value.is_not(None),
        )
        .order_by(trial_values.c.value * sign, trials.c.datetime_complete, trials.c.number)
        .offset(0)  # so that Postgres sorts first, and asks for the constraints of the best trials only
        .subquery()
    )
    attribute = trial_system_attributes.c
    violates = sa.exists().where(
        attribute.trial_id == found.c.trial_id,
        attribute.key.startswith(f"{CONSTRAINTS}:", autoescape=True),
        attribute.value_json != "NaN",
        sa.or_(attribute.value_json == "Infinity", sa.cast(attribute.value_json, sa.Double) > 0),  # 0 for SQLite
    )
    return connection.execute(sa.select(found).where(~violates).limit(1)).one_or_none()


def _ended_since(connection: sa.Connection, study: Any, moment: Any) -> int:
    """Count the trials that ended COMPLETE or PRUNED after a moment, without those that a fork copied."""
    counted = sa.select(sa.func.count()).where(
        trials.c.study_id == study.study_id,
        trials.c.state.in_(["COMPLETE", "PRUNED"]),
        trials.c.datetime_complete > moment,
        trials.c.number >= study.imported,
    )
    return int(connection.execute(counted).scalar_one())


# --- enforced ---------------------------------------------------------------------------------------------------------


def enforce(connection: sa.Connection, study: Any, *, values: bool = True) -> Limit | None:
    """Stop a study whose limit is spent, and return that limit. A spent time also holds it, so that trials are parked.

    Args:
        connection: an open transaction.
        study: our row of the study. Nothing is written if another `hpo run` has changed its spec since.
        values: also limits that depend on the values of trials.
    """
    is_stopped = study.stop_reason is not None  # then only a time can still be spent
    spent = [limit for limit in look(connection, study, values=values and not is_stopped) if limit.is_spent]
    if not spent:
        return None
    found = min(spent, key=lambda limit: limit.key not in OF_TIME)
    hold = Hold.SPENT if found.key in OF_TIME else None
    columns = hpo_studies.c
    connection.execute(
        hpo_studies.update()
        .where(columns.uid == study.uid, columns.spec == study.spec)
        .values(
            stop_reason=sa.func.coalesce(columns.stop_reason, sql.storable(reason(found))),
            hold=sa.func.coalesce(columns.hold, hold),
        )
    )
    study_rows.raise_orders(connection, study.uid)
    return found


def reopen(connection: sa.Connection, study: Any) -> None:
    """Let a study go on that a limit had stopped, if no limit is spent any more."""
    if study.hold == Hold.SPENT or (study.stop_reason or "").startswith(SIGN):
        hold = None if study.hold == Hold.SPENT else study.hold
        kept = None if (study.stop_reason or "").startswith(SIGN) else study.stop_reason
        connection.execute(
            hpo_studies.update().where(hpo_studies.c.uid == study.uid).values(hold=hold, stop_reason=kept)
        )


def reason(limit: Limit) -> str:
    """Return why a study stopped: the key and what was used."""
    if limit.key == "target":
        return f"{SIGN}target = {limit.given} is reached: trial {limit.trial} has {limit.used:.6g}"
    spent = f"{SIGN}{limit.key} = {limit.given} is spent"
    if limit.key == "patience":
        return f"{spent}: {limit.used:.0f} trials ended without a better value than trial {limit.trial}'s"
    return spent
