"""A new study that starts with another one's finished trials, where these fit into the new space.

Optuna refuses a changed choice and switches joint sampling off for a changed range; a fork is the way to change a space. The
space of an objective of the user's own is not known before it is called, so it is: see `asked.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import MismatchError, StudyError
from hpo.spec import space, usercode
from hpo.spec.objectives import Goals
from hpo.spec.space import Choices, Parameter, Tree
from hpo.spec.study_file import StudySpec
from hpo.storage import sql
from hpo.storage.finished_trials import COST_PREFIX
from hpo.storage.tables import hpo_studies
from hpo.study import study as studies
from hpo.study.asked import Asking, Unfit
from hpo.study.plain import PlainStudy
from hpo.study.resolve import StudyFile
from hpo.study.study import Study


@dataclass(frozen=True, kw_only=True)
class Forked:
    """What became of the finished trials of a fork's source."""

    taken: int
    left: Mapping[str, int]  # why trials do not fit -> how many


def fork_study(source: Study | PlainStudy, wanted: StudyFile) -> Forked:
    """Make the wanted study with the fitting trials of `source`; return how many were taken, and why the others were not.

    The trials taken are not charged to the new study's budget. StudyError if the name is in use.
    """
    spec, place = wanted.spec, source.storage
    if spec.name in optuna.get_all_study_names(place.optuna):
        raise StudyError(f"there is a study {spec.name!r} already; choose another name")
    _refuse_another_yardstick(source, spec)
    finished = source.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    fitting, left = _sorted_out(finished, _fitter(source, wanted))
    made = studies.create_or_join(
        place,
        spec,
        code_folder=wanted.code_folder,
        code_digest=wanted.code_digest,
        forking="a fork into it was cut off; delete it with `optuna delete-study` and fork again",
    )
    made.optuna.add_trials(fitting)
    with sql.writing(place.engine) as connection:  # only now may a worker start a trial in it
        connection.execute(
            hpo_studies.update()
            .where(hpo_studies.c.uid == made.uid)
            .values(imported=len(fitting), stop_reason=None, hold=None)
        )
    return Forked(taken=len(fitting), left=left)


def _sorted_out(
    finished: list[FrozenTrial], fitted: Callable[[FrozenTrial], FrozenTrial]
) -> tuple[list[FrozenTrial], Counter[str]]:
    fitting: list[FrozenTrial] = []
    left: Counter[str] = Counter()
    for trial in finished:
        try:
            fitting.append(fitted(trial))
        except Unfit as why:
            left[str(why)] += 1
    return fitting, left


def _fitter(source: Study | PlainStudy, wanted: StudyFile) -> Callable[[FrozenTrial], FrozenTrial]:
    """Return what makes of a finished trial one of the new study; that raises Unfit, with the reason."""
    spec = wanted.spec
    if spec.objective is None:
        return lambda trial: _fitted(trial, spec.tree, spec.goals)
    objective = usercode.load_objective(spec.objective, wanted.code_folder)
    asking = Asking(objective, source.name, spec.goals, source.optuna.user_attrs)
    return lambda trial: _copy(
        trial, asking.fitted(trial), asking.distributions(trial), _own_constraints(trial, spec.goals)
    )


def _refuse_another_yardstick(source: Study | PlainStudy, new: StudySpec) -> None:
    if isinstance(source, PlainStudy):
        old, goals = source.goals.directions.values(), new.goals.directions.values()
        if [*old] != [*goals]:
            raise MismatchError(
                f"direction: study {source.name!r} is to {', '.join(old)}, the file to {', '.join(goals)}; "
                "its values mean something else, so its trials cannot be taken along"
            )
        return
    spec = source.spec
    if bool(spec.objective) != bool(new.objective):
        raise _another("objective", spec, new)
    for key in ("metric", "direction", "objectives", "value", "data"):
        if getattr(spec, key) != getattr(new, key) or (key == "objectives" and [*spec.objectives] != [*new.objectives]):
            raise _another(key, spec, new)


def _another(key: str, old: StudySpec, new: StudySpec) -> MismatchError:
    return MismatchError(
        f"{key}: study {old.name!r} has {getattr(old, key)!r}, the file has {getattr(new, key)!r}; "
        "its values mean something else, so its trials cannot be taken along"
    )


def _fitted(trial: FrozenTrial, tree: Tree, goals: Goals) -> FrozenTrial:
    """Return a copy of the trial with the new space's distributions, held against the new bounds.

    Raises Unfit if its parameters are not exactly of that space, or if nobody measured what is bounded.
    """
    distributions: dict[str, BaseDistribution] = {}

    def pick(path: str, parameter: Parameter) -> Any:
        distributions[path] = distribution_of(parameter)
        if path not in trial.params:
            raise Unfit(f"has no {path}")
        value = trial.params[path]
        try:
            fits = distributions[path]._contains(distributions[path].to_internal_repr(value))
        except ValueError:
            fits = False
        if not fits:
            raise Unfit(f"its {path} is not in {parameter}")
        return value

    space.pin(tree, pick)
    if others := sorted(trial.params.keys() - distributions.keys()):
        raise Unfit(f"has {', '.join(others)}, which the file does not search")
    costs = {name: trial.user_attrs[key] for name in goals.costs if (key := COST_PREFIX + name) in trial.user_attrs}
    if unknown := [name for name in goals.costs if name not in costs]:
        raise Unfit(f"nobody measured its {', '.join(unknown)}")
    constraints = goals.known(costs).beside(trial.values[0] if trial.values else None).constraints
    return _copy(trial, trial.params, distributions, constraints)


def _own_constraints(trial: FrozenTrial, goals: Goals) -> Mapping[str, float]:
    """Return what a trial of a user's own objective says of its constraints: its own, and the new bounds on its values."""
    if not trial.values:
        return trial.constraints
    return {**trial.constraints, **goals.returned(dict(zip(goals.names, trial.values, strict=True))).constraints}


def _copy(
    trial: FrozenTrial,
    params: dict[str, Any],
    distributions: dict[str, BaseDistribution],
    constraints: Mapping[str, float],
) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        constraints=dict(constraints),
        params=params,
        distributions=distributions,
        intermediate_values=trial.intermediate_values,
        user_attrs={**trial.user_attrs, "hpo:forked_from": trial.number},
    )


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's distribution of a declared parameter, the same that its `suggest` makes."""
    if isinstance(parameter, Choices):
        return CategoricalDistribution([space.encode(option) for option in parameter.options])
    if parameter.integer:
        return IntDistribution(int(parameter.low), int(parameter.high), parameter.log, int(parameter.step or 1))
    return FloatDistribution(parameter.low, parameter.high, parameter.log, parameter.step)
