"""A study's trials as columns, read once: what reports and checks compute from.

A position is a trial's index in every column. Positions of finished trials follow the trials' numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

from hpo.spec.objectives import Goals
from hpo.spec.space import Choices, Parameter, Range, ends_of, parameters
from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.optuna_private import id_of
from hpo.storage.trial_rows import TrialRow
from hpo.study import pareto
from hpo.study.plain import PlainStudy
from hpo.study.query import changes, trial_columns
from hpo.study.query.changes import Cursor
from hpo.study.study import Study

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.intp]
LENGTH = "training.epochs"  # the parameter, or the constant, that is the length of a declared trial
RATES = {"maximize": -1.0, "minimize": 1.0}  # a value times this is a loss


@dataclass(frozen=True, kw_only=True)
class Column:
    """One parameter of all finished trials."""

    name: str
    distribution: BaseDistribution  # with the widest range that a trial had
    values: Floats  # in Optuna's internal representation, NaN for a trial without it

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """The choices of a categorical parameter, None for a number."""
        return self.distribution.choices if isinstance(self.distribution, CategoricalDistribution) else None

    @property
    def is_log(self) -> bool:
        return bool(getattr(self.distribution, "log", False))

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value that it may have; of choices the first and last position."""
        if self.choices is not None:
            return 0.0, float(len(self.choices) - 1)
        return float(getattr(self.distribution, "low", 0.0)), float(getattr(self.distribution, "high", 0.0))

    @property
    def is_fixed(self) -> bool:
        """Whether it had one value only."""
        return self.distribution.single()

    @property
    def places(self) -> Floats:
        """Where each value lies in the range: 0 at its low end, 1 at its high end, by the logarithm if it is log."""
        low, high = self.ends
        if low == high:
            return np.where(np.isnan(self.values), math.nan, 0.5)
        if self.is_log:
            return (np.log(self.values) - math.log(low)) / (math.log(high) - math.log(low))
        return (self.values - low) / (high - low)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The trials of one study at one moment."""

    goals: Goals
    finished: FinishedTrials
    rows: Sequence[TrialRow]  # of the finished trials, by position
    open: Sequence[TrialRow]  # of all others
    outcomes: Sequence[str]  # by position: why a trial ended; its state, if it is not known
    seconds: Mapping[int, float]  # in training, by trial id; of trials with a timed epoch
    lengths: Floats  # steps that each trial was to have, NaN if it is not known

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        return self.finished.numbers

    @cached_property
    def is_complete(self) -> Bools:
        """The trials that are COMPLETE, with a finite value."""
        found: Bools = (self.finished.states == TrialState.COMPLETE.value) & np.isfinite(self.finished.values)
        return found

    @cached_property
    def is_pruned(self) -> Bools:
        found: Bools = self.finished.states == TrialState.PRUNED.value
        return found

    @cached_property
    def is_feasible(self) -> Bools:
        """The trials that are COMPLETE and violate nothing."""
        return self.is_complete & (self.finished.violations <= 0)

    def losses(self, objective: int = 0) -> Floats:
        """Return the values of an objective with such a sign that less is better."""
        direction = list(self.goals.directions.values())[objective]
        return self.finished.values_of(objective) * RATES[direction]

    @cached_property
    def leaders(self) -> Positions:
        """The feasible trials, best first. With several objectives, only the Pareto front."""
        at = np.flatnonzero(self.is_feasible)
        values = np.column_stack([self.finished.values_of(place)[at] for place in range(len(self.goals.names))])
        found = pareto.best_trials(self.goals, self.numbers[at], values, np.zeros(len(at)))
        return at[found]

    @cached_property
    def epochs(self) -> npt.NDArray[np.int64]:
        """How many steps each trial has reported."""
        return np.array([len(row.steps) for row in self.rows], dtype=np.int64)

    @cached_property
    def started(self) -> Floats:
        """When each trial began, in seconds since 1970."""
        return np.array([trial_columns.timestamp(row.started or row.completed) for row in self.rows], dtype=np.float64)

    @cached_property
    def ended(self) -> Floats:
        return np.array([trial_columns.timestamp(row.completed or row.started) for row in self.rows], dtype=np.float64)

    @cached_property
    def is_imported(self) -> Bools:
        """The trials that were added as finished, for example by a fork. They have cost this study nothing."""
        return np.array([row.started == row.completed for row in self.rows], dtype=bool)

    @cached_property
    def parameters(self) -> list[Column]:
        """The parameters, in the order of suggestion."""
        names: dict[str, BaseDistribution] = {}
        for space in self.finished.spaces:
            for name, distribution in space.items():
                known = names.get(name)
                names[name] = distribution if known is None else _widest(known, distribution)
        return [
            Column(name=name, distribution=distribution, values=self.finished.params(name))
            for name, distribution in names.items()
        ]

    def external(self, position: int) -> dict[str, Any]:
        """Return a finished trial's parameters as an objective sees them."""
        return self.rows[position].external


def _widest(first: BaseDistribution, second: BaseDistribution) -> BaseDistribution:
    """Return the distribution whose range is the wider one. Optuna lets only ranges change."""
    widths = [getattr(one, "high", 0) - getattr(one, "low", 0) for one in (first, second)]
    return second if widths[1] > widths[0] else first


def read(study: Study | PlainStudy) -> Columns:
    """Read all trials of a study, whoever made it. Nothing is written or locked."""
    storage = study.storage
    found = storage.optuna.rows(id_of(study.optuna) if isinstance(study, PlainStudy) else study.study_id)
    outcomes: dict[int, str | None] = {}
    seconds: dict[int, float | None] = {}
    if not isinstance(study, PlainStudy):
        with storage.engine.connect() as connection:
            pages = changes.since(connection, study, Cursor())
            outcomes = {row.trial_id: row.outcome for page in pages for row in (*page.final, *page.pending)}
            seconds = trial_columns.seconds_trained(connection, study, [row.trial_id for row in found])
    finished = [row for row in found if row.is_finished]
    columns = FinishedTrials()
    columns.add(finished)
    return Columns(
        goals=study.goals,
        finished=columns,
        rows=finished,
        open=[row for row in found if not row.is_finished],
        outcomes=[outcomes.get(row.trial_id) or row.state.name.lower() for row in finished],
        seconds={trial_id: spent for trial_id, spent in seconds.items() if spent is not None},
        lengths=_lengths(study, columns, finished),
    )


def _lengths(study: Study | PlainStudy, columns: FinishedTrials, finished: Sequence[TrialRow]) -> Floats:
    """Return the length of each trial: the epochs of a declared training, else the most steps that a COMPLETE trial had."""
    if isinstance(study, Study) and study.spec.is_declared:
        searched: Parameter | None = dict(parameters(study.spec.tree)).get(LENGTH)
        if isinstance(searched, Range):
            return columns.params(LENGTH)
        if isinstance(searched, Choices):
            places = columns.params(LENGTH)
            options = np.array([*searched.options, math.nan], dtype=np.float64)
            found: Floats = options[np.where(np.isnan(places), len(searched.options), places).astype(int)]
            return found
        length = ends_of(study.spec.tree["training"]["epochs"])[0]
        return np.full(len(columns), float(length))
    complete = [len(row.steps) for row in finished if row.state == TrialState.COMPLETE]
    return np.full(len(columns), float(max(complete, default=0)) or math.nan)
