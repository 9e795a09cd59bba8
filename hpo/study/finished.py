"""The trials of a study that newly finished, in a line each. Read only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.storage.tables import hpo_trials, intermediate_values, trial_values, trials
from hpo.storage.trial_rows import chunks
from hpo.study import query
from hpo.study.study import Study


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
    values: dict[str, float] = field(default_factory=dict)  # by objective, if there are several
    violated: list[str] = field(default_factory=list)  # the constraints that keep it from being a result


def finished(study: Study, ids: Sequence[int], *, total: int) -> list[FinishedTrial]:
    """Return trials that have finished, in the order of their ends.

    Args:
        ids: of the trials; `summary.read` tells each of a study once.
        total: how many of the study have finished, these included.
    """
    if not ids:
        return []
    with study.storage.engine.connect() as connection:
        found = [row for chunk in chunks(ids) for row in _ended(connection, study, chunk)]
        params, judged = query.params(connection, study, ids), query.judged(connection, study, found)
    found.sort(key=lambda row: (query.timestamp(row.datetime_complete), row.number))
    return [
        FinishedTrial(
            count=count,
            number=row.number,
            state=row.state.name.lower(),
            value=None if row.value_type is None else query.value_of(row),
            outcome=row.outcome or row.state.name.lower(),
            epochs=row.epochs or 0,
            seconds=_seconds(row),
            params=params[row.trial_id],
            values=query.named(study, judged[row.trial_id].values),
            violated=judged[row.trial_id].violated if row.state == TrialState.COMPLETE else [],
        )
        for count, row in enumerate(found, start=total - len(found) + 1)
    ]


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
            query.trained_seconds(study),
        )
        .select_from(query.with_value(study))
        .where(trials.c.trial_id.in_(ids))
    ).all()


def _seconds(row: Any) -> float:
    if row.trained_seconds is not None:
        return float(row.trained_seconds)
    return max(0.0, query.timestamp(row.datetime_complete) - query.timestamp(row.datetime_start))
