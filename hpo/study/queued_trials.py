"""Queues known configurations as trials, which workers take before new ones.

A configuration is checked before anything is written. A queued trial counts as one of the budget once it begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.errors import Mistakes, SpecError, StudyError
from hpo.spec import configuration
from hpo.spec.configuration import Configuration, Written
from hpo.spec.space import Choices, Parameter, Range
from hpo.spec.study_file import StudySpec
from hpo.storage import sql, study_rows
from hpo.storage.tables import Hold
from hpo.study import resolve
from hpo.study.study import Study

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True, kw_only=True)
class QueuedTrial:
    """A trial that waits with known values."""

    number: int
    values: Mapping[str, Any]  # by parameter
    missing: Sequence[str] = ()  # parameters that the sampler chooses, as far as they are known
    unknown: Sequence[str] = ()  # parameters that no trial of the user's own objective has had


def enqueue(study: Study, given: Sequence[Mapping[str, Any]], *, unknown: bool = False) -> list[QueuedTrial]:
    """Queue a trial for each configuration, all or none.

    Args:
        study: the study.
        given: at least one configuration: values by the parameters' dotted paths, or nested tables of them.
        unknown: accept parameters that no trial of the user's own objective has had yet.

    Raises SpecError that lists all mistakes. Raises StudyError if the study was deleted or is being copied into.
    """
    if not given:
        raise SpecError("no configuration: give values such as lr=1e-3")
    checked = check_all(study, given, unknown=unknown)
    numbers = write(study, [study.spec.as_stored(one.values) for one in checked])
    known = set(_recorded(study)) if study.spec.objective else None
    return [
        QueuedTrial(
            number=number,
            values=one.values,
            missing=one.missing,
            unknown=[] if known is None else [path for path in one.values if path not in known],
        )
        for number, one in zip(numbers, checked, strict=True)
    ]


def write(
    study: Study, configurations: Sequence[Mapping[str, Any]], attributes: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Queue trials in one transaction and return their numbers. The values are not checked.

    Args:
        study: the study.
        configurations: values by parameter, as Optuna stores them.
        attributes: user attributes of each trial.
    """
    from hpo.storage.trial_writes import insert_queued

    with sql.writing(study.storage.engine) as connection:
        row = study_rows.lock_and_read(connection, study.study_id)
        if row is None or row.uid != study.uid:
            raise StudyError(f"study {study.name!r} was deleted; `hpo run` makes a new one")
        if row.hold == Hold.FORKING:
            raise StudyError(
                f"study {study.name!r}: {row.stop_reason or 'trials are copied into it'}; nothing can be queued in it"
            )
        return [number for _, number in insert_queued(connection, study.study_id, configurations, attributes)]


def check_all(study: Study, given: Sequence[Mapping[str, Any]], *, unknown: bool = False) -> list[Configuration]:
    """Check configurations against a study's space. Arguments and errors are those of `enqueue`."""
    if not study.spec.objective:
        return resolve.check_configurations(study.spec, given)
    recorded = _recorded(study)
    return configuration.each(given, lambda values: _of_objective(study.spec, recorded, values, unknown=unknown))


def _of_objective(
    spec: StudySpec, recorded: Mapping[str, Sequence[Parameter]], values: Mapping[str, Any], *, unknown: bool
) -> Configuration:
    """Check a configuration against what the trials of a user's own objective were asked for. Nothing else is known of it."""
    found, mistakes = dict[str, Any](), Mistakes()
    for path, value in values.items():
        if path in recorded:
            with mistakes.collect():
                found[path] = _legal_in_one(recorded[path], path, value)
            continue
        if recorded and not unknown:
            why = f"no trial of the objective has had it{configuration.meant(path, recorded)}; --unknown takes it all the same"
            mistakes.add(SpecError(f"{path}: {why}"))
        found[path] = value.value if isinstance(value, Written) else value
    with mistakes.collect():
        configuration.refuse_missing([path for path in spec.sampler.get("search_space", {}) if path not in values])
    mistakes.raise_if_any()
    return Configuration(values=found, missing=[path for path in recorded if path not in found])


def _legal_in_one(parameters: Sequence[Parameter], path: str, value: Any) -> Any:
    """Return a value that fits one of the distributions that an objective has had for a parameter."""
    *others, last = parameters
    for parameter in others:
        try:
            return configuration.legal(parameter, path, value)
        except SpecError:
            continue
    return configuration.legal(last, path, value)


def _recorded(study: Study) -> dict[str, list[Parameter]]:
    """Return the parameters that the trials of a study were asked for. One may have had several distributions."""
    from hpo.storage.trial_rows import distributions_in

    with study.storage.engine.connect() as connection:
        found = distributions_in(connection, study.study_id)
    return {name: [parameter_of(one) for one in distributions] for name, distributions in found.items()}


def parameter_of(distribution: BaseDistribution) -> Parameter:
    """Return one of Optuna's distributions as a parameter of a search space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return Choices(options=tuple(distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    is_default = isinstance(distribution, IntDistribution) and distribution.step == 1
    step = None if is_default else distribution.step
    return Range(low=distribution.low, high=distribution.high, log=distribution.log, step=step)
