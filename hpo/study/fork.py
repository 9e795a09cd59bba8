"""A new study that starts with another one's finished trials, where these fit into the new space.

Optuna refuses a changed choice and switches joint sampling off for a changed range; a fork is the way to change a space.
"""

from __future__ import annotations

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
from hpo.spec import space
from hpo.spec.objectives import Goals
from hpo.spec.space import Choices, Parameter, Tree
from hpo.storage import sql
from hpo.storage.finished_trials import COST_PREFIX
from hpo.storage.tables import hpo_studies
from hpo.study import study as studies
from hpo.study.resolve import StudyFile
from hpo.study.study import Study


def fork_study(source: Study, wanted: StudyFile) -> tuple[int, int]:
    """Make the wanted study with the fitting trials of `source`; return how many were taken and how many left.

    The trials taken are not charged to the new study's budget. StudyError if the name is in use.
    """
    if wanted.spec.name in optuna.get_all_study_names(source.storage.optuna):
        raise StudyError(f"there is a study {wanted.spec.name!r} already; choose another name")
    _refuse_another_yardstick(source, wanted)
    finished = source.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    fitting = [copy for trial in finished if (copy := _fitted(trial, wanted.spec.tree, wanted.spec.goals)) is not None]
    made = studies.create_or_join(
        source.storage,
        wanted.spec,
        code_folder=wanted.code_folder,
        code_digest=wanted.code_digest,
        forking="a fork into it was cut off; delete it with `optuna delete-study` and fork again",
    )
    made.optuna.add_trials(fitting)
    with sql.writing(made.storage.engine) as connection:  # only now may a worker start a trial in it
        connection.execute(
            hpo_studies.update()
            .where(hpo_studies.c.uid == made.uid)
            .values(imported=len(fitting), stop_reason=None, hold=None)
        )
    return len(fitting), len(finished) - len(fitting)


def _refuse_another_yardstick(source: Study, wanted: StudyFile) -> None:
    old, new = source.spec, wanted.spec
    for key in ("objective", "metric", "direction", "objectives", "value", "data"):
        if getattr(old, key) != getattr(new, key) or (key == "objectives" and [*old.objectives] != [*new.objectives]):
            raise MismatchError(
                f"{key}: study {old.name!r} has {getattr(old, key)!r}, the file has {getattr(new, key)!r}; "
                "its values mean something else, so its trials cannot be taken along"
            )
    if old.objective:
        raise MismatchError(f"study {old.name!r} has an objective of your own, whose space hpo does not know")


def _fitted(trial: FrozenTrial, tree: Tree, goals: Goals) -> FrozenTrial | None:
    """Return a copy of the trial with the new space's distributions, held against the new bounds; None if its parameters are
    not exactly of that space, or if nobody measured what is bounded.
    """
    distributions: dict[str, BaseDistribution] = {}

    def pick(path: str, parameter: Parameter) -> Any:
        distributions[path] = distribution_of(parameter)
        value = trial.params[path]
        if not distributions[path]._contains(distributions[path].to_internal_repr(value)):
            raise ValueError(value)
        return value

    try:
        space.pin(tree, pick)
    except (KeyError, ValueError):
        return None
    costs = {name: trial.user_attrs[key] for name in goals.costs if (key := COST_PREFIX + name) in trial.user_attrs}
    if distributions.keys() != trial.params.keys() or len(costs) < len(goals.costs):
        return None
    constraints = goals.known(costs).beside(trial.values[0] if trial.values else None).constraints
    return optuna.trial.create_trial(
        state=trial.state,
        values=trial.values,
        constraints=dict(constraints),
        params=trial.params,
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
