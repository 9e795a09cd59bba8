"""Claims: how a worker gets trials. Parked trials come first, then queued ones, then new ones within the budget.

A claim is one transaction under Optuna's own lock on the study. It writes the trials and their leases, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.queue import lease_clock, limits
from hpo.queue.cut_back import cut_back
from hpo.queue.finish import write_stop
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.queue.rows import open_trials, runs
from hpo.spec.failures import Kind
from hpo.storage import sql, study_rows, trial_writes
from hpo.storage.tables import (
    SCHEMA,
    Hold,
    hpo_failures,
    hpo_trials,
    trial_system_attributes,
    trials,
    utc,
)

GRID_KEY = "grid_id"  # the system attribute in which Optuna's GridSampler stores a trial's point
TAKING_ALL = (Kind.LOST_WORKER, Kind.CUDA_ERROR)  # failures that count for all trials of a worker


class Idle(Enum):
    """Why there is nothing to claim."""

    #: Trials of ours are still RUNNING, and one may be parked later. Or the study is paused.
    WAIT = "wait"
    #: The budget is spent or the study is stopped, and no trial of ours is RUNNING. Or the study is held, but not paused.
    DONE = "done"


def claim_many(
    ledger: Ledger, wanted: int, *, stack_key: str | None = None, waiting_at_most: int | None = None, fleet: int = 1
) -> list[Claim] | Idle:
    """Claim at least one trial and at most `wanted`, or return why there is none.

    With a stack open, the caller gets parked trials of its stack key or without a known key, then queued and new
    trials. Without one it gets the oldest parked trial, with others of the same stack key if that is known. If no trial
    is parked, it gets queued and new ones.

    Args:
        stack_key: the key of the stack that the caller has open.
        waiting_at_most: how many parked trials may wait for another stack. Beyond that no trial is begun that might.
        fleet: the run's number of workers. A call begins at most an even share of the new trials that are left.

    Raises StudyError if the study was deleted, or if another version of hpo has changed its schema.
    """
    for name, number in {"wanted": wanted, "waiting_at_most": waiting_at_most, "fleet": fleet}.items():
        if number is not None and number < 1:
            raise ValueError(f"claim_many: {name}={number}; it must be at least 1")
    with sql.writing(ledger.engine) as connection:
        study = lock_study(connection, ledger, enough=wanted + (waiting_at_most or 0))
        if study.hold not in (None, Hold.PAUSED):
            return Idle.DONE
        spent = limits.enforce(connection, study)
        if spent is not None and spent.key in limits.OF_TIME:
            return Idle.DONE
        left = _left(connection, ledger, study) if spent is None else 0
        if study.hold == Hold.PAUSED:
            return Idle.WAIT if left > 0 or _is_unfinished(connection, ledger) else Idle.DONE
        taken = _take_over(connection, ledger, wanted, stack_key) if study.parked else []
        if taken and stack_key is None:
            return taken
        room = wanted - len(taken)
        if waiting_at_most is not None:
            room = min(room, waiting_at_most - (study.parked - len(taken)))
        begun = _begin(connection, ledger, study, most=min(room, left), fleet=fleet)
        if taken or begun:
            return [*taken, *begun]
        if _is_unfinished(connection, ledger):
            return Idle.WAIT
        if left > 0:
            write_stop(connection, ledger.uid, "every point of the grid was tried")
        return Idle.DONE


def must_wait(ledger: Ledger) -> bool:
    """Return whether a claim would find nothing now and later ones might. It takes no lock.

    A worker that waits for others asks this first. If it returns False, only a claim can tell.
    """
    with sql.reading(ledger.engine) as connection:
        found = (*_counts(), _unfinished())
        row = study_rows.living_row(connection, ledger.study_id, *found, uid=ledger.uid, enough=1)
        if row is None or row.uid != ledger.uid or row.schema not in (None, SCHEMA) or not row.unfinished:
            return False
        if row.hold is not None:
            return bool(row.hold == Hold.PAUSED and row.stop_reason is None)  # a limit may be spent meanwhile
        return not row.parked and _left(connection, ledger, row) <= 0


def lock_study(connection: sa.Connection, ledger: Ledger, *, enough: int) -> Any:
    """Lock the study's row as Optuna does for a new trial. Return our row with the counts of `_counts`.

    Raises StudyError if the study was deleted, or if another version of hpo has changed its schema.
    """
    study_rows.lock(connection, ledger.study_id)
    row = study_rows.living_row(connection, ledger.study_id, *_counts(), uid=ledger.uid, enough=enough)
    if row is None or row.uid != ledger.uid:
        raise StudyError("the study was deleted while this worker ran; start `hpo run` again to make a new one")
    if row.schema not in (None, SCHEMA):
        raise StudyError(
            f"another version of hpo has taken over the study: its schema is {row.schema}, this version's is {SCHEMA}; "
            "start every worker with the same version"
        )
    return row


# --- parked -----------------------------------------------------------------------------------------------------------


def _take_over(connection: sa.Connection, ledger: Ledger, wanted: int, stack_key: str | None) -> list[Claim]:
    """Claim parked trials that can be trained together, the oldest first."""
    of_trial = hpo_trials.c.stack_key
    if stack_key is not None:
        rows = _parked(connection, ledger, wanted, sa.or_(of_trial.is_(None), of_trial == stack_key), ~_alone(ledger))
    else:
        rows = _parked(connection, ledger, 1)
        if rows and wanted > 1 and rows[0].stack_key is not None and not rows[0].alone:
            beside = (of_trial == rows[0].stack_key, ~_alone(ledger), hpo_trials.c.trial_id != rows[0].trial_id)
            rows += _parked(connection, ledger, wanted - 1, *beside)
    if rows:
        of_study = hpo_trials.c.study_uid == ledger.uid
        connection.execute(
            hpo_trials.update()
            .where(of_study, hpo_trials.c.trial_id.in_([row.trial_id for row in rows]))
            .values(attempt=hpo_trials.c.attempt + 1, worker=ledger.worker, **ledger.lease(connection))
        )
        cut_back(connection, rows)
    return [_taken(row) for row in rows]


def _parked(connection: sa.Connection, ledger: Ledger, most: int, *which: sa.ColumnElement[bool]) -> list[Any]:
    """Lock and return our rows of the oldest parked trials that match, each with the column `alone`."""
    found = connection.execute(
        open_trials(ledger.uid, ledger.study_id, trials.c.number, _alone(ledger).label("alone"))
        .where(hpo_trials.c.lease_until.is_(None), *which)
        .order_by(hpo_trials.c.trial_id)  # the order of their numbers, and of the index
        .limit(most)
        .with_for_update(of=hpo_trials, skip_locked=True)
    )
    return list(found)


def _alone(ledger: Ledger) -> sa.ColumnElement[bool]:
    """Return the condition that one more failure of a kind in TAKING_ALL ends the trial."""
    spent = [
        _count(
            hpo_failures.c.study_uid == hpo_trials.c.study_uid,
            hpo_failures.c.trial_id == hpo_trials.c.trial_id,
            hpo_failures.c.kind == kind,
        )
        >= ledger.policies.of(kind).retries
        for kind in TAKING_ALL
        if ledger.policies.of(kind).retries > 0
    ]
    return sa.or_(sa.false(), *spent)


def _taken(row: Any) -> Claim:
    checkpoint = None
    if row.checkpoint_epoch is not None:
        checkpoint = Checkpoint(epoch=row.checkpoint_epoch, path=row.checkpoint_path, digest=row.checkpoint_digest)
    return Claim(
        trial_id=row.trial_id,
        number=row.number,
        attempt=row.attempt + 1,
        checkpoint=checkpoint,
        accumulation=row.accumulation,
        alone=row.alone,
    )


# --- queued, new ------------------------------------------------------------------------------------------------------


def _begin(connection: sa.Connection, ledger: Ledger, study: Any, *, most: int, fleet: int) -> list[Claim]:
    """Claim queued trials, then new ones.

    Args:
        most: the largest number of trials. It may be less than 1.
    """
    if most < 1:
        return []
    queued = _queued(connection, ledger, most) if study.queued else []
    _lease_out(connection, ledger, queued)  # first, because `_dealt` counts them
    new = _new(connection, ledger, most - len(queued), left=_unnumbered(study), fleet=fleet)
    _lease_out(connection, ledger, new)
    return [*queued, *new]


def _queued(connection: sa.Connection, ledger: Ledger, most: int) -> list[Claim]:
    """Claim the oldest WAITING trials. A plain Optuna process may want them too, so the write checks the state."""
    claims: list[Claim] = []
    beyond = -1
    while (missing := most - len(claims)) and (tried := _waiting(connection, ledger, missing, beyond=beyond)):
        ids = [trial_id for trial_id, _ in tried]
        got = trial_writes.set_states(connection, ids, TrialState.RUNNING, once=(TrialState.WAITING,))
        claims += [Claim(trial_id=trial_id, number=number, attempt=1) for trial_id, number in tried if trial_id in got]
        beyond = tried[-1].number
    return claims


def _waiting(connection: sa.Connection, ledger: Ledger, most: int, *, beyond: int) -> Sequence[Any]:
    """Return the ids and numbers of the oldest WAITING trials whose number is higher than `beyond`."""
    of_study = sa.and_(trials.c.study_id == ledger.study_id, trials.c.number > beyond)
    waiting = sa.select(trials.c.trial_id, trials.c.number).where(of_study, trials.c.state == TrialState.WAITING)
    return connection.execute(waiting.order_by(trials.c.number).limit(most)).all()


def _new(connection: sa.Connection, ledger: Ledger, most: int, *, left: int, fleet: int) -> list[Claim]:
    """Insert new trials and claim them. There are none if every point of the study's grid is dealt out."""
    if most > 0 and ledger.grid_points is not None:
        left = min(left, ledger.grid_points - _dealt(connection, ledger))
    count = min(most, math.ceil(left / fleet))
    if count < 1:
        return []
    began = utc()
    inserted = trial_writes.insert_trials(connection, ledger.study_id, count, started=began)
    return [Claim(trial_id=trial_id, number=number, attempt=1, began=began) for trial_id, number in inserted]


def _lease_out(connection: sa.Connection, ledger: Ledger, begun: Sequence[Claim]) -> None:
    rows = [
        {
            "study_uid": ledger.uid,
            "trial_id": one.trial_id,
            "attempt": one.attempt,
            "worker": ledger.worker,
            "settled": False,
            "lease_seconds": ledger.lease_seconds,
        }
        for one in begun
    ]
    if rows:
        connection.execute(_leased(connection.dialect.name), rows)


@cache
def _leased(dialect: str) -> Any:
    return hpo_trials.insert().values(lease_clock.lease(dialect, sa.bindparam("lease_seconds")))


# --- counted ----------------------------------------------------------------------------------------------------------


@cache
def _counts() -> tuple[sa.ColumnElement[Any], ...]:
    """Return columns that tell how far a study is, each read from an index. Foreign trials are among them.

    They are not kept as counters, because other programs add and end trials, too. `begun` is the number of trials, and
    `queued` counts WAITING ones. `parked` counts trials of ours. Both counts end at `enough`, so their cost has a bound.
    """
    last = sa.select(sa.func.coalesce(sa.func.max(trials.c.number), -1)).where(_of_study()).scalar_subquery()
    return (
        (last + 1).label("numbered"),  # the numbers have no gaps, and an index gives the last one
        _at_most(trials, *_is_queued()).label("queued"),
        _at_most(hpo_trials, *_is_open(), hpo_trials.c.lease_until.is_(None)).label("parked"),
        sa.bindparam("enough", type_=sa.Integer).label("enough"),
    )


def _left(connection: sa.Connection, ledger: Ledger, study: Any) -> int:
    """Return how many trials the budget has left, queued ones among them. It is exact, or more than `enough`."""
    if study.stop_reason is not None:
        return 0
    queued = study.queued
    if queued > study.enough and _unnumbered(study) < 0:
        counted = sa.select(sa.func.count()).select_from(trials).where(*_is_queued())
        queued = connection.execute(counted, {"of_study": ledger.study_id}).scalar_one()
    return int(_unnumbered(study) + queued)


def _unnumbered(study: Any) -> int:
    """Return how many trials the budget has left beside all queued ones. It is negative if too many are queued."""
    return int(study.trials + study.imported - study.numbered)


def _is_unfinished(connection: sa.Connection, ledger: Ledger) -> bool:
    """Return whether a trial of ours is RUNNING."""
    parameters = {"of_study": ledger.study_id, "uid": ledger.uid}
    return bool(connection.execute(sa.select(_unfinished()), parameters).scalar_one())


@cache
def _unfinished() -> sa.ColumnElement[bool]:
    return sa.exists().where(*_is_open()).label("unfinished")


def _at_most(table: sa.Table, *which: sa.ColumnElement[bool]) -> Any:
    """Count rows up to one more than the parameter `enough`."""
    enough = sa.bindparam("enough", type_=sa.Integer) + sa.literal_column("1")
    return (
        sa.select(sa.func.count())
        .select_from(sa.select(sa.literal_column("1")).select_from(table).where(*which).limit(enough).subquery())
        .scalar_subquery()
    )


def _of_study() -> sa.ColumnElement[bool]:
    return trials.c.study_id == sa.bindparam("of_study")


def _is_queued() -> tuple[sa.ColumnElement[bool], ...]:
    return _of_study(), trials.c.state == TrialState.WAITING


def _is_open() -> tuple[sa.ColumnElement[bool], ...]:
    """Return the conditions that a row of ours is leased or parked, and RUNNING in Optuna's table."""
    running = sa.exists().where(trials.c.trial_id == hpo_trials.c.trial_id, runs(sa.bindparam("of_study")))
    return hpo_trials.c.study_uid == sa.bindparam("uid"), hpo_trials.c.settled.is_(False), running


def _count(*which: sa.ColumnElement[bool]) -> Any:
    return sa.select(sa.func.count()).where(*which).scalar_subquery()


def _dealt(connection: sa.Connection, ledger: Ledger) -> int:
    """Count the grid points that trials have, and one for each claimed trial that has none yet.

    Optuna may deal out the point of a running trial again.
    """
    of_study = trials.join(trial_system_attributes, trial_system_attributes.c.trial_id == trials.c.trial_id)
    points = (
        sa.select(sa.func.count(sa.distinct(trial_system_attributes.c.value_json)))
        .select_from(of_study)
        .where(trials.c.study_id == ledger.study_id, trial_system_attributes.c.key == GRID_KEY)
    )
    has_point = sa.exists().where(
        trial_system_attributes.c.trial_id == hpo_trials.c.trial_id, trial_system_attributes.c.key == GRID_KEY
    )
    about_to = (
        sa.select(sa.func.count())
        .select_from(hpo_trials)
        .where(hpo_trials.c.study_uid == ledger.uid, hpo_trials.c.settled.is_(False), ~has_point)
    )
    return int(connection.execute(points).scalar_one()) + int(connection.execute(about_to).scalar_one())
