"""Writes finished trials as pinned configs: the study file with a trial's values in place of ranges and choices.

Branches that the trial did not take are left out. The receipt says what the trial was made from. It also holds the
curves that a replay must give again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from hpo.errors import StudyError
from hpo.files import atomic_write
from hpo.receipt import BEST_STEP
from hpo.spec import space
from hpo.spec.metrics import UNREPEATABLE
from hpo.spec.study_file import UNIDENTIFYING
from hpo.spec.toml_file import INTEGERS
from hpo.spec.training import SECTIONS
from hpo.storage import choices, study_rows
from hpo.storage.tables import FORKED_FROM_KEY, QUEUED_KEY
from hpo.study import plain
from hpo.study.format import amount_text
from hpo.study.plain import PlainStudy
from hpo.study.query import trial_columns
from hpo.study.results import TrialResult
from hpo.study.study import OWN_KEYS, TAKEN_FROM_KEY, Study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.storage.study_rows import Opening

EXACT_FORMAT = 2  # from this format on, trials record which of several equal choices they had
JSON_KEY = "json"  # the key of a table that holds a value as JSON, since TOML cannot express it
UNUSED_BY_OWN = {"metric", *SECTIONS}  # keys that an own training does not need; a command has a metric of its own
LEFT_OUT = {"sampler", "pruner", "constraints", *UNIDENTIFYING, "params", "start"}  # keys that only a search needs


def export(
    study: Study | PlainStudy,
    output: Path,
    *,
    number: int | None = None,
    top: int | None = None,
    whole_front: bool = False,
    confirmed: Mapping[str, Any] | None = None,
) -> dict[Path, TrialResult]:
    """Write the best trial, one trial by number, or several trials. Return the trial of each file.

    Args:
        study: the study.
        output: the file. With several trials, each gets a file with its rank before the extension.
        number: the trial to write.
        top: how many of the best trials to write. With several objectives, the first one orders the front.
        whole_front: write all trials on the Pareto front.
        confirmed: what the receipt says of the trial's confirmation.

    Raises StudyError if there is no finished trial, if several objectives leave the choice open, if it is not recorded
    which value a trial had, or if a file cannot be written.
    """
    several = study.goals.are_several
    if whole_front and not several:
        raise StudyError(f"study {study.name!r} has one objective and no front; leave --front out for the best trial")
    found = plain.best(study, k=None if whole_front or several else top or 1, number=number)
    if several and number is None and top is None and not whole_front:
        raise StudyError(*_choose(study, found))
    found = found if number is not None else found[:top]
    if top in (None, 1) and not whole_front:
        document = pinned(study, found[0])
        if confirmed is not None:
            document["receipt"]["confirmed"] = dict(confirmed)
        return {write(output, document): found[0]}
    return {
        write(output.with_suffix(f".{rank}{output.suffix}"), pinned(study, result)): result
        for rank, result in enumerate(found, start=1)
    }


def _choose(study: Study | PlainStudy, front: list[TrialResult]) -> list[str]:
    """Return the lines of an error that lists the trials to choose from."""
    lines = [
        f"study {study.name!r} has several objectives and no single best trial; choose by --trial, or --front for all:"
    ]
    for result in front:
        values = ", ".join(f"{name} {amount_text(value)}" for name, value in result.values.items())
        lines.append(f"  --trial {result.number}: {values}")
    return lines


def pinned(study: Study | PlainStudy, result: TrialResult) -> dict[str, Any]:
    """Return a trial's pinned config: its training sections with every range pinned, and its receipt.

    For a study that Optuna made, the config has no objective: only the user knows it.
    """
    if isinstance(study, PlainStudy):
        return _pinned_plain(study, result)
    document = {key: value for key, value in study.spec.document.items() if key not in LEFT_OUT}
    pinned_tree = space.pin(study.spec.tree, lambda path, _: _value(result, path))
    if study.spec.is_declared:
        document.pop("objectives", None)
        document |= pinned_tree
    else:
        is_exact = study.spec.format >= EXACT_FORMAT and result.attempt > 0
        own = {"space": pinned_tree} if pinned_tree else {"params": _params(result, is_exact=is_exact)}
        unused = UNUSED_BY_OWN - {"metric"} if study.spec.command else UNUSED_BY_OWN
        document = {key: value for key, value in document.items() if key not in unused} | own
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
        result: the trial.
        is_exact: whether the trial recorded which of several equal choices it had. If not, such a choice is a
        StudyError.
    """
    for name, options in result.choices.items():
        alike = choices.look_alike(options, result.params[name])
        if len(alike) > 1 and not is_exact:
            raise StudyError(
                f"trial {result.number}: {name} was one of {', '.join(map(repr, alike))}, which Optuna takes for equal, "
                "so which one is not recorded; give such choices as texts"
            )
    return {name: to_toml(value) for name, value in result.params.items()}


def to_toml(value: Any) -> Any:
    """Return a value as an exported file has it. What TOML cannot express becomes JSON, such as `{ json = "null" }`."""
    return value if _is_toml(value) else {JSON_KEY: json.dumps(value)}


def _is_toml(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_toml, value))
    if isinstance(value, str):
        return not any("\ud800" <= sign <= "\udfff" for sign in value)  # a lone surrogate cannot be written
    return isinstance(value, bool | float) or (isinstance(value, int) and value in INTEGERS)


def from_toml(value: Any) -> Any:
    """Return the value that `to_toml` wrote. Raises ValueError for a text that is not JSON."""
    if isinstance(value, dict) and [*value] == [JSON_KEY] and isinstance(value[JSON_KEY], str):
        return json.loads(value[JSON_KEY])
    return value


def _attributes(study: Study | PlainStudy, result: TrialResult) -> dict[str, Any]:
    """Return the user attributes of the study and, for a queued trial, of the trial."""
    of_study = {key: value for key, value in study.optuna.user_attrs.items() if key not in OWN_KEYS}
    trial = _trial(study, result.number)
    of_trial = trial.user_attrs if QUEUED_KEY in trial.system_attrs else {}
    return {
        "study_attributes": {key: to_toml(value) for key, value in of_study.items()},
        "attributes": {key: to_toml(value) for key, value in of_trial.items()},
    }


def _trial(study: Study | PlainStudy, number: int) -> FrozenTrial:
    from hpo.storage.optuna_private import id_of

    storage = study.storage.optuna
    return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(id_of(study.optuna), number))


def _value(result: TrialResult, path: str) -> Any:
    """Return a parameter's value in a trial. Raises StudyError if the trial ended before the value was drawn."""
    if path not in result.params:
        raise StudyError(f"trial {result.number} has no value for {path}; it ended before one was drawn")
    return result.params[path]


def _scalars_first(document: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(document.items(), key=lambda item: isinstance(item[1], dict)))


def _receipt(study: Study, result: TrialResult) -> dict[str, Any]:
    with study.storage.engine.connect() as connection:
        tried, opened = trial_columns.count_finished(connection, study), study_rows.openings(connection, study.uid)
    receipt = {
        "study": study.name,
        "study_uid": study.uid,
        "storage": study.storage.shown,
        "fingerprint": study.spec.fingerprint,
        "trial": result.number,
        "state": result.state,
        "value": result.value,
        "value_interval": [result.interval.low, result.interval.high] if result.interval else None,
        "values": result.values,
        "constraints": result.constraints,
        "attempts": result.attempt,
        "trials_tried": tried,
        "checkpoint": result.checkpoint,
        "weights": _weights(study, result),
        "code_folder": str(study.code_folder),
        "test_split": _test_split(study, result.number, opened),
        **result.receipt,
        "split_seed": result.receipt.get("split_seed", study.spec.split_seed if study.spec.is_declared else None),
        "taken_from": taken_from(study, result),
        **({} if study.spec.is_declared else _attributes(study, result)),
        "curves": {metric: list(curve) for metric, curve in result.curves.items() if _repeats(metric)},
    }
    return {key: value for key, value in receipt.items() if value is not None and value != {}}


def taken_from(study: Study | PlainStudy, result: TrialResult) -> dict[str, Any]:
    """Return where a fork or an import found a trial: study, storage and number. Empty for a trial that the study has trained."""
    if isinstance(study, PlainStudy) or result.attempt:
        return {}
    attributes = _trial(study, result.number).user_attrs
    if FORKED_FROM_KEY not in attributes:
        return {}
    return {**study.optuna.user_attrs.get(TAKEN_FROM_KEY, {}), "trial": attributes[FORKED_FROM_KEY]}


def _weights(study: Study, result: TrialResult) -> str | None:
    """Return where in its checkpoint a user's own loop keeps the weights to use, as `hpo.load_weights` reads them."""
    if study.spec.is_declared or study.spec.has_program or result.checkpoint is None:
        return None
    return "best.objects" if BEST_STEP in result.receipt else "objects"


def _test_split(study: Study, number: int, opened: Sequence[Opening]) -> str:
    """Return how often the study's test split has been opened."""
    if not study.spec.is_declared:
        return "unknown: hpo does not see which data your objective reads"
    of_trial = sum(one.trial_number == number for one in opened)
    return f"openings in this study: {len(opened)}, {of_trial} of them for this trial" if opened else "sealed"


def _repeats(metric: str) -> bool:
    """Return whether a metric is the same when a trial is trained again. Time and memory are not."""
    return metric not in UNREPEATABLE


def write(path: Path, document: dict[str, Any]) -> Path:
    """Write a TOML file, whole or not at all. Raises StudyError if it cannot be written."""
    try:
        with atomic_write(path) as part:
            part.write_text(tomli_w.dumps(document), encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{path}: cannot be written: {error.strerror}; name another file with -o") from None
    return path
