"""What trials have recorded: curves, parameters, attributes, receipts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from hpo.spec import space
from hpo.storage.sql import chunks
from hpo.storage.tables import (
    hpo_curves,
    hpo_test_openings,
    hpo_trials,
    intermediate_values,
    restored,
    restored_choices,
    restored_param,
    trial_params,
    trial_user_attributes,
    trial_values,
    trials,
)
from hpo.study.query.trial_columns import value_of, with_value
from hpo.study.study import Study


def raw_curves(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, list[float]]]:
    """Return {trial id: {metric: values by epoch}}, the metrics in alphabetical order."""
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


def raw_curve(connection: sa.Connection, study: Study, ids: Sequence[int], metric: str) -> dict[int, list[float]]:
    """Return {trial id: values of one metric by epoch}."""
    curves: dict[int, list[float]] = {trial_id: [] for trial_id in ids}
    for chunk in chunks(ids):
        for row in connection.execute(
            sa.select(hpo_curves.c.trial_id, hpo_curves.c.value)
            .where(hpo_curves.c.study_uid == study.uid, hpo_curves.c.trial_id.in_(chunk), hpo_curves.c.metric == metric)
            .order_by(hpo_curves.c.trial_id, hpo_curves.c.epoch)
        ):
            curves[row.trial_id].append(math.nan if row.value is None else row.value)
    return curves


def stack_keys(connection: sa.Connection, study: Study) -> dict[int, str]:
    """Return the stack keys of a study's trials by trial id, as far as they are known."""
    wanted = sa.select(hpo_trials.c.trial_id, hpo_trials.c.stack_key).where(
        hpo_trials.c.study_uid == study.uid, hpo_trials.c.stack_key.is_not(None)
    )
    return {row.trial_id: row.stack_key for row in connection.execute(wanted)}


def largest(connection: sa.Connection, study: Study, metric: str) -> float | None:
    """Return the largest value of a raw metric over all trials, None if it was not measured."""
    of_metric = sa.and_(hpo_curves.c.study_uid == study.uid, hpo_curves.c.metric == metric)
    found: float | None = connection.execute(sa.select(sa.func.max(hpo_curves.c.value)).where(of_metric)).scalar_one()
    return found


def judged_curves(connection: sa.Connection, ids: Sequence[int]) -> dict[int, dict[int, float]]:
    """Return {trial id: {step: value}} of Optuna's intermediate values, which pruners see."""
    curves: dict[int, dict[int, float]] = {trial_id: {} for trial_id in ids}
    for chunk in chunks(ids):
        for row in connection.execute(
            sa.select(
                intermediate_values.c.trial_id,
                intermediate_values.c.step,
                intermediate_values.c.intermediate_value,
                intermediate_values.c.intermediate_value_type,
            ).where(intermediate_values.c.trial_id.in_(chunk))
        ):
            curves[row.trial_id][row.step] = restored(row.intermediate_value, row.intermediate_value_type)
    return curves


def user_attributes(connection: sa.Connection, trial_id: int) -> dict[str, Any]:
    """Return a trial's user attributes, ours included, in the order in which they were set."""
    attribute = trial_user_attributes.c
    told = connection.execute(
        sa.select(attribute.key, attribute.value_json)
        .where(attribute.trial_id == trial_id)
        .order_by(attribute.trial_user_attribute_id)
    )
    return {key: json.loads(text) for key, text in told}


def with_attribute(connection: sa.Connection, study: Study, key: str) -> dict[int, Any]:
    """Return {trial id: value of a user attribute} of the trials that have it."""
    attribute = trial_user_attributes.c
    told = (
        sa.select(attribute.trial_id, attribute.value_json)
        .join(trials, trials.c.trial_id == attribute.trial_id)
        .where(trials.c.study_id == study.study_id, attribute.key == key)
    )
    return {trial_id: json.loads(text) for trial_id, text in connection.execute(told)}


def complete_values(connection: sa.Connection, study: Study) -> list[float]:
    """Return the first value of each COMPLETE trial, those that violate a constraint included."""
    found = sa.select(trial_values.c.value, trial_values.c.value_type).select_from(with_value(study))
    of_complete = found.where(trials.c.study_id == study.study_id, trials.c.state == "COMPLETE")
    return [value_of(row) for row in connection.execute(of_complete.where(trial_values.c.value_type.is_not(None)))]


def params(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return {trial id: {parameter: value}} in the order of suggestion. Lists and tables are as in the study file."""
    found: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in ids}
    structured = {
        path: {space.encode(option): option for option in parameter.options if isinstance(option, list | dict)}
        for path, parameter in space.parameters(study.spec.tree)
        if isinstance(parameter, space.Choices)
    }
    for chunk in chunks(ids):
        for row in connection.execute(
            sa.select(
                trial_params.c.trial_id,
                trial_params.c.param_name,
                trial_params.c.param_value,
                trial_params.c.distribution_json,
            )
            .where(trial_params.c.trial_id.in_(chunk))
            .order_by(trial_params.c.param_id)
        ):
            value = restored_param(row.param_value, row.distribution_json)
            if isinstance(value, str):
                value = structured.get(row.param_name, {}).get(value, value)
            found[row.trial_id][row.param_name] = value
    return found


def receipts(connection: sa.Connection, study: Study, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return {trial id: receipt}, an empty one for a trial without."""
    found: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in ids}
    recorded = sa.select(hpo_trials.c.trial_id, hpo_trials.c.receipt).where(
        hpo_trials.c.study_uid == study.uid, hpo_trials.c.receipt.is_not(None)
    )
    for chunk in chunks(ids):
        for row in connection.execute(recorded.where(hpo_trials.c.trial_id.in_(chunk))):
            found[row.trial_id] = json.loads(row.receipt)
    return found


def choices(connection: sa.Connection, ids: Sequence[int]) -> dict[int, dict[str, list[Any]]]:
    """Return {trial id: {categorical parameter: recorded choices}}."""
    found: dict[int, dict[str, list[Any]]] = {trial_id: {} for trial_id in ids}
    recorded = sa.select(trial_params.c.trial_id, trial_params.c.param_name, trial_params.c.distribution_json)
    for chunk in chunks(ids):
        for row in connection.execute(recorded.where(trial_params.c.trial_id.in_(chunk))):
            if (options := restored_choices(row.distribution_json)) is not None:
                found[row.trial_id][row.param_name] = options
    return found


def distributions(connection: sa.Connection, ids: Sequence[int]) -> dict[str, set[str]]:
    """Return {parameter: its distributions in these trials, as Optuna's JSON}."""
    found: dict[str, set[str]] = {}
    recorded = sa.select(trial_params.c.param_name, trial_params.c.distribution_json).distinct()
    for chunk in chunks(ids):
        for name, distribution in connection.execute(recorded.where(trial_params.c.trial_id.in_(chunk))):
            found.setdefault(name, set()).add(distribution)
    return found


def count_openings(connection: sa.Connection, study: Study) -> int:
    """Return how often the study's test split was opened, as far as it is recorded."""
    counted = sa.select(sa.func.count()).where(hpo_test_openings.c.study_uid == study.uid)
    return int(connection.execute(counted).scalar_one())
