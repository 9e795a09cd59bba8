"""Reads trials in two statements: first their rows, then their parameters, values, attributes and curves.

A `TrialRow` is a trial as it is stored. It is small, so tens of thousands can be kept. Optuna's FrozenTrial is made
from it on demand.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from sys import intern
from typing import Any, cast

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.optuna_private import trial_id_of
from hpo.storage.sql import chunks
from hpo.storage.tables import (
    SPECIAL,
    as_local,
    intermediate_values,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
)

NO_PARAMS: dict[str, BaseDistribution] = {}


@dataclass(slots=True)
class TrialRow:
    """A trial as it is stored."""

    trial_id: int
    number: int
    state: TrialState
    started: datetime | None  # UTC, without a zone
    completed: datetime | None  # likewise
    values: tuple[float, ...] | None = None  # by objective
    space: dict[str, BaseDistribution] = field(default_factory=lambda: NO_PARAMS)  # in the order of suggestion; shared
    params: tuple[float, ...] = ()  # in Optuna's internal representation, in the order of `space`
    user_attributes: dict[str, str] = field(default_factory=dict)  # JSON by key
    system_attributes: dict[str, str] = field(default_factory=dict)  # likewise
    steps: array[int] = field(default_factory=lambda: array("q"))  # ascending; at which a value was reported
    curve: array[float] = field(default_factory=lambda: array("d"))  # the values reported there

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialRow:
        """Return the row of one of Optuna's trials, without attributes and times."""
        steps = sorted(trial.intermediate_values)
        return cls(
            trial_id_of(trial),
            trial.number,
            trial.state,
            started=None,
            completed=None,
            values=None if trial.values is None else tuple(trial.values),
            space=dict(trial.distributions),
            params=tuple(found.to_internal_repr(trial.params[name]) for name, found in trial.distributions.items()),
            steps=array("q", steps),
            curve=array("d", [trial.intermediate_values[step] for step in steps]),
        )

    @property
    def is_finished(self) -> bool:
        return self.state.is_finished()

    @property
    def external(self) -> dict[str, Any]:
        """The parameters by name, as an objective sees them."""
        named = zip(self.space.items(), self.params, strict=True)
        return {name: distribution.to_external_repr(value) for (name, distribution), value in named}

    def first_from(self, step: int) -> float:
        """Return the first value that was reported at or after a step, NaN if there is none."""
        place = bisect_left(self.steps, step)
        return self.curve[place] if place < len(self.curve) else math.nan

    def frozen(self) -> FrozenTrial:
        """Return a new FrozenTrial of this trial."""
        return FrozenTrial(
            number=self.number,
            state=self.state,
            value=None,
            values=self.values,
            datetime_start=as_local(self.started),
            datetime_complete=as_local(self.completed),
            params=self.external,
            distributions=dict(self.space),
            user_attrs={key: json.loads(text) for key, text in self.user_attributes.items()},
            system_attrs={key: json.loads(text) for key, text in self.system_attributes.items()},
            intermediate_values=dict(zip(self.steps, self.curve, strict=True)),
            trial_id=self.trial_id,
        )


# --- reading ----------------------------------------------------------------------------------------------------------


def read(connection: sa.Connection, study_id: int, *, beyond: int, among: Collection[int] = ()) -> list[TrialRow]:
    """Return a study's trials with a number above `beyond`, and those with an id in `among`.

    Only `complete` reads the rest.
    """
    found: dict[int, TrialRow] = {}
    for chunk in list(chunks(sorted(among))) or [()]:
        rows = connection.execute(_beyond_or_among(), {"study_id": study_id, "beyond": beyond, "ids": chunk})
        found.update((row.trial_id, TrialRow(*row)) for row in rows)
    return list(found.values())


def read_one(connection: sa.Connection, trial_id: int) -> TrialRow | None:
    """Return a trial in full, None if it does not exist."""
    rows = [TrialRow(*row) for row in connection.execute(_among(), {"ids": [trial_id]})]
    complete(connection, rows)
    return rows[0] if rows else None


def complete(connection: sa.Connection, found: Sequence[TrialRow], *, of_study: int | None = None) -> None:
    """Read the parameters, values, attributes and curves of trials into their rows.

    Args:
        connection: an open connection.
        found: the rows.
        of_study: the study's id if these are nearly all of its trials. Then the whole study is read.
    """
    by_id = {row.trial_id: row for row in found}
    if of_study is not None:
        _attach(by_id, _raw(connection.execute(_children_of_study(), {"study_id": of_study})))
        return
    for chunk in chunks(list(by_id)):
        _attach(by_id, _raw(connection.execute(_children_among(), {"ids": chunk})))


def _raw(result: sa.CursorResult[Any]) -> Iterator[Any]:
    """Yield the driver's rows. SQLAlchemy would change nothing in these columns, but take half of the time."""
    yield from cast("Iterable[Any]", result.cursor)
    result.close()


def _attach(by_id: dict[int, TrialRow], children: Iterable[Any]) -> None:
    params: dict[int, list[tuple[int, str, str, float]]] = {}
    values: dict[int, list[tuple[int, float]]] = {}
    unordered = set()
    for trial_id, kind, position, key, number, text in children:
        row = by_id.get(trial_id)
        if row is None:
            continue  # the trial was added between the two statements
        if kind == _INTERMEDIATE:
            if row.steps and position < row.steps[-1]:
                unordered.add(trial_id)
            row.steps.append(position)
            row.curve.append(number if text is None else SPECIAL[text])
        elif kind == _PARAM:
            params.setdefault(trial_id, []).append((position, intern(key), intern(text), number))
        elif kind == _VALUE:
            values.setdefault(trial_id, []).append((position, number if text is None else SPECIAL[text]))
        elif kind == _USER:
            row.user_attributes[intern(key)] = text
        else:
            row.system_attributes[intern(key)] = text
    for trial_id, found in params.items():
        found.sort()
        by_id[trial_id].space = space_of(tuple((name, text) for _, name, text, _ in found))
        by_id[trial_id].params = tuple(value for _, _, _, value in found)
    for trial_id, objectives in values.items():
        by_id[trial_id].values = tuple(value for _, value in sorted(objectives))
    for trial_id in unordered:
        row = by_id[trial_id]
        points = sorted(zip(row.steps, row.curve, strict=True), key=lambda point: point[0])
        row.steps, row.curve = array("q", [step for step, _ in points]), array("d", [value for _, value in points])
    shared: dict[bytes, array[int]] = {}
    for row in by_id.values():  # most trials report at the same steps
        row.steps = shared.setdefault(row.steps.tobytes(), row.steps)


@lru_cache(maxsize=4096)
def space_of(described: tuple[tuple[str, str], ...]) -> dict[str, BaseDistribution]:
    """Return a trial's distributions by name. Equal spaces are one object."""
    return {name: distribution_of(text) for name, text in described}


@lru_cache(maxsize=4096)
def distribution_of(text: str) -> BaseDistribution:
    """Return the distribution that Optuna stored as JSON."""
    return json_to_distribution(text)


def distribution_in(connection: sa.Connection, study_id: int, name: str) -> BaseDistribution | None:
    """Return the distribution of a study's parameter, None if no trial of the study has it."""
    found = (
        sa.select(trial_params.c.distribution_json)
        .join(trials, trials.c.trial_id == trial_params.c.trial_id)
        .where(trials.c.study_id == study_id, trial_params.c.param_name == name)
        .limit(1)
    )
    text = connection.execute(found).scalar_one_or_none()
    return None if text is None else distribution_of(text)


def distributions_in(connection: sa.Connection, study_id: int) -> dict[str, list[BaseDistribution]]:
    """Return the different distributions that the trials of a study have of each parameter."""
    found = (
        sa.select(trial_params.c.param_name, trial_params.c.distribution_json)
        .join(trials, trials.c.trial_id == trial_params.c.trial_id)
        .where(trials.c.study_id == study_id)
        .distinct()
        .order_by(trial_params.c.param_name, trial_params.c.distribution_json)
    )
    known: dict[str, list[BaseDistribution]] = {}
    for name, text in connection.execute(found):
        known.setdefault(name, []).append(distribution_of(text))
    return known


# --- statements, each made once: making one costs more than running it ------------------------------------------------

_PARAM, _VALUE, _USER, _SYSTEM, _INTERMEDIATE = range(5)
_TRIAL = (trials.c.trial_id, trials.c.number, trials.c.state, trials.c.datetime_start, trials.c.datetime_complete)
_IDS: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)


@cache
def _beyond_or_among() -> sa.CompoundSelect[Any]:
    of_study = trials.c.study_id == sa.bindparam("study_id")
    beyond = sa.select(*_TRIAL).where(of_study, trials.c.number > sa.bindparam("beyond"))
    return sa.union_all(beyond, _among().where(of_study))  # an OR would read the whole study


@cache
def _among() -> sa.Select[Any]:
    return sa.select(*_TRIAL).where(trials.c.trial_id.in_(_IDS))


@cache
def _children_among() -> sa.CompoundSelect[Any]:
    return _children(lambda table: table.c.trial_id.in_(_IDS))


@cache
def _children_of_study() -> sa.CompoundSelect[Any]:
    ids = sa.select(trials.c.trial_id).where(trials.c.study_id == sa.bindparam("study_id"))
    return _children(lambda table: table.c.trial_id.in_(ids))


def _children(which: Any) -> sa.CompoundSelect[Any]:
    """Select (trial id, kind, position, key, number, text) of the child rows of the trials that `which` selects."""
    no_key, no_text = sa.cast(sa.null(), sa.Text), sa.cast(sa.null(), sa.Text)
    no_number, no_position = sa.cast(sa.null(), sa.Double), sa.cast(sa.null(), sa.Integer)

    def select(table: Any, kind: int, position: Any, key: Any, number: Any, text: Any) -> sa.Select[Any]:
        return sa.select(table.c.trial_id, sa.literal_column(str(kind)), position, key, number, text).where(
            which(table)
        )

    def unless_finite(column: Any) -> Any:
        return sa.func.nullif(sa.cast(column, sa.Text), "FINITE")

    param, value, user, system, point = (
        trial_params.c,
        trial_values.c,
        trial_user_attributes.c,
        trial_system_attributes.c,
        intermediate_values.c,
    )
    return sa.union_all(
        select(trial_params, _PARAM, param.param_id, param.param_name, param.param_value, param.distribution_json),
        select(trial_values, _VALUE, value.objective, no_key, value.value, unless_finite(value.value_type)),
        select(trial_user_attributes, _USER, no_position, user.key, no_number, user.value_json),
        select(trial_system_attributes, _SYSTEM, no_position, system.key, no_number, system.value_json),
        select(
            intermediate_values,
            _INTERMEDIATE,
            point.step,
            no_text,
            point.intermediate_value,
            unless_finite(point.intermediate_value_type),
        ),
    )
