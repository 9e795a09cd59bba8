"""Reads the best trials in full: values, parameters, raw curves and receipt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.errors import StudyError
from hpo.storage import sql
from hpo.study import interval
from hpo.study.format import STATES, counted
from hpo.study.interval import Interval
from hpo.study.query import ranking, recorded, trial_columns
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.text import command


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A finished trial in full."""

    number: int
    state: str
    value: float
    params: dict[str, Any]
    choices: Mapping[str, Sequence[Any]]  # of the categorical parameters, as recorded
    values: dict[str, float]  # by objective, if there are several
    constraints: dict[str, float]  # by name; one above 0 is violated
    curves: dict[str, list[float]]  # raw, by epoch; empty for a foreign trial
    receipt: dict[str, Any]
    attempt: int  # 0 for a foreign trial
    checkpoint: str | None  # its checkpoint file, while that is kept
    interval: Interval | None = None  # of the value, if there is one


def best(study: Study, k: int | None = 1, number: int | None = None) -> list[TrialResult]:
    """Return the `k` best COMPLETE trials that violate no constraint, or one trial by its number.

    Ties go to the lower number. With several objectives, the trials are those on the Pareto front, sorted by the first
    objective.

    Args:
        study: the study.
        k: how many trials; None for all of them.
        number: one COMPLETE or PRUNED trial, which may violate constraints.

    Raises StudyError if there is no such trial, or if that number has no value.
    """
    with study.storage.engine.connect() as connection:
        if number is not None:
            found: Sequence[Any] = [_numbered(connection, study, number)]
        elif ranking.is_plain(study):
            found = ranking.ranked(connection, study, k)
        else:
            found = ranking.best_trials(connection, study)[:k]
        ids = [row.trial_id for row in found]
        judged = ranking.judged(connection, study, found)
        params, curves = recorded.params(connection, study, ids), recorded.raw_curves(connection, study, ids)
        choices = recorded.choices(connection, ids)
    if not found and (complete := summarize(study).counts["complete"]):
        raise StudyError(
            f"study {study.name!r} has no result: each of its {complete} complete trials violates a constraint; "
            f"`{command('export', study.name, options='--trial N')}` takes one all the same"
        )
    if not found:
        summary = summarize(study)
        told = ", ".join(counted(summary.counts).values())
        if summary.is_over:
            raise StudyError(
                f"study {study.name!r} has no result: none of its trials is complete ({told}), and none is left to train; "
                f"`{command('status', study.name)}` says why, `hpo run FILE --trials N` adds trials"
            )
        raise StudyError(
            f"study {study.name!r} has no finished trial yet ({told or 'no trial at all'}); "
            f"let `hpo run` finish one, `{command('status', study.name)}` shows how far it is"
        )
    receipts = {row.trial_id: json.loads(row.receipt or "{}") for row in found}
    return [
        TrialResult(
            number=row.number,
            state=row.state.lower(),
            value=trial_columns.value_of(row),
            interval=interval.of_trial(study.spec, trial_columns.value_of(row), receipts[row.trial_id]),
            params=params[row.trial_id],
            choices=choices[row.trial_id],
            values=ranking.named(study, judged[row.trial_id].values),
            constraints=judged[row.trial_id].constraints,
            curves=curves[row.trial_id],
            receipt=receipts[row.trial_id],
            attempt=row.attempt or 0,
            checkpoint=trial_columns.checkpoint_of(study, row),
        )
        for row in found
    ]


def _numbered(connection: sql.Connection, study: Study, number: int) -> Any:
    row = ranking.result(connection, study, number)
    if row is None:
        raise trial_columns.no_such_trial(connection, study, number)
    if row.state not in ("COMPLETE", "PRUNED") or row.value_type is None:
        # A RUNNING trial may be parked.
        word = "unfinished" if row.state == "RUNNING" else STATES[row.state.lower()]
        raise StudyError(
            f"trial {number} of study {study.name!r} is {word} and has no result; "
            "name one that is complete or pruned, or leave the number out for the best"
        )
    return row
