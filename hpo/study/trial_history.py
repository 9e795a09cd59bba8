"""What became of a trial: in a line once it has finished, or in full whatever its state. Read only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.queue import lease_clock
from hpo.storage.finished_trials import COST_PREFIX
from hpo.storage.tables import (
    hpo_curves,
    hpo_failures,
    hpo_trials,
    intermediate_values,
    trial_user_attributes,
    trial_values,
    trials,
)
from hpo.storage.trial_rows import chunks
from hpo.study import query
from hpo.study.study import Study
from hpo.train.early_stopping import overfits_since


@dataclass(frozen=True, kw_only=True)
class FailedAttempt:
    """An attempt that failed."""

    attempt: int
    kind: str
    verdict: str
    worker: str
    message: str
    traceback: str | None


@dataclass(frozen=True, kw_only=True)
class TrialHistory:
    """One trial in full."""

    number: int
    state: str  # as `Summary.counts` calls them: complete, pruned, fail, running, parked, foreign, waiting
    outcome: str | None
    reason: str | None
    value: float | None
    epochs: int
    attempt: int  # how often the trial was taken up, 0 if it is not ours
    parked: int  # how many attempts before this one ended without a failure: it waits for its turn, or for a worker
    worker: str | None
    checkpoint: str | None
    params: dict[str, Any]
    metrics: dict[str, float]  # as the last epoch has them
    overfits_since: (
        int | None
    )  # the epoch of the lowest validation loss, if it has risen much while the training loss fell
    failures: list[FailedAttempt]
    values: dict[str, float] = field(default_factory=dict)  # by objective, if there are several
    costs: dict[str, float] = field(default_factory=dict)  # known before it was trained
    constraints: dict[str, float] = field(
        default_factory=dict
    )  # by how much each is violated: more than 0 is no result


def history(study: Study, number: int) -> TrialHistory:
    """Read a trial's history; StudyError if there is no such trial."""
    epochs = sa.select(sa.func.max(intermediate_values.c.step)).where(
        intermediate_values.c.trial_id == trials.c.trial_id
    )
    with study.storage.engine.connect() as connection:
        row = connection.execute(
            sa.select(
                trials.c.trial_id,
                trials.c.number,
                trials.c.state,
                trial_values.c.value,
                trial_values.c.value_type,
                hpo_trials.c.outcome,
                hpo_trials.c.reason,
                hpo_trials.c.attempt,
                hpo_trials.c.worker,
                hpo_trials.c.checkpoint_path,
                lease_clock.is_live(connection.dialect.name).label("live"),
                epochs.correlate(trials).scalar_subquery().label("epochs"),
            )
            .select_from(query.with_value(study))
            .where(trials.c.study_id == study.study_id, trials.c.number == number)
        ).one_or_none()
        if row is None:
            raise StudyError(f"study {study.name!r} has no trial {number}")
        failed = connection.execute(
            sa.select(hpo_failures)
            .where(hpo_failures.c.study_uid == study.uid, hpo_failures.c.trial_id == row.trial_id)
            .order_by(hpo_failures.c.attempt, hpo_failures.c.failed_at)
        ).all()
        params = query.params(connection, study, [row.trial_id])
        curves = _curves(connection, study, row.trial_id)
        judged = query.judged(connection, study, [row])[row.trial_id]
        told = connection.execute(
            sa.select(trial_user_attributes.c.key, trial_user_attributes.c.value_json).where(
                trial_user_attributes.c.trial_id == row.trial_id, trial_user_attributes.c.key.like(f"{COST_PREFIX}%")
            )
        )
        costs = {key.removeprefix(COST_PREFIX): json.loads(text) for key, text in told}
    return TrialHistory(
        number=number,
        state=_state(row),
        outcome=row.outcome,
        reason=row.reason,
        value=None if row.value_type is None else query.value_of(row),
        epochs=row.epochs or 0,
        attempt=row.attempt or 0,
        parked=len(set(range(1, row.attempt or 0)) - {one.attempt for one in failed}),
        worker=row.worker,
        checkpoint=row.checkpoint_path,
        params=params[row.trial_id],
        metrics={metric: curve[-1] for metric, curve in curves.items()},
        overfits_since=overfits_since(curves.get("train_loss", []), curves.get("validation_loss", [])),
        failures=[
            FailedAttempt(
                attempt=one.attempt,
                kind=one.kind,
                verdict=one.verdict,
                worker=one.worker,
                message=one.message,
                traceback=one.traceback,
            )
            for one in failed
        ],
        values=query.named(study, judged.values),
        costs=costs,
        constraints=judged.constraints,
    )


def _curves(connection: sa.Connection, study: Study, trial_id: int) -> dict[str, list[float]]:
    """Return the raw curves of a trial by metric, in the order of the alphabet."""
    found: dict[str, list[float]] = {}
    for row in connection.execute(
        sa.select(hpo_curves.c.metric, hpo_curves.c.value)
        .where(hpo_curves.c.study_uid == study.uid, hpo_curves.c.trial_id == trial_id)
        .order_by(hpo_curves.c.metric, hpo_curves.c.epoch)
    ):
        found.setdefault(row.metric, []).append(math.nan if row.value is None else row.value)
    return found


def _state(row: Any) -> str:
    if row.state != TrialState.RUNNING:
        return str(row.state.name.lower())
    if row.attempt is None:
        return "foreign"
    return "running" if row.live else "parked"


# --- in a line ---------------------------------------------------------------------------------------------------------


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
        ids: of the trials; `status.read` tells each of a study once.
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
            seconds=_seconds_of(row),
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


def _seconds_of(row: Any) -> float:
    if row.trained_seconds is not None:
        return float(row.trained_seconds)
    return max(0.0, query.timestamp(row.datetime_complete) - query.timestamp(row.datetime_start))
