"""Reads trials for other programs: parameters, curves and receipt of each one that began, since an earlier reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.study.query import changes, ranking, recorded, trial_columns
from hpo.study.study import Study

VALUE = "value"  # the name of the curve that the pruner sees


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial that has begun."""

    number: int
    state: str  # complete, pruned, fail, running, parked or foreign
    is_final: bool  # it never changes again
    outcome: str | None
    attempts: int  # 0 for a foreign trial
    began: float  # seconds since 1970
    ended: float | None
    params: dict[str, Any]
    values: dict[str, float]  # by objective; {"value": ...} if there is one; empty before the end
    curves: dict[str, dict[int, float]]  # {metric: {step: value}}; "value" is the one that the pruner sees
    receipt: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Records:
    """What a reading found."""

    trials: list[TrialRecord]
    cursor: changes.Cursor  # for the next reading


def read(study: Study, cursor: changes.Cursor | None = None) -> Records:
    """Read the trials that were not final at the cursor, in the order of their numbers. Nothing is written or locked."""
    with study.storage.engine.connect() as connection:
        cursor, final, found = cursor or changes.Cursor(), set(), []
        for news in changes.since(connection, study, cursor):
            cursor = news.cursor
            final |= {row.trial_id for row in news.final}
            found += [*news.final, *news.pending]
        begun = sorted((row for row in found if row.state != "WAITING"), key=lambda row: int(row.number))
        ids = [row.trial_id for row in begun]
        params, receipts = recorded.params(connection, study, ids), recorded.receipts(connection, study, ids)
        raw, seen = recorded.raw_curves(connection, study, ids), recorded.judged_curves(connection, ids)
        judged = ranking.judged(connection, study, begun)
    return Records(
        trials=[
            TrialRecord(
                number=row.number,
                state=trial_columns.state_of(row),
                is_final=row.trial_id in final,
                outcome=row.outcome,
                attempts=row.attempt or 0,
                began=trial_columns.timestamp(row.datetime_start),
                ended=trial_columns.timestamp(row.datetime_complete) if row.datetime_complete else None,
                params=params[row.trial_id],
                values=_values(study, row, judged[row.trial_id].values),
                curves=_curves(raw[row.trial_id], seen[row.trial_id]),
                receipt=receipts[row.trial_id],
            )
            for row in begun
        ],
        cursor=cursor,
    )


def _values(study: Study, row: Any, judged: Sequence[float]) -> dict[str, float]:
    if row.value_type is None:
        return {}
    return ranking.named(study, judged) or {VALUE: trial_columns.value_of(row)}


def _curves(raw: Mapping[str, Sequence[float]], seen: Mapping[int, float]) -> dict[str, dict[int, float]]:
    """Return all curves by step. Raw ones are of declared trainings, whose epochs count from 1."""
    curves = {metric: dict(enumerate(values, start=1)) for metric, values in raw.items() if metric != VALUE}
    return {**curves, VALUE: dict(sorted(seen.items()))} if seen else curves
