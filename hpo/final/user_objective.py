"""The final run of a user's own objective: one call with the pinned parameters, in an in-memory study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.errors import Fault, ProgramError, SpecError, StudyError, Unasked
from hpo.own import training
from hpo.spec import seeds
from hpo.spec.metrics import OWN_METRIC
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import FAILURES, connect
from hpo.storage.optuna_private import as_in_optimize
from hpo.study import plain
from hpo.study.export import from_toml
from hpo.study.pinned_trial import PinnedTrial, study_in_memory, trials_before
from hpo.text import command


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """What one call of the objective came to."""

    value: float | dict[str, float]  # that a search would record, or the values by name
    curve: dict[int, float]  # what it reported, by step and in the order of the steps


def run(
    spec: StudySpec, path: Path, folder: Path, earlier: Sequence[FrozenTrial] = (), *, loop: object = None
) -> OwnRun:
    """Call the objective with the config's values.

    The trial has the number of the receipt's trial, since objectives often derive their seed from it.

    Args:
        spec: the spec of the config.
        path: the config, for messages.
        folder: the folder of the objective.
        earlier: the trials that the receipt's trial found in its study.
        loop: what a command works with, its Site.

    Raises SpecError without values, or if the objective asks for other parameters. Raises StudyError if the objective does
    not return one finite number per objective.
    """
    receipt = spec.receipt
    if not (spec.params or spec.space) and "trial" not in receipt:
        raise SpecError(f"{path}: has no [params]; `hpo export` writes them, or search with `{command('run', path)}`")
    objective = training.load(spec, folder)
    attributes = _read(receipt.get("study_attributes", {}), path, "receipt.study_attributes")
    study = study_in_memory(receipt.get("study", spec.name), spec.goals, attributes=attributes, earlier=earlier)
    trial = PinnedTrial(
        study,
        _read(spec.params, path, "params"),
        number=receipt.get("trial", 0),
        attributes=_read(receipt.get("attributes", {}), path, "receipt.attributes"),
    )
    trial.loop = loop
    returned: Any = None
    try:
        with as_in_optimize(study):
            seeds.seed_globals(seeds.of_trial(spec.seed, trial.number, trial.user_attrs))
            returned = objective(trial)
    except optuna.TrialPruned:  # raised by the objective itself; the value is then its last finite report
        returned = next((value for value in reversed(trial.curve) if math.isfinite(value)), None)
    except SpecError:
        if trial.refused is None:
            raise
    except (ProgramError, Unasked) as error:  # all that the program printed is shown
        raise StudyError(f"{path}: {error.args[0]}") from None
    if trial.refused is not None:
        raise SpecError(f"{path}: {trial.refused}")
    curve = dict(sorted(trial.cached.intermediate_values.items()))
    return OwnRun(value=_judged(spec, path, trial.curve, returned), curve=curve)


def _read(written: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Return values as they were before `hpo export` wrote them to TOML."""
    found = {}
    for key, value in written.items():
        try:
            found[key] = from_toml(value)
        except ValueError as error:
            raise SpecError(f"{path}: {where}.{key} = {value!r}: is not JSON: {error}") from None
    return found


def _judged(spec: StudySpec, path: Path, curve: Sequence[float], returned: Any) -> float | dict[str, float]:
    """Return the value that a search would record for these reports and this return value."""
    names = spec.goals.names
    by_curve = spec.rule(curve) if spec.rule and curve else None
    if by_curve is not None and len(names) == 1:
        returned = by_curve
    try:
        several = spec.objectives or (isinstance(returned, list | tuple) and len(returned) == 1)
        values = [float(value) for value in (returned if several else [returned])]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(map(math.isfinite, values)) or len(values) != len(names):
        wanted = f"{len(names)} finite numbers" if spec.objectives else "a finite number"
        raise StudyError(f"{path}: the objective returned {returned!r}, not {wanted}")
    if by_curve is not None:
        values[0] = by_curve
    return dict(zip(names, values, strict=True)) if spec.objectives else values[0]


def earlier_trials(spec: StudySpec, url: str) -> tuple[list[FrozenTrial], str | None]:
    """Return the trials that the receipt's trial found in its study, and the reason if they cannot be read."""
    receipt = spec.receipt
    if "study" not in receipt or not receipt.get("trial"):
        return [], None
    try:
        place = connect(url, only_reads=True)
        try:
            study = plain.open_any(place, receipt["study"])
            if getattr(study, "uid", None) != receipt.get("study_uid"):
                raise StudyError(f"study {study.name!r} in {place.shown} is not the one that the config came from")
            trials = study.optuna.get_trials(deepcopy=False)
        finally:
            place.close()
    except (Fault, *FAILURES) as error:
        return [], str(error)
    return trials_before(trials, receipt["trial"]), None


def difference(spec: StudySpec, path: Path, again: OwnRun) -> str | None:
    """Return where a run first differs from the receipt's trial, None if its curve and its value are equal bit for bit.

    Raises StudyError if the trial was not COMPLETE.
    """
    receipt = spec.receipt
    trial = f"trial {receipt.get('trial')}"
    if receipt.get("state") != "complete":
        raise StudyError(f"{path}: {trial} was {receipt.get('state')}; its value cannot be compared")
    curve = receipt.get("curves", {}).get(OWN_METRIC, [])
    for (step, value), then in zip(again.curve.items(), curve, strict=False):
        if value != then and not (math.isnan(value) and math.isnan(then)):
            return f"at step {step}: {trial} reported {then!r}, the replay {value!r}"
    if curve and len(curve) != len(again.curve):
        return f"in length: {trial} reported {len(curve)} values, the replay {len(again.curve)}"
    returned = receipt["values" if spec.objectives else "value"]
    return None if again.value == returned else f"in value: {trial} returned {returned!r}, the replay {again.value!r}"
