"""What has changed in a study since a reader's last look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from hpo.queue import lease_clock
from hpo.storage.sql import chunks
from hpo.storage.tables import (
    FINISHED,
    hpo_trials,
    trials,
)
from hpo.study.query.trial_columns import OF_TRIAL, with_value
from hpo.study.study import Study

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
