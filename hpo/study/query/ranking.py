"""Which trials are the best: values, constraints, the Pareto front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from hpo.storage.sql import chunks
from hpo.storage.tables import (
    CONSTRAINTS,
    VALUE_TYPE,
    hpo_trials,
    trial_system_attributes,
    trial_values,
    trials,
)
from hpo.study.query.trial_columns import OF_TRIAL, value_of, with_value
from hpo.study.study import Study


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A trial's values by objective, and its constraints by name. A constraint above 0 is violated."""

    values: tuple[float, ...] = ()
    constraints: dict[str, float] = field(default_factory=dict)

    @property
    def violation(self) -> float:
        """The sum of the violations."""
        return sum(violation for violation in self.constraints.values() if violation > 0)

    @property
    def violated(self) -> list[str]:
        """The names of the violated constraints."""
        return [name for name, violation in self.constraints.items() if violation > 0]


def is_plain(study: Study) -> bool:
    """Return whether trials are judged by one value alone. A user's own objective may set constraints at any time."""
    return study.spec.is_declared and not (study.spec.objectives or study.spec.constraints)


def judged(connection: sa.Connection, study: Study, found: Sequence[Any]) -> dict[int, Judged]:
    """Return {trial id: values and constraints}. For a plain study (`is_plain`) nothing is read, and both are empty.

    Args:
        connection: an open connection.
        study: the trials' study.
        found: rows that begin with OF_TRIAL.
    """
    ids = [row.trial_id for row in found]
    if is_plain(study):
        return dict.fromkeys(ids, Judged())
    values = {row.trial_id: [] if row.value_type is None else [value_of(row)] for row in found}
    constraints: dict[int, dict[str, float]] = {trial_id: {} for trial_id in ids}
    further = sa.select(trial_values).where(trial_values.c.objective > 0).order_by(trial_values.c.objective)
    attribute = trial_system_attributes.c
    said = sa.select(attribute.trial_id, attribute.key, attribute.value_json).where(
        attribute.key.like(f"{CONSTRAINTS}%")
    )
    for chunk in chunks(ids):
        if study.spec.objectives:
            for row in connection.execute(further.where(trial_values.c.trial_id.in_(chunk))):
                values[row.trial_id].append(value_of(row))
        of_chunk = said.where(attribute.trial_id.in_(chunk)).order_by(attribute.trial_system_attribute_id)
        for row in connection.execute(of_chunk):
            constraints[row.trial_id] |= _constraints(row.key, json.loads(row.value_json))
    return {trial_id: Judged(values=tuple(values[trial_id]), constraints=constraints[trial_id]) for trial_id in ids}


def _constraints(key: str, told: Any) -> dict[str, float]:
    if isinstance(told, list):  # as Optuna 4 wrote them
        return {str(index): float(violation) for index, violation in enumerate(told)}
    return {key.removeprefix(f"{CONSTRAINTS}:"): float(told)}


def named(study: Study, values: Sequence[float]) -> dict[str, float]:
    """Return a trial's values by the names of the objectives. Empty with one objective."""
    goals = study.spec.goals
    return dict(zip(goals.names, values, strict=False)) if goals.are_several else {}


def best_trials(connection: sa.Connection, study: Study) -> list[Any]:
    """Return the COMPLETE trials that violate nothing, best first, as rows of `results`.

    With several objectives, only the Pareto front is returned. The first objective decides the order.
    """
    of_complete = results(study).where(trials.c.state == "COMPLETE", trial_values.c.value_type.is_not(None))
    found = connection.execute(of_complete.order_by(trials.c.number)).all()
    known = judged(connection, study, found)
    return [found[position] for position in positions(study, {row.trial_id: row.number for row in found}, known)]


def positions(study: Study, numbers: Mapping[int, int], known: Mapping[int, Judged]) -> list[int]:
    """Return the positions in `numbers` of the trials that `best_trials` returns, in its order.

    Args:
        study: the trials' study.
        numbers: {trial id: number} of COMPLETE trials.
        known: {trial id: values and constraints}.
    """
    if not numbers:
        return []
    import numpy as np  # loading it takes longer than reading a study with one objective

    from hpo.study import pareto

    values = np.array([known[trial_id].values for trial_id in numbers])
    violations = np.array([known[trial_id].violation for trial_id in numbers])
    found: list[int] = pareto.best_trials(
        study.spec.goals, np.array(list(numbers.values())), values, violations
    ).tolist()
    return found


def ranked(connection: sa.Connection, study: Study, k: int | None) -> Sequence[Any]:
    """Return the `k` best COMPLETE trials, all of them for None. Ties go to the lower number.

    Only foreign trials have infinite values.
    """
    rank = sa.case(
        (trial_values.c.value_type == VALUE_TYPE.INF_NEG, -1),
        (trial_values.c.value_type == VALUE_TYPE.INF_POS, 1),
        else_=0,
    )
    keys = [rank, trial_values.c.value]
    order = [key.desc() for key in keys] if study.spec.direction == "maximize" else [key.asc() for key in keys]
    return connection.execute(
        results(study)
        .where(trials.c.state == "COMPLETE", trial_values.c.value_type.is_not(None))
        .order_by(*order, trials.c.number)
        .limit(k)
    ).all()


def results(study: Study) -> sa.Select[Any]:
    """Select the columns of a trial's result."""
    return (
        sa.select(
            *OF_TRIAL,
            hpo_trials.c.attempt,
            hpo_trials.c.receipt,
            hpo_trials.c.checkpoint_path,
        )
        .select_from(with_value(study))
        .where(trials.c.study_id == study.study_id)
    )


def result(connection: sa.Connection, study: Study, number: int) -> Any:
    """Return one trial's row of `results`, None if no trial has this number."""
    return connection.execute(results(study).where(trials.c.number == number)).one_or_none()
