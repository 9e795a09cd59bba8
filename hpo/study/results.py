"""The best trials of a study in full: value, parameters, raw curves and receipt. Read only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.storage.tables import hpo_curves, trials
from hpo.storage.trial_rows import chunks
from hpo.study import query
from hpo.study.format import STATES, counted
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
    distributions: dict[str, BaseDistribution]  # of the parameters, as they are recorded
    values: dict[str, float]  # by objective, if there are several
    constraints: dict[str, float]  # by how much each bound is violated, if there are any: more than 0 is no result
    curves: dict[str, list[float]]  # raw, by epoch; of a trial that was not ours: none
    receipt: dict[str, Any]
    attempt: int  # 0 for a trial that was not ours
    checkpoint: str | None  # the file with its last state, while it is kept


def best(study: Study, k: int | None = 1, number: int | None = None) -> list[TrialResult]:
    """Return the `k` best COMPLETE trials, best first, ties to the lower number; or the one asked for by number.

    What violates a constraint is no result unless asked for by its number. Of several objectives the trials are those of the
    front, and the best is that in the first of them.

    Args:
        k: None for the whole front, or for all.

    Raises StudyError if no trial is COMPLETE, or if that number is neither COMPLETE nor PRUNED with a value.
    """
    with study.storage.engine.connect() as connection:
        if number is not None:
            found: Sequence[Any] = [_numbered(connection, study, number)]
        elif query.is_plain(study) and k is not None:
            found = query.ranked(connection, study, k)
        else:
            found = query.best_trials(connection, study)[:k]
        ids = [row.trial_id for row in found]
        judged = query.judged(connection, study, found)
        params, curves = query.params(connection, study, ids), _raw_curves(connection, study, ids)
        distributions = query.distributions(connection, ids)
    if not found and (complete := summarize(study).counts["complete"]):
        raise StudyError(
            f"study {study.name!r} has no result: each of its {complete} complete trials violates a constraint; "
            f"`{command('export', study.name, options='--trial N')}` takes one all the same"
        )
    if not found:
        told = ", ".join(counted(summarize(study).counts).values())
        raise StudyError(
            f"study {study.name!r} has no finished trial yet ({told or 'no trial at all'}); "
            f"let `hpo run` finish one, `{command('status', study.name)}` shows how far it is"
        )
    return [
        TrialResult(
            number=row.number,
            state=row.state.name.lower(),
            value=query.value_of(row),
            params=params[row.trial_id],
            distributions=distributions[row.trial_id],
            values=query.named(study, judged[row.trial_id].values),
            constraints=judged[row.trial_id].constraints,
            curves=curves[row.trial_id],
            receipt=json.loads(row.receipt or "{}"),
            attempt=row.attempt or 0,
            checkpoint=row.checkpoint_path if row.checkpoint_path and Path(row.checkpoint_path).exists() else None,
        )
        for row in found
    ]


def _numbered(connection: sa.Connection, study: Study, number: int) -> Any:
    row = connection.execute(query.results(study).where(trials.c.number == number)).one_or_none()
    if row is None:
        last = connection.execute(
            sa.select(sa.func.max(trials.c.number)).where(trials.c.study_id == study.study_id)
        ).scalar_one()
        known = "it has none yet" if last is None else f"its trials are 0 to {last}"
        raise StudyError(f"study {study.name!r} has no trial {number}; {known}")
    if row.state not in (TrialState.COMPLETE, TrialState.PRUNED) or row.value_type is None:
        # A trial that Optuna calls RUNNING may be parked; either way it has yet to finish.
        word = "unfinished" if row.state == TrialState.RUNNING else STATES[row.state.name.lower()]
        raise StudyError(
            f"trial {number} of study {study.name!r} is {word} and has no result; "
            "name one that is complete or pruned, or leave the number out for the best"
        )
    return row


def _raw_curves(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, list[float]]]:
    curves: dict[int, dict[str, list[float]]] = {trial_id: {} for trial_id in ids}
    for chunk in chunks(ids):
        for row in connection.execute(
            sa.select(hpo_curves.c.trial_id, hpo_curves.c.metric, hpo_curves.c.value)
            .where(hpo_curves.c.study_uid == study.uid, hpo_curves.c.trial_id.in_(chunk))
            .order_by(hpo_curves.c.trial_id, hpo_curves.c.metric, hpo_curves.c.epoch)
        ):
            value = math.nan if row.value is None else row.value
            curves[row.trial_id].setdefault(row.metric, []).append(value)
    return curves
