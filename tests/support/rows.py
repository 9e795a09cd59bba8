"""What the database of a study holds of its trials and their failures."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from hpo.storage.tables import hpo_failures, hpo_trials
from hpo.study.study import Study


def states(study: Study) -> list[str]:
    """Return Optuna's state of each trial, by number."""
    return [trial.state.name for trial in study.optuna.get_trials(deepcopy=False)]


def rows(study: Study) -> list[Any]:
    """Return the ledger's rows of all trials in the database."""
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_trials).order_by(hpo_trials.c.trial_id)))


def failures(study: Study) -> list[Any]:
    """Return the rows of all failures in the database, by trial, attempt and kind."""
    key = hpo_failures.c.trial_id, hpo_failures.c.attempt, hpo_failures.c.kind
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_failures).order_by(*key)))


def recorded_failures(study: Study) -> list[tuple[int, str, str]]:
    """Return what is written down of failures: attempt, kind, verdict."""
    return [(row.attempt, row.kind, row.verdict) for row in failures(study)]


def outcomes(study: Study) -> list[str | None]:
    """Return how each trial ended, as the ledger says it."""
    return [row.outcome for row in rows(study)]
