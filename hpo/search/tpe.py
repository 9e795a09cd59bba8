"""Optuna's TPE on columns: the same suggestions to the last bit, without a look at every trial's object.

Optuna's TPESampler walks the whole history in Python, once per group of parameters: to infer the space, to split good trials
from bad ones, to collect their values. Here numpy does these three on `hpo.storage.finished_trials`. The estimators and all
that is drawn stay Optuna's (5.0). What the columns cannot answer for goes to Optuna's own code: other storages, several
objectives, constraints. With several objectives that code fails at a pruned trial, since Optuna prunes none there. See
`FirstJudged`. The private names of Optuna that this rests on are its methods that are overridden or called here; the test of
equality is what notices when one changes.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.search_space.group_decomposed import _SearchSpaceGroup
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.trial_rows import TrialRow

Space = dict[str, BaseDistribution]
Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.intp]  # places in columns
MOST_GOOD = 25
GIVEN_KEY = "tpe:relative_params"  # in whose attributes Optuna's TPE shares what a trial was given, part by part


def count_good(trials: int) -> int:
    """Return how many of so many finished trials count as good ones: Optuna's default gamma."""
    return min(math.ceil(0.1 * trials), MOST_GOOD)


class RankedTrials:
    """The trials of a study that count, COMPLETE and PRUNED, as they were at one look; they stand in order of their numbers."""

    def __init__(self, columns: FinishedTrials, direction: StudyDirection) -> None:
        self._columns = columns
        self._sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        counting = np.flatnonzero(np.isin(columns.states, (TrialState.COMPLETE.value, TrialState.PRUNED.value)))
        self._positions = counting[np.argsort(columns.numbers[counting])]

    def __len__(self) -> int:
        return len(self._positions)

    # --- spaces -----------------------------------------------------------------------------------------------------

    def intersection(self) -> Space:
        """Return the parameters that every trial has from the same distribution."""
        indices = self._columns.space_indices[self._positions]
        if not len(indices):
            return {}
        others = [self._columns.spaces[index] for index in np.unique(indices)]
        last = self._columns.spaces[indices[-1]]  # whose object is taken for what equals it, as Optuna does
        return {name: found for name, found in last.items() if all(other.get(name) == found for other in others)}

    def groups(self) -> _SearchSpaceGroup:
        """Return the parameters in groups that trials have whole or not at all.

        One trial of each set of names is enough, the first. Once a set was added, every group lies in it or outside, and
        groups are only ever divided further: a second time divides none. A parameter keeps the distribution of the first
        trial that has it, and that trial's set of names was new.
        """
        indices, firsts = np.unique(self._columns.space_indices[self._positions], return_index=True)
        by_names: dict[frozenset[str], Space] = {}
        for index in indices[np.argsort(firsts)]:
            space = self._columns.spaces[index]
            by_names.setdefault(frozenset(space), space)
        found = _SearchSpaceGroup()
        for space in by_names.values():
            found.add_distributions(space)
        return found

    # --- good and bad -----------------------------------------------------------------------------------------------

    @cached_property
    def _ranking(self) -> Positions:
        """The trials' places, best first; of equal ones, the lower number.

        COMPLETE ones by value, then PRUNED ones: who got further is better, then who reported the better value there, NaN
        being the worst; last those that reported nothing, whose last step is -1.
        """
        at, columns = self._positions, self._columns
        pruned = columns.states[at] == TrialState.PRUNED.value
        scores = self._sign * np.where(pruned, columns.last_values[at], columns.values[at])
        scores[np.isnan(scores)] = math.inf
        return np.lexsort((scores, np.where(pruned, -columns.last_steps[at], 0), pruned))

    def split(self, good: int) -> tuple[Positions, Positions]:
        """Return the positions in the columns of the best trials, so many, and of the others, both by number."""
        is_good = np.zeros(len(self), dtype=bool)
        is_good[self._ranking[:good]] = True
        return self._positions[is_good], self._positions[~is_good]

    # --- values -----------------------------------------------------------------------------------------------------

    def observations(self, at: Positions, space: Space) -> tuple[npt.NDArray[np.int64], dict[str, Floats]]:
        """Return the numbers and, by parameter, the internal values of those trials at positions that have all of a space."""
        found = {name: self._values(name, distribution)[at] for name, distribution in space.items()}
        has_all = ~np.isnan(list(found.values())).any(axis=0)
        return self._columns.numbers[at[has_all]], {name: values[has_all] for name, values in found.items()}

    def _values(self, name: str, distribution: BaseDistribution) -> Floats:
        """Return a parameter's column as Optuna's samplers see it: through the external value.

        That changes a fraction only, which a queued trial may have given to a parameter of ints. A study has a parameter in
        one kind of distribution, with one scale or with the same choices: Optuna refuses others.
        """
        column = self._columns.params(name)
        return np.trunc(column) if isinstance(distribution, IntDistribution) else column


@dataclass(frozen=True)
class Look:
    """What a trial's sampler sees: what has finished, and the parameters of other running trials by their numbers, ascending."""

    history: RankedTrials
    running: dict[int, dict[str, Any]]

    def good_and_bad(self, good: int, space: Space) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the internal values of the best trials, so many, and of the others, by parameter.

        Running trials are among the others, lest parallel workers all look at one place (constant liar: Ginsbourger et al.,
        2010).
        """
        below, above = self.history.split(good)
        numbers, values = self.history.observations(above, space)
        running = {number: params for number, params in self.running.items() if space.keys() <= params.keys()}
        places = np.searchsorted(numbers, list(running))
        for name, distribution in space.items():
            lies = [distribution.to_internal_repr(params[name]) for params in running.values()]
            values[name] = np.insert(values[name], places, lies)
        return self.history.observations(below, space)[1], values


class FirstJudged(optuna.Study):
    """A study of several objectives whose one direction is that of the first.

    Optuna's TPE ranks pruned trials by the last value reported, in the study's one direction, and finds none if there are
    several objectives. What is reported is the first one's value.
    """

    def __init__(self, study: optuna.Study) -> None:
        self.__dict__ = study.__dict__  # the same study, its caches too

    @property
    def direction(self) -> StudyDirection:
        return self.directions[0]


class ArrayTPE(optuna.samplers.TPESampler):
    """Optuna's TPESampler, quick on an OptunaStorage."""

    _seen: tuple[int, Look | None] | None = None  # the trial by id, and what there was to see at its first parameter
    _look: Look | None = None  # for the relative parameters of one trial; None: Optuna's own code draws them

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        self._look = self._look_at(study, trial) if self._is_multivariate(study) else None
        if self._look is None:
            return super().infer_relative_search_space(study, trial)
        if self._group:
            self._search_space_group = self._look.history.groups()
            spaces = self._search_space_group.search_spaces
        else:
            spaces = [self._look.history.intersection()]
        return {name: found for space in spaces for name, found in sorted(space.items()) if not found.single()}

    def _sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        """Sample one group of parameters."""
        if self._look is None or not search_space:
            return super()._sample_relative(study, trial, search_space)
        if len(self._look.history) < self._n_startup_trials:
            return {}
        return self._draw(self._look, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        look = None if self._warn_independent_sampling else self._look_at(study, trial)
        if look is None:
            return super().sample_independent(study, trial, param_name, param_distribution)
        if len(look.history) < self._n_startup_trials:
            return self._random_sampler.sample_independent(study, trial, param_name, param_distribution)
        return self._draw(look, {param_name: param_distribution})[param_name]

    def _sample(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        """Sample by Optuna's own code."""
        judged = FirstJudged(study) if study._is_multi_objective() else study
        return super()._sample(judged, trial, search_space)

    def _look_at(self, study: optuna.Study, trial: FrozenTrial) -> Look | None:
        """Return what there is to see, None if Optuna's own code is to look; one look serves all parameters of a trial.

        Hyperband hands in a study of one bracket, whose trials Optuna's TPE does not tell apart either: its `_get_trials` is
        that of the whole study.
        """
        if self._seen is None or self._seen[0] != trial._trial_id:
            self._seen = trial._trial_id, self._look_anew(study, trial)
        return self._seen[1]

    def _look_anew(self, study: optuna.Study, trial: FrozenTrial) -> Look | None:
        storage = study._storage
        if not isinstance(storage, OptunaStorage) or study._is_multi_objective():
            return None
        columns, unfinished = storage.view(study._study_id)
        if columns.has_constraints:
            return None
        running = [row for row in unfinished if row.state == TrialState.RUNNING and row.number != trial.number]
        liars = sorted(running, key=lambda row: row.number) if self._constant_liar else []
        return Look(
            history=RankedTrials(columns, study.direction),
            running={row.number: self._params_of(row, study) for row in liars},
        )

    def _params_of(self, row: TrialRow, study: optuna.Study) -> dict[str, Any]:
        """Return the parameters of a trial that runs, those included that it was given and has not asked for: what Optuna's
        `_get_params` returns, without a FrozenTrial for it.
        """
        parts: list[str] = []
        while self._is_multivariate(study) and (text := row.system_attributes.get(f"{GIVEN_KEY}:{len(parts)}")):
            parts.append(json.loads(text))
        with contextlib.suppress(json.JSONDecodeError):  # another process may be writing them just now
            return {**(json.loads("".join(parts)) if parts else {}), **row.external}
        return row.external

    def _draw(self, look: Look, search_space: Space) -> dict[str, Any]:
        """Draw a group of parameters as TPESampler._sample does (Bergstra et al., 2011; Watanabe, 2023)."""
        good = (self._gamma or count_good)(len(look.history))
        below, above = (
            self._parzen_estimator_cls(values, search_space, self._parzen_estimator_parameters)
            for values in look.good_and_bad(good, search_space)
        )
        samples = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(samples, self._compute_acquisition_func(samples, below, above))
        return {name: found.to_external_repr(best[name]) for name, found in search_space.items()}
