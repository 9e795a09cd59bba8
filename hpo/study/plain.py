"""Studies that Optuna made. They are read like our own and never written to.

Such a study has no spec and no row in our tables. Optuna's own tables hold all that is known of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.errors import StudyError
from hpo.spec.objectives import OWN_VALUE, Goals
from hpo.storage.connect import Storage
from hpo.study import results, status, trial_history
from hpo.study import study as studies
from hpo.study.results import TrialResult
from hpo.study.status import Best, FrontTrial, Summary, with_unrecorded
from hpo.study.study import METRIC_NAMES_KEY, Study
from hpo.study.trial_history import TrialHistory

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


@dataclass(frozen=True, kw_only=True)
class PlainStudy:
    """An open study that Optuna made."""

    storage: Storage
    optuna: optuna.Study
    goals: Goals

    @property
    def name(self) -> str:
        return self.optuna.study_name

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def leading(self) -> list[FrozenTrial]:
        """Return the COMPLETE trials that violate nothing, best first. With several objectives, only the Pareto front."""
        return _leading(self.goals, self.trials)


@dataclass(frozen=True, kw_only=True)
class PlainSummary(Summary):
    """The summary of a study that Optuna made. Its budget is the number of its trials."""

    made_by: str = "Optuna"

    @property
    def searched_by(self) -> str:
        return "made by Optuna, not by hpo, which only reads it"


def open_any(place: Storage, name: str) -> Study | PlainStudy:
    """Open a study for reading, whoever made it. Raises StudyError if there is none."""
    if not studies.is_plain(place, name):
        return studies.join(place, name)
    import optuna

    opened = optuna.load_study(study_name=name, storage=place.optuna)
    return PlainStudy(storage=place, optuna=opened, goals=goals_of(opened))


def goals_of(opened: optuna.Study) -> Goals:
    """Return the objectives of a study that Optuna made."""
    from hpo.storage.optuna_private import id_of, storage_of

    system = storage_of(opened).get_study_system_attrs(id_of(opened))
    several = [f"value_{position}" for position in range(len(opened.directions))]
    names = system.get(METRIC_NAMES_KEY) or (several if len(several) > 1 else [OWN_VALUE])
    directions: dict[str, Any] = {
        name: direction.name.lower() for name, direction in zip(names, opened.directions, strict=True)
    }
    return Goals(directions=directions)


def statuses(place: Storage) -> list[Summary]:
    """Read the summaries of all studies in a storage, the oldest first."""
    return [summarize(open_any(place, name)) for name in studies.all_names(place)]


def summarize(study: Study | PlainStudy) -> Summary:
    """Read a study's summary, whoever made it."""
    return _summary(study) if isinstance(study, PlainStudy) else status.summarize(study)


def best(study: Study | PlainStudy, k: int | None = 1, number: int | None = None) -> list[TrialResult]:
    """Return the best trials, or the one with this number. Arguments and errors are those of `results.best`."""
    return _best(study, k, number) if isinstance(study, PlainStudy) else results.best(study, k, number)


def history(study: Study | PlainStudy, number: int) -> TrialHistory:
    """Return a trial in full. Raises StudyError if there is no such trial."""
    return _history(study, number) if isinstance(study, PlainStudy) else trial_history.history(study, number)


def _summary(study: PlainStudy) -> PlainSummary:
    found = study.trials
    states = Counter(trial.state.name for trial in found)
    counts = {
        "complete": states["COMPLETE"],
        "pruned": states["PRUNED"],
        "fail": states["FAIL"],
        "running": 0,
        "parked": 0,
        "foreign": states["RUNNING"],
        "waiting": states["WAITING"],
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
        failures=with_unrecorded([], foreign=counts["fail"]),
        seconds=max(0.0, (max(ends) - min(starts)).total_seconds()) if starts and ends else 0.0,
        seconds_per_trial=None,
        seconds_left=None,
        objectives=dict(study.goals.directions) if several else {},
        front=[FrontTrial(number=one.number, values=_named(study.goals, one)) for one in leading] if several else [],
        infeasible=sum(trial.state.name == "COMPLETE" and _violates(trial) for trial in found),
    )


def _best(study: PlainStudy, k: int | None, number: int | None) -> list[TrialResult]:
    found = study.trials
    if number is None:
        leading = _leading(study.goals, found)[:k]
        if not leading:
            raise StudyError(
                f"study {study.name!r} has no complete trial that violates no constraint; name another trial with --trial N"
            )
        return [_result(study.goals, trial) for trial in leading]
    trial = _numbered(study, found, number)
    if trial.state.name not in ("COMPLETE", "PRUNED") or not trial.values:
        raise StudyError(
            f"trial {number} of study {study.name!r} is {trial.state.name} and has no result; "
            "name one that is complete or pruned, or leave the number out for the best"
        )
    return [_result(study.goals, trial)]


def _history(study: PlainStudy, number: int) -> TrialHistory:
    trial = _numbered(study, study.trials, number)
    return TrialHistory(
        number=number,
        state="foreign" if trial.state.name == "RUNNING" else trial.state.name.lower(),
        outcome=None,
        reason=None,
        value=trial.values[0] if trial.values else None,
        epochs=max(trial.intermediate_values, default=0),
        reports=len(trial.intermediate_values),
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
        attributes=trial.user_attrs,
        curve=dict(sorted(trial.intermediate_values.items())),
    )


def _numbered(study: PlainStudy, found: Sequence[FrozenTrial], number: int) -> FrozenTrial:
    if number >= len(found):
        known = f"its trials are 0 to {len(found) - 1}" if found else "it has none yet"
        raise StudyError(f"study {study.name!r} has no trial {number}; {known}")
    return found[number]


def _leading(goals: Goals, found: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the COMPLETE trials that violate nothing, best first. With several objectives, only the Pareto front."""
    complete = [trial for trial in found if trial.state.name == "COMPLETE" and trial.values]
    if not complete:
        return []
    import numpy as np

    from hpo.study import pareto

    numbers = np.array([trial.number for trial in complete])
    values = np.array([trial.values for trial in complete])
    violations = np.array([sum(max(0.0, by) for by in trial.constraints.values()) for trial in complete])
    return [complete[position] for position in pareto.best_trials(goals, numbers, values, violations)]


def _violates(trial: FrozenTrial) -> bool:
    return any(by > 0 for by in trial.constraints.values())


def _named(goals: Goals, trial: FrozenTrial) -> dict[str, float]:
    """Return a trial's values by the names of the objectives. Empty with one objective."""
    return dict(zip(goals.names, trial.values, strict=True)) if goals.are_several and trial.values else {}


def _result(goals: Goals, trial: FrozenTrial) -> TrialResult:
    from optuna.distributions import CategoricalDistribution

    assert trial.values is not None
    return TrialResult(
        number=trial.number,
        state=trial.state.name.lower(),
        value=trial.values[0],
        params=trial.params,
        choices={
            name: distribution.choices
            for name, distribution in trial.distributions.items()
            if isinstance(distribution, CategoricalDistribution)
        },
        values=_named(goals, trial),
        constraints=trial.constraints,
        curves={},
        receipt={},
        attempt=0,
        checkpoint=None,
    )
