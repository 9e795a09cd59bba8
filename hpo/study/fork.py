"""Forks a study: makes a new one that starts with the finished trials that fit into the new space.

A fork is the way to change a search space. Optuna refuses a changed choice, and stops joint sampling after a changed
range. The space of a user's own objective is found by calling it: see `asked.py`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import MismatchError, Mistakes, SpecError, StudyError, shown
from hpo.own import training
from hpo.spec import configuration, space
from hpo.spec.configuration import Written
from hpo.spec.objectives import Goals
from hpo.spec.space import Choices, Parameter
from hpo.spec.study_file import SPLIT_FORMAT, SPLIT_SEED, StudySpec
from hpo.storage.connect import Storage
from hpo.storage.optuna_private import contains
from hpo.storage.tables import COST_PREFIX, FORKED_FROM_KEY
from hpo.study import source as sources
from hpo.study import study as studies
from hpo.study.asked import Asking, Unfit
from hpo.study.format import STATES
from hpo.study.plain import PlainStudy
from hpo.study.resolve import StudyFile
from hpo.study.source import Source
from hpo.study.study import Study, TakenTrials

MISSING = object()
NOT_ASKED_KEY = "hpo:not_asked"  # user attribute of a trial that was taken without a call of the objective
UNFINISHED = (TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING)  # without a result


@dataclass(frozen=True, kw_only=True)
class Forked:
    """What became of the trials of a fork's source."""

    taken: int
    left_behind: Mapping[str, Sequence[int]]  # reason -> the numbers of the trials that do not fit because of it
    unfinished: Mapping[str, int]  # state -> how many trials have no result, in words such as "failed"
    changed: Sequence[str] = ()  # constants that the two studies have with different values
    asked: int = 0  # trials for which the user's own objective was called
    assumed: Sequence[int] = ()  # numbers of the trials taken without a call: others of their kind were asked

    @property
    def left(self) -> dict[str, int]:
        """Reason -> how many trials do not fit because of it."""
        return {why: len(numbers) for why, numbers in self.left_behind.items()}


def fork_study(
    source: Study | PlainStudy | Source,
    wanted: StudyFile,
    place: Storage | None = None,
    *,
    lacking: Mapping[str, Any] = MappingProxyType({}),
    renamed: Mapping[str, str] = MappingProxyType({}),
    may_be_empty: bool = True,
) -> Forked:
    """Make the wanted study with the fitting trials of another one, whole or not at all. Its budget is not charged for them.

    Args:
        source: the study to take trials from.
        wanted: the new study.
        place: the new study's storage, by default the one of `source`.
        lacking: values, by parameter, that old trials are taken to have had for parameters that they lack.
        renamed: new names of old parameters.
        may_be_empty: make the study also if no trial fits.

    Raises StudyError if the name is in use, or if no trial fits and one must. Raises MismatchError if the values of the two
    studies are not comparable. Raises SpecError for a wrong value in `lacking` or a wrong name in `renamed`.
    """
    if not isinstance(source, Source):
        place, source = place or source.storage, sources.of(source)
    assert place is not None
    if source.spec is not None:
        wanted = wanted.split_like(source.spec)
    spec = wanted.spec
    if studies.is_in_use(place, spec.name):
        raise StudyError(f"there is a study {spec.name!r} already; choose another name")
    _refuse_another_yardstick(source, spec)
    filled = _checked_lacking(spec, lacking)
    every = source.study.get_trials(deepcopy=False)
    _refuse_names(every, renamed)
    finished = [_renamed(trial, renamed) for trial in every if trial.state not in UNFINISHED]
    asking = _asking(source, wanted, filled)
    fitter = _Declared(spec, source.spec, filled) if asking is None else partial(_asked, asking, spec.goals)
    fitting, left = _sorted_out(finished, fitter)
    if not fitting and not may_be_empty:
        names = sorted({name for trial in finished for name in trial.params})
        mend = (
            f"  their parameters are {', '.join(names)}; give new names by --rename, and values that they lack by --set"
        )
        raise StudyError(
            f"no trial of study {source.name!r} fits, so no study was made: it has {len(finished)} complete and pruned trials",
            *(f"  {len(numbers)} of them: {why}" for why, numbers in left.items()),
            *([mend] if names else []),
        )
    _refuse_unused(filled, finished, fitting, fitter.constants_of if isinstance(fitter, _Declared) else lambda _: {})
    studies.create_or_join(
        place,
        spec,
        code_folder=wanted.code_folder,
        code_digest=wanted.code_digest,
        taken=TakenTrials(trials=fitting, origin=source.origin),
    )
    return Forked(
        taken=len(fitting),
        left_behind=left,
        unfinished=Counter(STATES[trial.state.name.lower()] for trial in every if trial.state in UNFINISHED),
        changed=fitter.changed if isinstance(fitter, _Declared) else (),
        asked=asking.asked if asking else 0,
        assumed=[trial.user_attrs[FORKED_FROM_KEY] for trial in fitting if NOT_ASKED_KEY in trial.user_attrs],
    )


def _sorted_out(
    finished: list[FrozenTrial], fitted: Callable[[FrozenTrial], FrozenTrial]
) -> tuple[list[FrozenTrial], dict[str, list[int]]]:
    fitting: list[FrozenTrial] = []
    left: dict[str, list[int]] = {}
    for trial in finished:
        try:
            fitting.append(fitted(trial))
        except Unfit as why:
            left.setdefault(str(why), []).append(trial.number)
    return fitting, left


def _checked_lacking(spec: StudySpec, lacking: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that old trials lack as Optuna stores them. Raises SpecError that lists all mistakes."""
    known, found, mistakes = dict(space.parameters(spec.tree)), dict[str, Any](), Mistakes()
    for path, value in lacking.items():
        with mistakes.collect():
            if spec.objective:
                found[path] = value.value if isinstance(value, Written) else value
            elif path in known:
                found[path] = space.encode(configuration.legal(known[path], path, value))
            else:
                raise SpecError(f"{path}: the file does not search it{configuration.meant(path, known)}")
    mistakes.raise_if_any()
    return found


def _refuse_names(trials: Sequence[FrozenTrial], names: Mapping[str, str]) -> None:
    """Raise SpecError for an old name that no trial has, and for a new one that some trial has already."""
    known = {name for trial in trials for name in trial.params}
    for old, new in names.items():
        if old not in known:
            raise SpecError(f"{old}: no trial has a parameter of this name{configuration.meant(old, known)}")
        if new in known - names.keys():
            raise SpecError(f"{old}: cannot be renamed to {new}, which is the name of another parameter")
        for other in known & names.keys() - {old}:
            if names[other] == new and any({old, other} <= trial.params.keys() for trial in trials):
                raise SpecError(f"{old}, {other}: cannot both be renamed to {new}, since some trials have both")


def _refuse_unused(
    lacking: Mapping[str, Any],
    finished: Sequence[FrozenTrial],
    fitting: Sequence[FrozenTrial],
    constants_of: Callable[[FrozenTrial], Mapping[str, Any]],
) -> None:
    """Raise SpecError for a value that no trial takes: each old trial has one, or no trial that fits has such a parameter."""
    mistakes = Mistakes()
    for path in lacking:
        if finished and all(path in trial.params or path in constants_of(trial) for trial in finished):
            found = [{**constants_of(trial), **trial.params}[path] for trial in finished]
            mistakes.add(SpecError(f"{path}: no trial lacks it, the first has {shown(found[0])}; leave it out"))
        elif fitting and not any(path in trial.params for trial in fitting):
            mistakes.add(SpecError(f"{path}: no trial that fits has such a parameter; leave it out"))
    mistakes.raise_if_any()


def _renamed(trial: FrozenTrial, names: Mapping[str, str]) -> FrozenTrial:
    """Return a trial with new names of its parameters."""
    if not names.keys() & trial.params.keys():
        return trial
    found = copy.copy(trial)
    found.params = {names.get(name, name): value for name, value in trial.params.items()}
    found.distributions = {names.get(name, name): one for name, one in trial.distributions.items()}
    return found


def _asking(source: Source, wanted: StudyFile, lacking: Mapping[str, Any]) -> Asking | None:
    """Return what calls the new study's own objective, None if the file has the space."""
    spec = wanted.spec
    if spec.objective is None:
        return None
    objective = training.load(spec, wanted.code_folder)
    return Asking(objective, source.name, spec.goals, source.study.user_attrs, lacking)


def _asked(asking: Asking, goals: Goals, trial: FrozenTrial) -> FrozenTrial:
    """Turn a finished trial into one of a study with an objective of the user's own. Raises Unfit with the reason."""
    found = asking.fitted(trial)
    constraints = _own_constraints(trial, goals)
    return _copy(trial, found.params, found.distributions, constraints, is_asked=found.is_asked)


def _refuse_another_yardstick(source: Source, new: StudySpec) -> None:
    spec = source.spec
    if spec is None:
        old, goals = source.goals.directions.values(), new.goals.directions.values()
        if [*old] != [*goals]:
            raise MismatchError(
                f"direction: study {source.name!r} is to {', '.join(old)}, the file to {', '.join(goals)}; "
                "its values mean something else, so its trials cannot be taken along"
            )
        return
    if spec.is_declared != new.is_declared:
        raise _another(spec.own_kind or new.own_kind or "", spec, new)
    if new.is_declared and spec.split_seed != new.split_seed:
        key, mend = f"data.{SPLIT_SEED}", f"remove {SPLIT_SEED}, and the fork takes {spec.split_seed} over"
        if new.format < SPLIT_FORMAT:
            key, mend = (
                "seed",
                f"remove format = {new.format}, so that data.{SPLIT_SEED} decides the split instead of seed",
            )
        raise MismatchError(
            f"{key} = {new.split_seed}: study {spec.name!r} has {spec.split_seed} for its split, so its trials have seen images "
            f"that would be in the new study's validation or test part; {mend}"
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


class _Declared:
    """Turns finished trials into trials of a study whose file has the space. A trial that does not fit raises Unfit.

    A parameter that an old trial lacks has the old study's constant, if there is one, else the value that the user gives.
    A parameter that the file does not search must have had the file's constant.
    """

    def __init__(self, new: StudySpec, old: StudySpec | None, lacking: Mapping[str, Any]) -> None:
        self._new = new
        self._tree = new.tree
        self._old = old.tree if old else {}
        self._lacking = lacking

    @property
    def changed(self) -> list[str]:
        """The constants that both studies have, with different values: `training.epochs: 20 was 5`."""
        old, new = dict(configuration.constants(self._old)), dict(configuration.constants(self._tree))
        return [
            f"{path} = {shown(value)}, was {shown(old[path])}"
            for path, value in new.items()
            if path in old and old[path] != value
        ]

    def __call__(self, trial: FrozenTrial) -> FrozenTrial:
        distributions: dict[str, BaseDistribution] = {}
        params: dict[str, Any] = {}
        lacking = {**self._lacking, **self.constants_of(trial)}

        def pick(path: str, parameter: Parameter) -> Any:
            distributions[path] = distribution_of(parameter)
            value = trial.params.get(path, lacking.get(path, MISSING))
            if value is MISSING:
                raise Unfit(f"has no {path}")
            try:
                fits = contains(distributions[path], distributions[path].to_internal_repr(value))
            except ValueError:
                fits = False
            if not fits:
                raise Unfit(f"its {path} is not in {parameter}")
            params[path] = value
            return value

        constants = dict(configuration.constants(space.pin(self._tree, pick)))
        for path in sorted(trial.params.keys() - distributions.keys()):
            if path not in constants:
                raise Unfit(f"has {path}, which the file does not search")
            if space.encode(constants[path]) != trial.params[path]:
                raise Unfit(f"its {path} is not {shown(constants[path])}, the constant of the file")
        goals = self._new.goals
        is_declared = self._new.is_declared
        constraints = _declared_constraints(trial, goals) if is_declared else _own_constraints(trial, goals)
        return _copy(trial, params, distributions, constraints)

    def constants_of(self, trial: FrozenTrial) -> dict[str, Any]:
        """Return the constants with which the old study trained a trial, as Optuna would store them."""
        pinned = space.pin(self._old, lambda path, _: trial.params.get(path))
        found = configuration.constants(pinned)
        return {path: space.encode(value) for path, value in found if value is not None and path not in trial.params}


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
