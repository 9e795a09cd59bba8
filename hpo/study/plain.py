"""Studies that Optuna itself made, in a storage that we share: read like our own, and never written to.

They have no row of ours and no spec: what is known of one is what Optuna's own tables say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import StudyError
from hpo.spec.objectives import OWN_VALUE, Goals
from hpo.storage.connect import Storage
from hpo.study import pareto, results, status, trial_history
from hpo.study import study as studies
from hpo.study.results import TrialResult
from hpo.study.status import Best, FrontTrial, Summary, with_foreign
from hpo.study.study import METRIC_NAMES_KEY, Study
from hpo.study.trial_history import TrialHistory


@dataclass(frozen=True, kw_only=True)
class PlainStudy:
    """An open study of Optuna's own."""

    storage: Storage
    optuna: optuna.Study
    goals: Goals

    @property
    def name(self) -> str:
        return self.optuna.study_name

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)


@dataclass(frozen=True, kw_only=True)
class PlainSummary(Summary):
    """A study of Optuna's own at one moment; its budget is what it has."""

    made_by: str = "Optuna"

    @property
    def searched_by(self) -> str:
        return "made by Optuna, not by hpo, which only reads it"


def open_any(place: Storage, name: str) -> Study | PlainStudy:
    """Open a study for reading, whoever made it; StudyError if there is none."""
    if not studies.is_plain(place, name):
        return studies.join(place, name)
    opened = optuna.load_study(study_name=name, storage=place.optuna)
    system = place.optuna.get_study_system_attrs(opened._study_id)
    several = [f"value_{position}" for position in range(len(opened.directions))]
    names = system.get(METRIC_NAMES_KEY) or (several if len(several) > 1 else [OWN_VALUE])
    directions: dict[str, Any] = {
        name: direction.name.lower() for name, direction in zip(names, opened.directions, strict=True)
    }
    return PlainStudy(storage=place, optuna=opened, goals=Goals(directions=directions))


def statuses(place: Storage) -> list[Summary]:
    """Read the summary of every study in a storage, in the order they were made."""
    return [summarize(open_any(place, name)) for name in studies.all_names(place)]


def summarize(study: Study | PlainStudy) -> Summary:
    """Read how a study stands, whoever made it."""
    return _summary(study) if isinstance(study, PlainStudy) else status.summarize(study)


def best(study: Study | PlainStudy, k: int | None = 1, number: int | None = None) -> list[TrialResult]:
    """Return the best trials, or the one with this number, as `results.best` does; StudyError likewise."""
    return _best(study, k, number) if isinstance(study, PlainStudy) else results.best(study, k, number)


def history(study: Study | PlainStudy, number: int) -> TrialHistory:
    """Return a trial in full; StudyError if there is no such trial."""
    return _history(study, number) if isinstance(study, PlainStudy) else trial_history.history(study, number)


def _summary(study: PlainStudy) -> PlainSummary:
    found = study.trials
    states = Counter(trial.state for trial in found)
    counts = {
        "complete": states[TrialState.COMPLETE],
        "pruned": states[TrialState.PRUNED],
        "fail": states[TrialState.FAIL],
        "running": 0,
        "parked": 0,
        "foreign": states[TrialState.RUNNING],
        "waiting": states[TrialState.WAITING],
    }
    leading, several = _leading(study.goals, found), study.goals.are_several
    starts = [trial.datetime_start for trial in found if trial.datetime_start]
    ends = [trial.datetime_complete for trial in found if trial.datetime_complete]
    return PlainSummary(
        name=study.name,
        direction=study.goals.directions[study.goals.first],
        sampler="unknown",
        pruner="unknown",
        counts=counts,
        budget=len(found),
        spent=len(found) - counts["waiting"],
        best=Best(number=leading[0].number, value=leading[0].values[0]) if leading else None,
        stop_reason=None,
        hold=None,
        running=[],
        parked=[],
        failures=with_foreign([], counts["fail"]),
        seconds=max(0.0, (max(ends) - min(starts)).total_seconds()) if starts and ends else 0.0,
        seconds_per_trial=None,
        seconds_left=None,
        objectives=dict(study.goals.directions) if several else {},
        front=[FrontTrial(number=one.number, values=_named(study.goals, one)) for one in leading] if several else [],
        infeasible=sum(trial.state == TrialState.COMPLETE and _violates(trial) for trial in found),
    )


def _best(study: PlainStudy, k: int | None, number: int | None) -> list[TrialResult]:
    found = study.trials
    if number is None:
        leading = _leading(study.goals, found)[:k]
        if not leading:
            raise StudyError(f"study {study.name!r} has no complete trial that is a result")
        return [_result(study.goals, trial) for trial in leading]
    trial = _numbered(study, found, number)
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED) or not trial.values:
        raise StudyError(f"trial {number} of study {study.name!r} is {trial.state.name} and has no result")
    return [_result(study.goals, trial)]


def _history(study: PlainStudy, number: int) -> TrialHistory:
    trial = _numbered(study, study.trials, number)
    return TrialHistory(
        number=number,
        state="foreign" if trial.state == TrialState.RUNNING else trial.state.name.lower(),
        outcome=None,
        reason=None,
        value=trial.values[0] if trial.values else None,
        epochs=max(trial.intermediate_values, default=0),
        attempt=0,
        parked=0,
        worker=None,
        checkpoint=None,
        params=trial.params,
        metrics={},
        overfits_since=None,
        failures=[],
        values=_named(study.goals, trial),
        constraints=trial.constraints,
    )


def _numbered(study: PlainStudy, found: Sequence[FrozenTrial], number: int) -> FrozenTrial:
    if number >= len(found):
        known = f"its trials are 0 to {len(found) - 1}" if found else "it has none yet"
        raise StudyError(f"study {study.name!r} has no trial {number}; {known}")
    return found[number]


def _leading(goals: Goals, found: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the COMPLETE trials that violate nothing, the best first; of several objectives the front."""
    complete = [trial for trial in found if trial.state == TrialState.COMPLETE and trial.values]
    if not complete:
        return []
    numbers = np.array([trial.number for trial in complete])
    values = np.array([trial.values for trial in complete])
    violations = np.array([sum(max(0.0, by) for by in trial.constraints.values()) for trial in complete])
    return [complete[position] for position in pareto.best_trials(goals, numbers, values, violations)]


def _violates(trial: FrozenTrial) -> bool:
    return any(by > 0 for by in trial.constraints.values())


def _named(goals: Goals, trial: FrozenTrial) -> dict[str, float]:
    """Return a trial's values by the names of the objectives; none if there is one objective."""
    return dict(zip(goals.names, trial.values, strict=True)) if goals.are_several and trial.values else {}


def _result(goals: Goals, trial: FrozenTrial) -> TrialResult:
    assert trial.values is not None
    return TrialResult(
        number=trial.number,
        state=trial.state.name.lower(),
        value=trial.values[0],
        params=trial.params,
        distributions=trial.distributions,
        values=_named(goals, trial),
        constraints=trial.constraints,
        curves={},
        receipt={},
        attempt=0,
        checkpoint=None,
    )
