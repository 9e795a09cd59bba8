"""The trials of a study that newly finished, each told once, in a line. Read only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from hpo import rows
from hpo.study import Study
from hpo.tables import hpo_trials, intermediate_values, trial_values, trials


@dataclass(frozen=True, kw_only=True)
class FinishedTrial:
    """A trial that ended, in a line."""

    count: int  # how many of the study have finished, this one included
    number: int
    state: str
    value: float | None
    outcome: str
    epochs: int
    seconds: float  # in training; from start to end if its epochs were not timed
    params: dict[str, Any]


@dataclass(kw_only=True)
class Cursor:
    """How far `finished` has told: every trial up to `low`, and those in `seen` beyond it.

    Not a time: clocks differ between workers, and a trial may end long after those that were started later.
    """

    low: int = 0
    seen: set[int] = field(default_factory=set)
    told: int = 0  # trials that the cursor has passed

    @classmethod
    def at_now(cls, study: Study) -> Cursor:
        """Return a cursor past every trial that has finished so far."""
        cursor = cls()
        with study.storage.engine.connect() as connection:
            _pass(connection, study, cursor)
        return cursor


def finished(study: Study, cursor: Cursor) -> list[FinishedTrial]:
    """Return the trials that finished since the cursor's last use, by their end, and move the cursor past them."""
    before = cursor.told
    with study.storage.engine.connect() as connection:
        ids = _pass(connection, study, cursor)
        found = [row for chunk in rows.chunks(ids) for row in _ended(connection, study, chunk)]
        params = rows.params(connection, study, ids)
    found.sort(key=lambda row: (rows.timestamp(row.datetime_complete), row.number))
    return [
        FinishedTrial(
            count=count,
            number=row.number,
            state=row.state.name.lower(),
            value=None if row.value_type is None else rows.value_of(row),
            outcome=row.outcome or row.state.name.lower(),
            epochs=row.epochs or 0,
            seconds=_seconds(row),
            params=params[row.trial_id],
        )
        for count, row in enumerate(found, start=before + 1)
    ]


def _pass(connection: sa.Connection, study: Study, cursor: Cursor) -> list[int]:
    """Move the cursor past what has finished; return the ids that it had not passed before."""
    beyond = sa.and_(trials.c.study_id == study.study_id, trials.c.trial_id > cursor.low)
    # First how far all is finished, then what is: a trial that ends in between is told now or next time.
    first_open, last = connection.execute(
        sa.select(
            sa.func.min(sa.case((trials.c.state.not_in(rows.FINISHED), trials.c.trial_id))),
            sa.func.max(trials.c.trial_id),
        ).where(beyond)
    ).one()
    if last is None:
        return []
    ended = connection.execute(sa.select(trials.c.trial_id).where(beyond, trials.c.state.in_(rows.FINISHED)))
    passed = set(ended.scalars())
    new = passed - cursor.seen
    cursor.low = last if first_open is None else first_open - 1
    cursor.seen = {trial_id for trial_id in passed if trial_id > cursor.low}
    cursor.told += len(new)
    return sorted(new)


def _ended(connection: sa.Connection, study: Study, ids: Sequence[int]) -> Sequence[Any]:
    epochs = sa.select(sa.func.max(intermediate_values.c.step)).where(
        intermediate_values.c.trial_id == trials.c.trial_id
    )
    return connection.execute(
        sa.select(
            trials.c.trial_id,
            trials.c.number,
            trials.c.state,
            trials.c.datetime_start,
            trials.c.datetime_complete,
            trial_values.c.value,
            trial_values.c.value_type,
            hpo_trials.c.outcome,
            epochs.correlate(trials).scalar_subquery().label("epochs"),
            rows.trained_seconds(study),
        )
        .select_from(rows.with_value(study))
        .where(trials.c.trial_id.in_(ids))
    ).all()


def _seconds(row: Any) -> float:
    if row.trained_seconds is not None:
        return float(row.trained_seconds)
    return max(0.0, rows.timestamp(row.datetime_complete) - rows.timestamp(row.datetime_start))
