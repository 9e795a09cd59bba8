"""Launches: the workers that a study's people asked an engine for, so that any machine knows of them.

A launch has numbered slots, and the engine runs one worker for each. A slot that is retired gets no worker any more: its worker
parks its trials and leaves with exit code 0. So the number of workers is exact, whatever runs at the moment.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from hpo.errors import StudyError
from hpo.queue.models import Post
from hpo.storage import sql, study_rows
from hpo.storage.tables import hpo_launches

#: What an engine knows jobs by, as plain JSON. "first" and "last" are their slots.
Handle = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a study."""

    number: int
    engine: str
    slots: int  # that were ever asked for
    retired: frozenset[int]
    handles: tuple[Handle, ...]
    asked: Mapping[str, Any]  # what was asked for
    launched_by: str  # user@host
    launched_at: float  # seconds since 1970
    recalled_at: float | None
    refused: str | None  # why its last refused worker was refused

    @property
    def wanted(self) -> frozenset[int]:
        """The slots that are to have a worker while the study has something to do."""
        return frozenset() if self.recalled_at is not None else frozenset(range(self.slots)) - self.retired

    @property
    def submitted(self) -> frozenset[int]:
        """The slots that the engine was asked for. The others are about to be submitted, or their launcher has died."""
        return frozenset(slot for one in self.handles for slot in range(one["first"], one["last"] + 1))


def of_study(engine: sa.Engine, uid: str) -> list[Launch]:
    """Return all launches of a study, the oldest first."""
    with sql.reading(engine) as connection:
        return [launch for launch in _read(connection, uid) if launch.slots]  # without those that were refused


def begin(engine: sa.Engine, study_id: int, uid: str, *, on: str, slots: int, asked: str, launched_by: str) -> Launch:
    """Record a launch that is about to be submitted. Raises StudyError if the study was deleted.

    Args:
        engine: the database.
        study_id: the study's id.
        uid: the study's uid.
        on: the name of what starts the workers.
        slots: the number of workers.
        asked: what was asked for, as JSON.
        launched_by: user@host.
    """
    with sql.writing(engine) as connection:
        _lock(connection, study_id, uid)
        number = max((launch.number for launch in _read(connection, uid)), default=0) + 1
        row: dict[str, Any] = {
            "study_uid": uid,
            "study_id": study_id,
            "launch": number,
            "slots": slots,
            "retired": "[]",
            "handles": "[]",
        }
        row |= {"engine": on, "asked": asked, "launched_by": launched_by, "launched_at": sql.now(connection)}
        connection.execute(hpo_launches.insert().values(**row))
        return _one(connection, uid, number)


def forget(engine: sa.Engine, uid: str, number: int) -> None:
    """Hide a launch that the engine has refused. Its number is not used again, since a job of it may have begun nevertheless."""
    with sql.writing(engine) as connection:
        gone = {"slots": 0, "recalled_at": sql.now(connection)}
        connection.execute(hpo_launches.update().where(_which(uid, number)).values(**gone))


def add_handles(engine: sa.Engine, study_id: int, uid: str, number: int, handles: Sequence[Handle]) -> None:
    """Record what the engine knows new jobs of a launch by."""
    with sql.writing(engine) as connection:
        _lock(connection, study_id, uid)
        known = [*_one(connection, uid, number).handles, *handles]
        connection.execute(hpo_launches.update().where(_which(uid, number)).values(handles=json.dumps(known)))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an engine said of a launch, just before its number of workers is changed."""

    submitted: Collection[int]  # the slots that the engine had been asked for then
    states: Mapping[int, str] | None  # of the slots that the engine still has; None if it cannot be asked

    def alive(self, launch: Launch) -> list[int]:
        """Return the slots that have a worker or will have one; those first that lose least by leaving."""
        if self.states is None:
            return sorted(launch.wanted, reverse=True)
        found = [slot for slot in launch.wanted if slot in self.states or slot not in self.submitted]
        return sorted(found, key=lambda slot: (self.states is None or self.states.get(slot) != "pending", -slot))


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of the number of a study's workers, as it is recorded."""

    before: int
    added: Mapping[int, range]  # by launch
    retired: Mapping[int, Sequence[int]]  # by launch


def resize(engine: sa.Engine, study_id: int, uid: str, count: int, seen: Mapping[int, Seen]) -> Change:
    """Let a study's launches have so many workers together. The newest launch changes first.

    Args:
        engine: the database.
        study_id: the study's id.
        uid: the study's uid.
        count: the number of workers.
        seen: what the engines said, by launch. A launch that is not in it was made since and has all its workers.

    Raises StudyError if the study was deleted, or if no launch is left that could have more workers.
    """
    with sql.writing(engine) as connection:
        _lock(connection, study_id, uid)
        open_ones = [launch for launch in reversed(_read(connection, uid)) if launch.recalled_at is None]
        alive = {one.number: seen.get(one.number, Seen(submitted=(), states=None)).alive(one) for one in open_ones}
        before = sum(map(len, alive.values()))
        if count > before:
            if not open_ones:
                raise StudyError(
                    "no launch of this study is open, so there is nothing to scale; use `hpo launch` first"
                )
            newest = open_ones[0]
            added = range(newest.slots, newest.slots + count - before)
            connection.execute(hpo_launches.update().where(_which(uid, newest.number)).values(slots=added.stop))
            return Change(before=before, added={newest.number: added}, retired={})
        surplus, retired = before - count, dict[int, Sequence[int]]()
        for launch in open_ones:
            leaving = alive[launch.number][:surplus]
            if leaving:
                retired[launch.number] = sorted(leaving)
                _retire(connection, uid, launch, leaving)
            surplus -= len(leaving)
        return Change(before=before, added={}, retired=retired)


def retire(engine: sa.Engine, study_id: int, uid: str, number: int, slots: Collection[int]) -> None:
    """Let the workers of these slots leave for good, or never begin."""
    with sql.writing(engine) as connection:
        _lock(connection, study_id, uid)
        _retire(connection, uid, _one(connection, uid, number), slots)


def _retire(connection: sa.Connection, uid: str, launch: Launch, slots: Collection[int]) -> None:
    retired = json.dumps(sorted(launch.retired | set(slots)))
    connection.execute(hpo_launches.update().where(_which(uid, launch.number)).values(retired=retired))


def recall(engine: sa.Engine, study_id: int, uid: str) -> list[Launch]:
    """Let the workers of all launches leave for good. Return the launches that were not recalled before."""
    with sql.writing(engine) as connection:
        _lock(connection, study_id, uid)
        open_ones = [launch for launch in _read(connection, uid) if launch.recalled_at is None]
        of_study_ = sa.and_(hpo_launches.c.study_uid == uid, hpo_launches.c.recalled_at.is_(None))
        if open_ones:
            connection.execute(hpo_launches.update().where(of_study_).values(recalled_at=sql.now(connection)))
    return open_ones


def is_retired(engine: sa.Engine, uid: str, post: Post) -> bool:
    """Return whether the worker of a slot must leave for good."""
    with sql.reading(engine) as connection:
        found = sa.select(hpo_launches.c.retired, hpo_launches.c.recalled_at).where(_which(uid, post.launch))
        row = connection.execute(found).one_or_none()
    return row is None or row.recalled_at is not None or post.slot in json.loads(row.retired)


def note_refusal(engine: sa.Engine, uid: str, post: Post, why: str) -> None:
    """Record why a worker of a launch was refused. No engine starts it again."""
    with sql.writing(engine) as connection:
        values = {"refused": sql.storable(why)}
        connection.execute(hpo_launches.update().where(_which(uid, post.launch)).values(**values))


def _lock(connection: sa.Connection, study_id: int, uid: str) -> None:
    row = study_rows.lock_and_read(connection, study_id)
    if row is None or row.uid != uid:
        raise StudyError("the study was deleted; `hpo run` makes a new one")


def _which(uid: str, number: int) -> sa.ColumnElement[bool]:
    return sa.and_(hpo_launches.c.study_uid == uid, hpo_launches.c.launch == number)


def _one(connection: sa.Connection, uid: str, number: int) -> Launch:
    return _launch(connection.execute(sa.select(hpo_launches).where(_which(uid, number))).one())


def _read(connection: sa.Connection, uid: str) -> list[Launch]:
    if not sa.inspect(connection).has_table(hpo_launches.name):  # a database of an earlier version
        return []
    found = sa.select(hpo_launches).where(hpo_launches.c.study_uid == uid).order_by(hpo_launches.c.launch)
    return [_launch(row) for row in connection.execute(found)]


def _launch(row: Any) -> Launch:
    return Launch(
        number=row.launch,
        engine=row.engine,
        slots=row.slots,
        retired=frozenset(json.loads(row.retired)),
        handles=tuple(json.loads(row.handles)),
        asked=json.loads(row.asked),
        launched_by=row.launched_by,
        launched_at=row.launched_at,
        recalled_at=row.recalled_at,
        refused=row.refused,
    )
