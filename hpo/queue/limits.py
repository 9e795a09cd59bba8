"""Limits of a study beside its number of trials: wall clock, GPU-hours, a target, trials without a gain.

What is used of them is computed from the rows of workers and of trials, by the storage's clocks. So it is the same for every
worker, and a killed one loses nothing of it. The limits are those of the study's stored spec, which the last `hpo run` set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from hpo.queue import lease_clock
from hpo.queue.workers import LAUNCHER, TICKS_PER_LEASE
from hpo.spec.study_file import Budget, Recovery
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

MEND = "change it in [budget], then hpo run again"
SIGN = "budget."  # the beginning of a stop reason that a limit gave
OF_TIME = (
    "wall_clock",
    "gpu_hours",
)  # limits at which running trials are parked; at the others they go on to their ends
BY_UUID = ("GPU-", "MIG-")  # how CUDA_VISIBLE_DEVICES begins where it says which GPU of the machine it is
HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A limit, and how much of it is used."""

    key: str  # of [budget]
    wanted: float  # seconds, GPU-seconds, a value, or a number of trials
    used: float | None  # in the same unit; the best value, None before there is one
    is_spent: bool
    trial: int | None = None  # the best one
    seconds_left: float | None = None  # at the present number of workers; None if it is not known


@dataclass(frozen=True, kw_only=True)
class Life:
    """One worker's time, by its clock."""

    worker: str
    clock: str | None
    gpus: str | None  # CUDA_VISIBLE_DEVICES
    start: float
    end: float
    is_here: bool  # has not left

    @property
    def devices(self) -> Sequence[str]:
        """What it occupies. A GPU that several workers share is one, if its name says so; a worker on the CPU is one."""
        names = [name for name in (self.gpus or "").split(",") if name.strip() not in ("", "-1")]
        return [name if name.startswith(BY_UUID) else f"{self.worker}:{name}" for name in names] or [self.worker]


def budget_of(spec: str) -> Budget | None:
    """Return the budget of a stored spec, None if it has no limit but trials."""
    if not any(
        f'"{key}"' in spec for key in Budget.LIMITS
    ):  # most studies; the rest of the spec is not parsed for them
        return None
    budget = Budget.model_validate(json.loads(spec).get("budget", {}))
    return budget if budget.limits else None


def look(connection: sa.Connection, study: Any, *, values: bool = True) -> list[Limit]:
    """Return the limits of a study and what is used of them.

    Args:
        connection: an open connection.
        study: our row of the study.
        values: also those that depend on the values of trials.
    """
    budget = budget_of(study.spec)
    if budget is None:
        return []
    found: list[Limit] = []
    if budget.wall_clock or budget.gpu_hours:
        found += _of_time(budget, lives(connection, study, devices=budget.gpu_hours is not None))
    if values and (budget.target is not None or budget.patience is not None):
        found += _of_values(connection, study, budget)
    return found


# --- time -------------------------------------------------------------------------------------------------------------


def _of_time(budget: Budget, found: Sequence[Life]) -> list[Limit]:
    here = [life for life in found if life.is_here]
    limits = []
    if budget.wall_clock_seconds is not None:
        used, wanted = wall_seconds(found), budget.wall_clock_seconds
        left = max(0.0, wanted - used) if here else None
        limits.append(Limit(key="wall_clock", wanted=wanted, used=used, is_spent=used >= wanted, seconds_left=left))
    if budget.gpu_hours is not None:
        used, wanted = gpu_seconds(found), budget.gpu_hours * HOUR
        rate = len({device for life in here for device in life.devices})
        left = max(0.0, wanted - used) / rate if rate else None
        limits.append(Limit(key="gpu_hours", wanted=wanted, used=used, is_spent=used >= wanted, seconds_left=left))
    return limits


def wall_seconds(found: Iterable[Life]) -> float:
    """Return the seconds in which at least one worker was there, summed over clocks."""
    by_clock: dict[str | None, list[tuple[float, float]]] = {}
    for life in found:
        by_clock.setdefault(life.clock, []).append((life.start, life.end))
    return sum(map(covered, by_clock.values()))


def gpu_seconds(found: Iterable[Life]) -> float:
    """Return the seconds in which at least one worker occupied a device, summed over devices."""
    by_device: dict[tuple[str, str | None], list[tuple[float, float]]] = {}
    for life in found:
        for device in life.devices:
            by_device.setdefault((device, life.clock), []).append((life.start, life.end))
    return sum(map(covered, by_device.values()))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time that spans (start, end) cover together. Overlaps count once."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def lives(connection: sa.Connection, study: Any, *, devices: bool = False) -> list[Life]:
    """Return the times of all workers that a study has had, until each left or was last seen.

    A worker that has not left lives until its next stamp is due, if its clock can be read here.

    Args:
        connection: an open connection.
        study: our row of the study.
        devices: read also what each occupies. A database of an earlier version may lack that.
    """
    dialect, columns = connection.dialect.name, hpo_workers.c
    lease = Recovery.model_validate(json.loads(study.spec).get("recovery", {})).lease_seconds
    due = columns.seen_at + lease / TICKS_PER_LEASE
    now = lease_clock.now(dialect)
    is_mine = columns.clock.is_not_distinct_from(lease_clock.name(dialect))
    living = sa.case((sa.not_(is_mine), columns.seen_at), (due < now, due), else_=now)
    rows = connection.execute(
        sa.select(
            columns.worker,
            columns.clock,
            (columns.gpus if devices else sa.null()).label("gpus"),
            columns.started_at,
            sa.func.coalesce(columns.left_at, living).label("until"),
            sa.and_(columns.left_at.is_(None), is_mine, due + lease > now).label("is_here"),
        ).where(columns.study_uid == study.uid, ~columns.worker.startswith(LAUNCHER))
    )
    return [
        Life(
            worker=row.worker,
            clock=row.clock,
            gpus=row.gpus,
            start=row.started_at,
            end=row.until,
            is_here=bool(row.is_here),
        )
        for row in rows
    ]


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
        limits.append(Limit(key="target", wanted=wanted, used=used, is_spent=is_spent, trial=number))
    if (patience := budget.patience) is not None:
        without = 0 if best is None else _ended_since(connection, study, best.datetime_complete)
        number = best.number if best else None
        limits.append(Limit(key="patience", wanted=patience, used=without, is_spent=without >= patience, trial=number))
    return limits


def _best(connection: sa.Connection, study: Any, sign: int) -> Any:
    """Return (number, value, datetime_complete) of the best COMPLETE trial that violates nothing; of equals the first."""
    attribute = trial_system_attributes.c
    violates = sa.exists().where(
        attribute.trial_id == trials.c.trial_id,
        attribute.key.startswith(f"{CONSTRAINTS}:", autoescape=True),
        sa.cast(attribute.value_json, sa.Double) > 0,
    )
    found = (
        sa.select(trials.c.number, trial_values.c.value, trials.c.datetime_complete)
        .join(trial_values, trial_values.c.trial_id == trials.c.trial_id)
        .where(
            trials.c.study_id == study.study_id,
            trials.c.state == "COMPLETE",
            trial_values.c.objective == 0,
            trial_values.c.value.is_not(None),
            ~violates,
        )
        .order_by(trial_values.c.value * sign, trials.c.datetime_complete, trials.c.number)
        .limit(1)
    )
    return connection.execute(found).one_or_none()


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


def enforce(connection: sa.Connection, study: Any) -> Limit | None:
    """Stop a study whose limit is spent, and return that limit. A spent time also holds it, so that trials are parked.

    Args:
        connection: an open transaction.
        study: our row of the study.
    """
    is_stopped = study.stop_reason is not None  # then only a time can still be spent
    spent = [limit for limit in look(connection, study, values=not is_stopped) if limit.is_spent]
    if not spent:
        return None
    found = min(spent, key=lambda limit: limit.key not in OF_TIME)
    hold = Hold.SPENT if found.key in OF_TIME else None
    columns = hpo_studies.c
    connection.execute(
        hpo_studies.update()
        .where(columns.uid == study.uid)
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
    match limit.key:
        case "target":
            return f"{SIGN}target = {limit.wanted:g} is reached: trial {limit.trial} has {limit.used:.6g}"
        case "patience":
            ended = f"{limit.used:.0f} trials ended without a better value than trial {limit.trial}'s"
            return f"{SIGN}patience = {limit.wanted:.0f} is spent: {ended}"
        case "gpu_hours":
            return f"{SIGN}gpu_hours = {limit.wanted / HOUR:g} is spent"
    return f"{SIGN}wall_clock of {limit.wanted:g} s is spent"
