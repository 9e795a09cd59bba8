"""A finished trial as a pinned config: the study file with the trial's values, without the branches not taken.

Beside the values stands the receipt: what the trial was made from, and the curve that a replay must give again.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import optuna
import tomli_w
from optuna.distributions import CategoricalDistribution

from hpo.errors import StudyError
from hpo.spec import space
from hpo.spec.metrics import UNREPEATABLE
from hpo.spec.study_file import UNIDENTIFYING
from hpo.spec.toml_file import INTEGERS
from hpo.spec.training import SECTIONS
from hpo.storage import choices
from hpo.storage.tables import UID_KEY
from hpo.study import plain
from hpo.study.format import amount_text
from hpo.study.plain import PlainStudy
from hpo.study.results import TrialResult
from hpo.study.study import FINGERPRINT_KEY, Study

EXACT_FORMAT = 2  # of studies whose trials record which of several equal choices it was
JSON_KEY = "json"  # of the table that stands in a file for what TOML cannot say
QUEUED_KEY = "fixed_params"  # Optuna's system attribute of a trial that somebody queued
LEFT_OUT = {"sampler", "pruner", "constraints", *UNIDENTIFYING, "params"}  # of a search only


def export(
    study: Study | PlainStudy,
    output: Path,
    *,
    number: int | None = None,
    top: int | None = None,
    whole_front: bool = False,
) -> list[Path]:
    """Write the best trial, the one with this number, or several, which get the rank put into their file names.

    Args:
        top: how many of the best; of several objectives, of the front, the best in the first objective first.
        whole_front: all trials on the front of several objectives.

    Raises StudyError without a finished trial, if there are several objectives and no choice, if it is not known which value
    a trial had, or if the file cannot be written.
    """
    several = study.goals.are_several
    if whole_front and not several:
        raise StudyError(f"study {study.name!r} has one objective and no front; leave --front out for the best trial")
    found = plain.best(study, k=None if whole_front or several else top or 1, number=number)
    if several and number is None and top is None and not whole_front:
        raise StudyError(*_choose(study, found))
    found = found if number is not None else found[:top]
    if top in (None, 1) and not whole_front:
        return [write(output, pinned(study, found[0]))]
    return [
        write(output.with_suffix(f".{rank}{output.suffix}"), pinned(study, result))
        for rank, result in enumerate(found, start=1)
    ]


def _choose(study: Study | PlainStudy, front: list[TrialResult]) -> list[str]:
    """Say what there is to choose from where there is no single best trial."""
    lines = [
        f"study {study.name!r} has several objectives and no single best trial; choose by --trial, or --front for all:"
    ]
    for result in front:
        values = ", ".join(f"{name} {amount_text(value)}" for name, value in result.values.items())
        lines.append(f"  --trial {result.number}: {values}")
    return lines


def pinned(study: Study | PlainStudy, result: TrialResult) -> dict[str, Any]:
    """Return the document of a trial: its training sections with every range pinned, and its receipt.

    Of a study that Optuna made it lacks the objective, which nobody but its user knows.
    """
    if isinstance(study, PlainStudy):
        return _pinned_plain(study, result)
    document = {key: value for key, value in study.spec.document.items() if key not in LEFT_OUT}
    if study.spec.objective:
        unused = {"metric", *SECTIONS}
        is_exact = study.spec.format >= EXACT_FORMAT and result.attempt > 0
        params = _params(result, is_exact=is_exact)
        document = {key: value for key, value in document.items() if key not in unused} | {"params": params}
    else:
        document.pop("objectives", None)
        document |= space.pin(study.spec.tree, lambda path, _: _value(result, path))
    return _scalars_first(document) | {"receipt": _receipt(study, result)}


def _pinned_plain(study: PlainStudy, result: TrialResult) -> dict[str, Any]:
    goals = study.goals
    aims: dict[str, Any] = {"objectives": dict(goals.directions)}
    if not goals.are_several:
        aims = {"direction": goals.directions[goals.first]}
    receipt = {
        "made_by": "Optuna",
        "study": study.name,
        "storage": study.storage.shown,
        "trial": result.number,
        "state": result.state,
        "value": result.value,
        "values": result.values,
        "constraints": result.constraints,
        "trials_tried": plain.summarize(study).finished,
        **_attributes(study, result),
    }
    params = _params(result, is_exact=False)
    return {**aims, "params": params, "receipt": {key: value for key, value in receipt.items() if value != {}}}


def _params(result: TrialResult, *, is_exact: bool) -> dict[str, Any]:
    """Return the parameters of a trial of a user's own objective as a file has them.

    Args:
        is_exact: which of several choices that Optuna takes for one it was, is recorded. Else StudyError if it was one of such.
    """
    for name, distribution in result.distributions.items():
        if is_exact or not isinstance(distribution, CategoricalDistribution):
            continue
        alike = choices.look_alike(distribution.choices, result.params[name])
        if len(alike) > 1:
            raise StudyError(
                f"trial {result.number}: {name} was one of {', '.join(map(repr, alike))}, which are one to Optuna, so that "
                "nobody recorded which; give such choices as texts"
            )
    return {name: to_toml(value) for name, value in result.params.items()}


def to_toml(value: Any) -> Any:
    """Return a value as an exported file has it: `{ json = "null" }` and the like for what TOML cannot say."""
    return value if _is_toml(value) else {JSON_KEY: json.dumps(value)}


def _is_toml(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_toml, value))
    if isinstance(value, str):
        return not any("\ud800" <= sign <= "\udfff" for sign in value)  # half a character cannot be written
    return isinstance(value, bool | float) or (isinstance(value, int) and value in INTEGERS)


def from_toml(value: Any) -> Any:
    """Return the value that `to_toml` has written; ValueError for a text that is no JSON."""
    if isinstance(value, dict) and [*value] == [JSON_KEY] and isinstance(value[JSON_KEY], str):
        return json.loads(value[JSON_KEY])
    return value


def _attributes(study: Study | PlainStudy, result: TrialResult) -> dict[str, Any]:
    """Return the user attributes that an objective found: of its study, and of a trial that somebody queued."""
    of_study = {key: value for key, value in study.optuna.user_attrs.items() if key not in (UID_KEY, FINGERPRINT_KEY)}
    trial = _trial(study, result.number)
    of_trial = trial.user_attrs if QUEUED_KEY in trial.system_attrs else {}
    return {
        "study_attributes": {key: to_toml(value) for key, value in of_study.items()},
        "attributes": {key: to_toml(value) for key, value in of_trial.items()},
    }


def _trial(study: Study | PlainStudy, number: int) -> optuna.trial.FrozenTrial:
    storage = study.storage.optuna
    return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study.optuna._study_id, number))


def _value(result: TrialResult, path: str) -> Any:
    """Return a parameter's value in a trial; what the trial never reached (it failed early) cannot be pinned."""
    if path not in result.params:
        raise StudyError(f"trial {result.number} has no value for {path}; it ended before one was drawn")
    return result.params[path]


def _scalars_first(document: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(document.items(), key=lambda item: isinstance(item[1], dict)))


def _receipt(study: Study, result: TrialResult) -> dict[str, Any]:
    receipt = {
        "study": study.name,
        "study_uid": study.uid,
        "storage": study.storage.shown,
        "fingerprint": study.spec.fingerprint,
        "trial": result.number,
        "state": result.state,
        "value": result.value,
        "values": result.values,
        "constraints": result.constraints,
        "attempts": result.attempt,
        "trials_tried": plain.summarize(study).finished,
        "checkpoint": result.checkpoint,
        "code_folder": str(study.code_folder),
        "test_split": "the user's own promise" if study.spec.objective else "sealed",
        **result.receipt,
        **(_attributes(study, result) if study.spec.objective else {}),
        "curves": {metric: list(curve) for metric, curve in result.curves.items() if _repeats(metric)},
    }
    return {key: value for key, value in receipt.items() if value is not None and value != {}}


def _repeats(metric: str) -> bool:
    """Say whether a metric comes out the same when a trial is trained again: all but time and memory."""
    return metric not in UNREPEATABLE


def write(path: Path, document: dict[str, Any]) -> Path:
    """Write a TOML file whole or not at all."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_text(tomli_w.dumps(document), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StudyError(f"{path}: cannot be written: {error.strerror}; name another file with -o") from None
    return path
