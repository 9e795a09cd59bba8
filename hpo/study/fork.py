"""Forks a study: makes a new one that starts with the finished trials that fit into the new space.

A fork is the way to change a search space. Optuna refuses a changed choice, and stops joint sampling after a changed
range. The space of a user's own objective is found by calling it: see `asked.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from hpo.own import training
from hpo.spec import space
from hpo.spec.objectives import Goals
from hpo.spec.space import Choices, Parameter
from hpo.spec.study_file import SPLIT_SEED, StudySpec
from hpo.storage import sql, study_rows
from hpo.storage.optuna_private import contains
from hpo.storage.tables import COST_PREFIX
from hpo.study import study as studies
from hpo.study.asked import Asking, Unfit
from hpo.study.plain import PlainStudy
from hpo.study.resolve import StudyFile
from hpo.study.study import Study

FORKED_FROM_KEY = "hpo:forked_from"  # user attribute with the number of the trial that a trial was copied from
NOT_ASKED_KEY = "hpo:not_asked"  # user attribute of a trial that was taken without a call of the objective


@dataclass(frozen=True, kw_only=True)
class Forked:
    """What became of the finished trials of a fork's source."""

    taken: int
    left: Mapping[str, int]  # reason -> how many trials do not fit because of it
    asked: int = 0  # trials for which the user's own objective was called
    assumed: Sequence[int] = ()  # numbers of the trials taken without a call: others of their kind were asked


def fork_study(source: Study | PlainStudy, wanted: StudyFile) -> Forked:
    """Make the wanted study with the fitting trials of `source`. The new study's budget is not charged for them.

    Raises StudyError if the name is in use, MismatchError if the values of the two studies are not comparable.
    """
    if isinstance(source, Study):
        wanted = wanted.split_like(source.spec)
    spec, place = wanted.spec, source.storage
    if spec.name in optuna.get_all_study_names(place.optuna):
        raise StudyError(f"there is a study {spec.name!r} already; choose another name")
    _refuse_another_yardstick(source, spec)
    finished = source.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    asking = _asking(source, wanted)
    fitting, left = _sorted_out(finished, _fitter(spec, asking))
    made = studies.create_or_join(
        place,
        spec,
        code_folder=wanted.code_folder,
        code_digest=wanted.code_digest,
        forking="a fork into it was cut off; delete it with `hpo delete` and fork again",
    )
    made.optuna.add_trials(fitting)
    with sql.writing(place.engine) as connection:  # only from now on may workers start trials in it
        study_rows.update(connection, made.uid, imported=len(fitting), stop_reason=None, hold=None)
    if asking is None:
        return Forked(taken=len(fitting), left=left)
    assumed = [trial.user_attrs[FORKED_FROM_KEY] for trial in fitting if NOT_ASKED_KEY in trial.user_attrs]
    return Forked(taken=len(fitting), left=left, asked=asking.asked, assumed=assumed)


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


def _asking(source: Study | PlainStudy, wanted: StudyFile) -> Asking | None:
    """Return what calls the new study's own objective, None if the file declares the training."""
    spec = wanted.spec
    if spec.objective is None:
        return None
    objective = training.load(spec, wanted.code_folder)
    return Asking(objective, source.name, spec.goals, source.optuna.user_attrs)


def _fitter(spec: StudySpec, asking: Asking | None) -> Callable[[FrozenTrial], FrozenTrial]:
    """Return a function that turns a finished trial into one of the new study. It raises Unfit with the reason."""
    if asking is None:
        return lambda trial: _fitted(trial, spec)

    def fitted(trial: FrozenTrial) -> FrozenTrial:
        found = asking.fitted(trial)
        constraints = _own_constraints(trial, spec.goals)
        return _copy(trial, found.params, found.distributions, constraints, is_asked=found.is_asked)

    return fitted


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
    if spec.is_declared != new.is_declared:
        raise _another(spec.own_kind or new.own_kind or "", spec, new)
    if new.is_declared and spec.split_seed != new.split_seed:
        raise MismatchError(
            f"data.split_seed = {new.split_seed}: study {spec.name!r} has {spec.split_seed}, so its trials have seen images that "
            f"would be in the new study's validation or test part; remove split_seed, and the fork takes {spec.split_seed} over"
        )
    old_data, new_data = ({key: value for key, value in one.data.items() if key != SPLIT_SEED} for one in (spec, new))
    if old_data != new_data:
        raise _another("data", spec, new)
    for key in ("metric", "direction", "objectives", "value"):
        if getattr(spec, key) != getattr(new, key) or (key == "objectives" and [*spec.objectives] != [*new.objectives]):
            raise _another(key, spec, new)


def _another(key: str, old: StudySpec, new: StudySpec) -> MismatchError:
    return MismatchError(
        f"{key}: study {old.name!r} has {getattr(old, key)!r}, the file has {getattr(new, key)!r}; "
        "its values mean something else, so its trials cannot be taken along"
    )


def _fitted(trial: FrozenTrial, spec: StudySpec) -> FrozenTrial:
    """Return a copy of the trial with the distributions and constraints of the new study.

    Raises Unfit if its parameters are not exactly of that space, or if a bounded cost was not measured.
    """
    distributions: dict[str, BaseDistribution] = {}

    def pick(path: str, parameter: Parameter) -> Any:
        distributions[path] = distribution_of(parameter)
        if path not in trial.params:
            raise Unfit(f"has no {path}")
        value = trial.params[path]
        try:
            fits = contains(distributions[path], distributions[path].to_internal_repr(value))
        except ValueError:
            fits = False
        if not fits:
            raise Unfit(f"its {path} is not in {parameter}")
        return value

    space.pin(spec.tree, pick)
    if others := sorted(trial.params.keys() - distributions.keys()):
        raise Unfit(f"has {', '.join(others)}, which the file does not search")
    constraints = _declared_constraints(trial, spec.goals) if spec.is_declared else _own_constraints(trial, spec.goals)
    return _copy(trial, trial.params, distributions, constraints)


def _declared_constraints(trial: FrozenTrial, goals: Goals) -> Mapping[str, float]:
    """Return a declared trial's constraints; Unfit if a bounded cost was not measured."""
    costs = {name: trial.user_attrs[key] for name in goals.costs if (key := COST_PREFIX + name) in trial.user_attrs}
    if unknown := [name for name in goals.costs if name not in costs]:
        raise Unfit(f"its {', '.join(unknown)} was not measured")
    return goals.known(costs).beside(trial.values[0] if trial.values else None).constraints


def _own_constraints(trial: FrozenTrial, goals: Goals) -> Mapping[str, float]:
    """Return a trial's constraints under a user's own objective: its own, and those of the new bounds on its values."""
    if not trial.values:
        return trial.constraints
    return {**trial.constraints, **goals.returned(dict(zip(goals.names, trial.values, strict=True))).constraints}


def _copy(
    trial: FrozenTrial,
    params: dict[str, Any],
    distributions: dict[str, BaseDistribution],
    constraints: Mapping[str, float],
    *,
    is_asked: bool = True,
) -> FrozenTrial:
    attributes = {key: value for key, value in trial.user_attrs.items() if key != NOT_ASKED_KEY}  # of an earlier fork
    attributes |= {FORKED_FROM_KEY: trial.number} | ({} if is_asked else {NOT_ASKED_KEY: True})
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        constraints=dict(constraints),
        params=params,
        distributions=distributions,
        intermediate_values=trial.intermediate_values,
        user_attrs=attributes,
    )


def distribution_of(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's distribution of a declared parameter. It equals the one that Optuna's `suggest` makes."""
    if isinstance(parameter, Choices):
        return CategoricalDistribution([space.encode(option) for option in parameter.options])
    if parameter.integer:
        return IntDistribution(int(parameter.low), int(parameter.high), parameter.log, int(parameter.step or 1))
    return FloatDistribution(parameter.low, parameter.high, parameter.log, parameter.step)
