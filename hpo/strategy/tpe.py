"""Optuna's TPE on numpy columns: bit-identical suggestions without an object per trial.

Optuna's TPESampler reads the whole history in Python once per group of parameters. It infers the space, splits good trials
from bad ones and collects their values. Here numpy does these three steps on `hpo.storage.finished_trials`. The estimators and
the drawing are Optuna's (5.0). Optuna's own code runs for other storages, several objectives and constraints. With several
objectives that code fails at a pruned trial, since Optuna never prunes there; see `FirstJudged`.

The private parts of Optuna that this uses are in `hpo.storage.optuna_private`. A test of equality detects changes in them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.optuna_private import ExtensibleTPE, SearchSpaceGroup, id_of, storage_of, trial_id_of
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.trial_rows import TrialRow
from hpo.strategy.rungs import Floats, Positions, counting

Space = dict[str, BaseDistribution]
Observed = tuple[
    npt.NDArray[np.int64], dict[str, Floats]
]  # the numbers of trials, and their internal values by parameter
MOST_GOOD = 25
GIVEN_KEY = "tpe:relative_params"  # prefix of the system attributes in which Optuna's TPE stores a trial's parameters


def count_good(trials: int) -> int:
    """Return how many of the finished trials count as good: Optuna's default gamma."""
    return min(math.ceil(0.1 * trials), MOST_GOOD)


class RankedTrials:
    """The COMPLETE and PRUNED trials of a study in order of their numbers, from one read. Trials opened together share it."""

    def __init__(self, columns: FinishedTrials, direction: StudyDirection) -> None:
        self._columns = columns
        self._sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
        self._positions = counting(columns)
        self._parted: dict[tuple[int, tuple[str, ...]], tuple[Observed, Observed]] = {}

    @classmethod
    def of(cls, columns: FinishedTrials, direction: StudyDirection) -> RankedTrials:
        """Return the trials of a study, with all that was computed from them, if none has finished since."""
        key = (len(columns), direction)
        kept = columns.derived.get("history")
        if kept is None or kept[0] != key:
            kept = columns.derived["history"] = key, cls(columns, direction)
        found: RankedTrials = kept[1]
        return found

    def __len__(self) -> int:
        return len(self._positions)

    # --- spaces -----------------------------------------------------------------------------------------------------

    @cached_property
    def intersection(self) -> Space:
        """The parameters that every trial has with the same distribution."""
        indices = self._columns.space_indices[self._positions]
        if not len(indices):
            return {}
        others = [self._columns.spaces[index] for index in np.unique(indices)]
        last = self._columns.spaces[indices[-1]]  # of equal distributions Optuna returns the last trial's object
        return {name: found for name, found in last.items() if all(other.get(name) == found for other in others)}

    @cached_property
    def groups(self) -> SearchSpaceGroup:
        """The parameters in groups. A trial has all parameters of a group or none.

        The first trial of each set of names is enough. After a set was added, each group lies inside or outside of it, and
        groups are only divided further. So the same set divides no group a second time. A parameter keeps the distribution of
        the first trial that has it, and that trial's set of names was new.
        """
        indices, firsts = np.unique(self._columns.space_indices[self._positions], return_index=True)
        by_names: dict[frozenset[str], Space] = {}
        for index in indices[np.argsort(firsts)]:
            space = self._columns.spaces[index]
            by_names.setdefault(frozenset(space), space)
        found = SearchSpaceGroup()
        for space in by_names.values():
            found.add_distributions(space)
        return found

    # --- good and bad -----------------------------------------------------------------------------------------------

    @cached_property
    def _ranking(self) -> Positions:
        """The trials' places, best first. Of equal trials the lower number comes first.

        COMPLETE trials come first, by value. PRUNED trials follow, by last step (later is better), then by the value there
        (NaN is worst). A PRUNED trial without reports has last step -1 and comes last. Only diverged trials come after it.
        Optuna ranks them as other PRUNED ones, by values from before they diverged.
        """
        at, columns = self._positions, self._columns
        pruned = columns.states[at] == TrialState.PRUNED.value
        scores = self._sign * np.where(pruned, columns.last_values[at], columns.values[at])
        scores[np.isnan(scores)] = math.inf
        kind = pruned.astype(np.int8) + columns.diverged[at]
        return np.lexsort((scores, np.where(pruned, -columns.last_steps[at], 0), kind))

    def split(self, good: int) -> tuple[Positions, Positions]:
        """Return the positions in the columns of the best `good` trials and of all others, both in order of number.

        A diverged trial is never good.
        """
        is_good = np.zeros(len(self), dtype=bool)
        is_good[self._ranking[:good]] = True
        is_good &= ~self._columns.diverged[self._positions]
        return self._positions[is_good], self._positions[~is_good]

    # --- values -----------------------------------------------------------------------------------------------------

    def parted(self, good: int, space: Space) -> tuple[Observed, Observed]:
        """Return the observations of the best `good` trials and of all others. They must not be changed."""
        key = good, tuple(space)  # a parameter's kind is the same in all trials of a study
        if key not in self._parted:
            below, above = self.split(good)
            self._parted[key] = self.observations(below, space), self.observations(above, space)
        return self._parted[key]

    def observations(self, at: Positions, space: Space) -> Observed:
        """Return the trials at these positions that have all parameters of a space.

        Returns their numbers [N] and, by parameter, their internal values [N].
        """
        found = {name: self._values(name, distribution)[at] for name, distribution in space.items()}
        has_all = ~np.isnan(list(found.values())).any(axis=0)
        return self._columns.numbers[at[has_all]], {name: values[has_all] for name, values in found.items()}

    def _values(self, name: str, distribution: BaseDistribution) -> Floats:
        """Return a parameter's column as Optuna's samplers see it: converted to external values and back.

        The conversion changes only fractions, which an enqueued trial may have given to an integer parameter. All trials of a
        study have the same kind of distribution, scale and choices for a parameter, since Optuna refuses others.
        """
        column = self._columns.params(name)
        return np.trunc(column) if isinstance(distribution, IntDistribution) else column


@dataclass(frozen=True)
class Look:
    """The input of a trial's sampler: the finished trials, and the parameters of other running trials by ascending number."""

    history: RankedTrials
    running: dict[int, dict[str, Any]]

    def __len__(self) -> int:
        """Return the number of trials that are ranked."""
        return len(self.history)

    @property
    def compared(self) -> int:
        """The number of trials among which the good ones are chosen."""
        return len(self)

    def good_and_bad(self, good: int, space: Space) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the internal values of the best `good` trials and of the others, by parameter.

        Running trials count as others, so that parallel workers do not all try the same point (constant liar: Ginsbourger et
        al., 2010).
        """
        below, above = self.history.parted(good, space)
        return below[1], joined(above, self.running, space)


def joined(finished: Observed, running: dict[int, dict[str, Any]], space: Space) -> dict[str, Floats]:
    """Return the internal values of finished and of running trials together, in order of number, by parameter.

    Args:
        finished: the finished trials, in order of number.
        running: the parameters of the running trials by ascending number.
        space: the parameters. Running trials without one of them are left out.
    """
    numbers, values = finished
    having = {number: params for number, params in running.items() if space.keys() <= params.keys()}
    if not having:
        return values
    places = np.searchsorted(numbers, list(having))
    return {
        name: np.insert(
            values[name], places, [distribution.to_internal_repr(params[name]) for params in having.values()]
        )
        for name, distribution in space.items()
    }


class FirstJudged(optuna.Study):
    """A study with several objectives whose `direction` is that of the first objective.

    Optuna's TPE ranks pruned trials by their last reported value and needs the study's direction for this. A study with several
    objectives has none. Trials report the first objective.
    """

    def __init__(self, study: optuna.Study) -> None:
        self.__dict__ = study.__dict__  # the same study, its caches too

    @property
    def direction(self) -> StudyDirection:
        return self.directions[0]


class ArrayTPE(ExtensibleTPE):
    """Optuna's TPESampler, faster on an OptunaStorage."""

    _seen: tuple[int, Look | None] | None = None  # the trial's id and its look
    _look: Look | None = None  # for the relative parameters of one trial; None: Optuna's own code draws them

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        self._look = self._look_at(study, trial) if self.draws_together(study) else None
        if self._look is None:
            return super().infer_relative_search_space(study, trial)
        if self.is_grouped:
            groups = self._look.history.groups
            self.keep_groups(groups)
            spaces = groups.search_spaces
        else:
            spaces = [self._look.history.intersection]
        return {name: found for space in spaces for name, found in sorted(space.items()) if not found.single()}

    def sample_group(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        """Sample one group of parameters."""
        if self._look is None or not search_space:
            return super().sample_group(study, trial, search_space)
        if len(self._look) < self.startup_trials:
            return {}
        return self._draw_from(self._look, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        look = None if self.warns_of_independent else self._look_at(study, trial)
        if look is None:
            return super().sample_independent(study, trial, param_name, param_distribution)
        if len(look) < self.startup_trials:
            return self.sample_at_random(study, trial, param_name, param_distribution)
        return self._draw_from(look, {param_name: param_distribution})[param_name]

    def sample_from_history(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        """Sample by Optuna's own code."""
        judged = FirstJudged(study) if len(study.directions) > 1 else study
        return super().sample_from_history(judged, trial, search_space)

    def _look_at(self, study: optuna.Study, trial: FrozenTrial) -> Look | None:
        """Return the look for a trial, None if Optuna's own code must run. All parameters of a trial share one look.

        Hyperband passes a study that is filtered to one bracket. Optuna's TPE ignores the filter too, since its `_get_trials`
        reads the whole study.
        """
        trial_id = trial_id_of(trial)
        if self._seen is None or self._seen[0] != trial_id:
            self._seen = trial_id, self._look_anew(study, trial)
        return self._seen[1]

    def _look_anew(self, study: optuna.Study, trial: FrozenTrial) -> Look | None:
        storage = storage_of(study)
        if not isinstance(storage, OptunaStorage) or len(study.directions) > 1:
            return None
        columns, unfinished = storage.view(id_of(study))
        if columns.has_constraints:
            return None
        running = [row for row in unfinished if row.state == TrialState.RUNNING and row.number != trial.number]
        return self.look_of(columns, sorted(running, key=lambda row: row.number), study)

    def look_of(self, columns: FinishedTrials, running: Sequence[TrialRow], study: optuna.Study) -> Look:
        """Return the look at finished trials and at other running ones, which are given by ascending number."""
        liars = running if self.has_liars else []
        return Look(
            history=RankedTrials.of(columns, study.direction),
            running=self.params_by_number(liars, columns, study),
        )

    def params_by_number(
        self, running: Sequence[TrialRow], columns: FinishedTrials, study: optuna.Study
    ) -> dict[int, dict[str, Any]]:
        """Return the parameters of running trials by number, which must not be changed.

        Those of a trial that has got no further ones since the last look are not read again.
        """
        together, known = self.draws_together(study), columns.derived.get("running", {})
        found: dict[int, tuple[Any, dict[str, Any]]] = {}
        for row in running:
            state = row.params, given_to(row) if together else ()
            kept = known.get(row.number)
            found[row.number] = kept if kept is not None and kept[0] == state else (state, params_of(row, state[1]))
        columns.derived["running"] = found
        return {number: params for number, (_, params) in found.items()}

    def _draw_from(self, look: Look, search_space: Space) -> dict[str, Any]:
        """Draw a group of parameters from a look."""
        chosen = self.count_good(look.compared)
        good, bad = look.good_and_bad(count_good(look.compared) if chosen is None else chosen, search_space)
        return self.draw(good, bad, search_space)


def given_to(row: TrialRow) -> tuple[str, ...]:
    """Return the parts of a JSON text of the parameters that were suggested to a trial together, each itself as JSON."""
    texts = (row.system_attributes.get(f"{GIVEN_KEY}:{part}") for part in itertools.count())
    return tuple(itertools.takewhile(bool, texts))  # type: ignore[arg-type]


def params_of(row: TrialRow, given: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a running trial, as Optuna's `_get_params` does without a FrozenTrial.

    Args:
        row: the trial.
        given: what was suggested to it. The objective may not have asked for all of it yet.
    """
    with contextlib.suppress(json.JSONDecodeError):  # another process may be writing them at the moment
        return {**(json.loads("".join(map(json.loads, given))) if given else {}), **row.external}
    return row.external
