"""Reads what became of trials: one trial in full, or a line for each finished trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpo.spec.metrics import column
from hpo.storage import study_rows
from hpo.storage.study_rows import Opening
from hpo.storage.tables import COST_PREFIX, UNREAD_KEY
from hpo.study.query import failure_rows, ranking, recorded, trial_columns
from hpo.study.study import Study
from hpo.train.early_stopping import overfits_since

OURS = "hpo:"  # begins the user attributes that hpo sets


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
    attempt: int  # number of attempts, 0 for a foreign trial
    parked: int  # number of earlier attempts that ended without a failure: the trial was parked
    worker: str | None
    checkpoint: str | None  # the file with its last state, while it is kept; of a command a folder
    params: dict[str, Any]
    metrics: dict[str, float]  # of the last epoch
    overfits_since: int | None  # see `early_stopping.overfits_since`
    failures: list[FailedAttempt]
    values: dict[str, float] = field(default_factory=dict)  # by objective, if there are several
    costs: dict[str, float] = field(default_factory=dict)  # by objective; known before its first epoch
    constraints: dict[str, float] = field(default_factory=dict)  # by name; one above 0 is violated
    attributes: dict[str, Any] = field(default_factory=dict)  # what the objective set with `trial.set_user_attr`
    curve: dict[int, float] = field(default_factory=dict)  # by step, as reported to Optuna
    raw: list[float] = field(default_factory=list)  # the metric by epoch, of a declared training with one objective
    unread: list[list[int]] = field(default_factory=list)  # pairs of the epochs around a gap in a command's curve
    reports: int | None = None  # of an objective of the user's own, whose last step is in `epochs`
    tested: list[str] = field(default_factory=list)  # folders of `hpo train`, one for each opening of the test split
    openings: list[Opening] = field(default_factory=list)  # of the test split, for this trial


def history(study: Study, number: int) -> TrialHistory:
    """Read a trial's history. Raises StudyError if there is no such trial."""
    with study.storage.engine.connect() as connection:
        row = trial_columns.trial(connection, study, number)
        if row is None:
            raise trial_columns.no_such_trial(connection, study, number)
        failed = failure_rows.failures_of(connection, study, row.trial_id)
        params = recorded.params(connection, study, [row.trial_id])
        curves = recorded.raw_curves(connection, study, [row.trial_id])[row.trial_id]
        judged = ranking.judged(connection, study, [row])[row.trial_id]
        attributes = recorded.user_attributes(connection, row.trial_id)
        curve = recorded.judged_curves(connection, [row.trial_id])[row.trial_id]
        opened = study_rows.openings(connection, study.uid)
    return TrialHistory(
        number=number,
        state=trial_columns.state_of(row),
        outcome=row.outcome,
        reason=row.reason,
        value=None if row.value_type is None else trial_columns.value_of(row),
        epochs=row.epochs or 0,
        reports=None if study.spec.is_declared else row.reports,
        attempt=row.attempt or 0,
        parked=len(set(range(1, row.attempt or 0)) - {one.attempt for one in failed}),
        worker=row.worker,
        checkpoint=trial_columns.checkpoint_of(study, row),
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
        values=ranking.named(study, judged.values),
        costs={key.removeprefix(COST_PREFIX): cost for key, cost in attributes.items() if key.startswith(COST_PREFIX)},
        constraints=judged.constraints,
        attributes={key: value for key, value in attributes.items() if not key.startswith(OURS)},
        curve=dict(sorted(curve.items())),
        raw=curves.get(column(study.spec.metric), []) if study.spec.is_declared and not study.spec.objectives else [],
        unread=[gap for gap in attributes.get(UNREAD_KEY, []) if _is_between(gap, curve)],
        tested=[one.folder for one in opened if one.trial_number == number],
        openings=[one for one in opened if one.trial_number == number],
    )


def _is_between(gap: list[int], curve: Mapping[int, float]) -> bool:
    """Return whether a gap is still one. If a trial has started over since, its new curve may hold the epochs."""
    last, first = gap
    return last in curve and first in curve and not any(last < step < first for step in curve)


# --- in a line --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FinishedTrial:
    """What one line about an ended trial shows."""

    count: int  # number of finished trials in the study, up to and with this one
    number: int
    state: str
    value: float | None
    outcome: str
    epochs: int
    seconds: float  # in training; from start to end if no epoch was timed
    params: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)  # by objective, if there are several
    reports: int | None = None  # of an objective of the user's own, whose last step is in `epochs`
    violated: list[str] = field(default_factory=list)  # names of the violated constraints; only of COMPLETE trials


def finished(study: Study, ids: Sequence[int], *, total: int) -> list[FinishedTrial]:
    """Return finished trials, in the order of their ends.

    Args:
        study: the trials' study.
        ids: the trials' ids, as in `status.Reading.ended`.
        total: number of finished trials in the study, these included.
    """
    if not ids:
        return []
    with study.storage.engine.connect() as connection:
        found = trial_columns.ended(connection, study, ids)
        params, judged = recorded.params(connection, study, ids), ranking.judged(connection, study, found)
    found.sort(key=lambda row: (trial_columns.timestamp(row.datetime_complete), row.number))
    return [
        FinishedTrial(
            count=count,
            number=row.number,
            state=row.state.lower(),
            value=None if row.value_type is None else trial_columns.value_of(row),
            outcome=row.outcome or row.state.lower(),
            epochs=row.epochs or 0,
            reports=None if study.spec.is_declared else row.reports,
            seconds=_seconds_of(row),
            params=params[row.trial_id],
            values=ranking.named(study, judged[row.trial_id].values),
            violated=judged[row.trial_id].violated if row.state == "COMPLETE" else [],
        )
        for count, row in enumerate(found, start=total - len(found) + 1)
    ]


def _seconds_of(row: Any) -> float:
    if row.trained_seconds is not None:
        return float(row.trained_seconds)
    return max(0.0, trial_columns.timestamp(row.datetime_complete) - trial_columns.timestamp(row.datetime_start))
