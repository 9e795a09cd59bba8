"""The final run of a user's own objective: once, with the winner's parameters, outside any study."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna

from hpo.errors import SpecError, StudyError
from hpo.spec import usercode
from hpo.spec.study_file import StudySpec
from hpo.text import command


def run(spec: StudySpec, path: Path, folder: Path) -> float | dict[str, float]:
    """Call the objective with an `optuna.trial.FixedTrial` of the config's [params] and return what it returns, several values
    by their names.

    The trial has the number of the receipt's, from which many an objective takes its seed. Raises SpecError without
    [params] or if one that the objective asks for is missing, StudyError if it does not return a number, or as many as the
    config has objectives.
    """
    assert spec.objective is not None
    if not spec.params:
        raise SpecError(f"{path}: has no [params]; `hpo export` writes them, or search with `{command('run', path)}`")
    objective = usercode.load_objective(spec.objective, folder)
    try:
        returned: Any = objective(optuna.trial.FixedTrial(spec.params, number=spec.receipt.get("trial", 0)))
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise SpecError(f"{path}: params: {error}") from None
    try:
        values = [float(value) for value in (returned if spec.objectives else [returned])]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(map(math.isfinite, values)) or len(values) != max(1, len(spec.objectives)):
        wanted = f"{len(spec.objectives)} finite numbers" if spec.objectives else "a finite number"
        raise StudyError(f"{path}: the objective returned {returned!r}, not {wanted}")
    return dict(zip(spec.objectives, values, strict=True)) if spec.objectives else values[0]


def repeats(spec: StudySpec, path: Path, returned: float | dict[str, float]) -> bool:
    """Say whether the objective returned the trial's values again; StudyError if the trial has none to compare with."""
    receipt = spec.receipt
    if spec.rule is not None:
        raise StudyError(f"{path}: the trial's value is the {spec.value} of its curve, which this run does not see")
    if receipt.get("state") != "complete":
        raise StudyError(
            f"{path}: trial {receipt.get('trial')} was {receipt.get('state')}; its value cannot be compared"
        )
    return bool(returned == receipt["values" if spec.objectives else "value"])
