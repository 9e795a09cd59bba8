"""A trial cut back to its checkpoint, from which its next attempt goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from hpo.storage.finished_trials import RUNG_PREFIX
from hpo.storage.tables import CONSTRAINTS, hpo_curves, hpo_trials, intermediate_values, trial_system_attributes

RUNG_KEYS = f"{RUNG_PREFIX}%"  # system attributes that Optuna's halving pruners write
CONSTRAINT_KEYS = f"{CONSTRAINTS}%"  # system attributes that `trial.set_constraint` writes


def cut_back(connection: sa.Connection, rows: Sequence[Any]) -> None:
    """Delete what trials reported after their checkpoints, and restore the system attributes of that moment.

    Without a checkpoint the whole curve is deleted, with the attributes of RUNG_KEYS and CONSTRAINT_KEYS.

    Args:
        rows: our rows of the trials, all of one study.
    """
    ids = [row.trial_id for row in rows]
    connection.execute(_cut_off_statement(intermediate_values.c.step), {"of_trials": ids, "uid": rows[0].study_uid})
    connection.execute(_cut_off_statement(hpo_curves.c.epoch), {"of_trials": ids, "uid": rows[0].study_uid})
    kept = {row.trial_id: json.loads(row.checkpoint_attributes) for row in rows if row.checkpoint_attributes}
    of_trial = trial_system_attributes.c.trial_id
    if without := [trial_id for trial_id in ids if trial_id not in kept]:
        is_of_attempt = sa.or_(*(trial_system_attributes.c.key.like(keys) for keys in (RUNG_KEYS, CONSTRAINT_KEYS)))
        connection.execute(trial_system_attributes.delete().where(of_trial.in_(without), is_of_attempt))
    if kept:
        connection.execute(trial_system_attributes.delete().where(of_trial.in_(kept)))
    if again := [
        {"trial_id": trial_id, "key": key, "value_json": value}
        for trial_id, attributes in kept.items()
        for key, value in attributes.items()
    ]:
        connection.execute(trial_system_attributes.insert(), again)


@cache
def _cut_off_statement(epoch: sa.Column[int]) -> Any:
    """Delete a table's rows after the epochs of the trials' checkpoints. Without a checkpoint all go, step 0 too."""
    of_trial = epoch.table.c.trial_id
    checkpoint = (
        sa.select(sa.func.coalesce(hpo_trials.c.checkpoint_epoch, -1))
        .where(hpo_trials.c.study_uid == sa.bindparam("uid"), hpo_trials.c.trial_id == of_trial)
        .scalar_subquery()
    )
    cut = epoch.table.delete().where(of_trial.in_(sa.bindparam("of_trials", expanding=True)), epoch > checkpoint)
    if epoch.table is hpo_curves:
        return cut.where(hpo_curves.c.study_uid == sa.bindparam("uid"))
    return cut
