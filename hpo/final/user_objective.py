"""The final run of a user's own objective: once, with the winner's parameters, in a study that lives in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.errors import Fault, SpecError, StudyError
from hpo.spec import usercode
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import FAILURES, connect
from hpo.study import plain
from hpo.study.export import from_toml
from hpo.study.pinned_trial import PinnedTrial, study_in_memory, trials_before
from hpo.study.study import as_in_optimize
from hpo.text import command


def run(spec: StudySpec, path: Path, folder: Path, earlier: Sequence[FrozenTrial] = ()) -> float | dict[str, float]:
    """Call the objective with the config's [params] and return the value that a search would give the trial, several by name.

    The trial has the number of the receipt's, from which many an objective takes its seed.

    Args:
        earlier: the trials that the receipt's trial found in its study.

    Raises SpecError without [params], or if the objective asks for something else; StudyError if it does not return a
    number, or as many as the config has objectives.
    """
    assert spec.objective is not None
    receipt = spec.receipt
    if not spec.params and "trial" not in receipt:
        raise SpecError(f"{path}: has no [params]; `hpo export` writes them, or search with `{command('run', path)}`")
    objective = usercode.load_objective(spec.objective, folder)
    attributes = _read(receipt.get("study_attributes", {}), path, "receipt.study_attributes")
    study = study_in_memory(receipt.get("study", spec.name), spec.goals, attributes=attributes, earlier=earlier)
    trial = PinnedTrial(
        study,
        _read(spec.params, path, "params"),
        number=receipt.get("trial", 0),
        attributes=_read(receipt.get("attributes", {}), path, "receipt.attributes"),
    )
    returned: Any = None
    try:
        with as_in_optimize(study):
            returned = objective(trial)
    except optuna.TrialPruned:  # of itself: then its value is the last that it reported
        returned = next((value for value in reversed(trial.curve) if math.isfinite(value)), None)
    except SpecError:
        if trial.refused is None:
            raise
    if trial.refused is not None:
        raise SpecError(f"{path}: {trial.refused}")
    return _judged(spec, path, trial.curve, returned)


def _read(written: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Return values as they were before they were written to a file."""
    found = {}
    for key, value in written.items():
        try:
            found[key] = from_toml(value)
        except ValueError as error:
            raise SpecError(f"{path}: {where}.{key} = {value!r}: is not JSON: {error}") from None
    return found


def _judged(spec: StudySpec, path: Path, curve: Sequence[float], returned: Any) -> float | dict[str, float]:
    """Return what a search makes of what an objective reported and returned."""
    names = spec.goals.names
    by_curve = spec.rule(curve) if spec.rule and curve else None
    if by_curve is not None and len(names) == 1:
        returned = by_curve
    try:
        values = [float(value) for value in (returned if spec.objectives else [returned])]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(map(math.isfinite, values)) or len(values) != len(names):
        wanted = f"{len(names)} finite numbers" if spec.objectives else "a finite number"
        raise StudyError(f"{path}: the objective returned {returned!r}, not {wanted}")
    if by_curve is not None:
        values[0] = by_curve
    return dict(zip(names, values, strict=True)) if spec.objectives else values[0]


def earlier_trials(spec: StudySpec, url: str) -> tuple[list[FrozenTrial], str | None]:
    """Return the trials that the receipt's trial found in its study, or none and the reason why they cannot be had."""
    receipt = spec.receipt
    if "study" not in receipt or not receipt.get("trial"):
        return [], None
    try:
        place = connect(url)
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


def repeats(spec: StudySpec, path: Path, returned: float | dict[str, float]) -> bool:
    """Say whether the objective came to the trial's values again; StudyError if the trial has none to compare with."""
    receipt = spec.receipt
    if receipt.get("state") != "complete":
        raise StudyError(
            f"{path}: trial {receipt.get('trial')} was {receipt.get('state')}; its value cannot be compared"
        )
    return bool(returned == receipt["values" if spec.objectives else "value"])
