"""A finished trial as a pinned config: the study file with the trial's values, without the branches not taken.

Beside the values stands the receipt: what the trial was made from, and the curve that a replay must give again.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import tomli_w

from hpo.errors import StudyError
from hpo.spec import space
from hpo.spec.metrics import UNREPEATABLE
from hpo.spec.study_file import UNIDENTIFYING
from hpo.spec.training import SECTIONS
from hpo.study.format import amount_text
from hpo.study.results import TrialResult, best
from hpo.study.status import summarize
from hpo.study.study import Study

LEFT_OUT = {"sampler", "pruner", "constraints", *UNIDENTIFYING, "params"}  # of a search only


def export(
    study: Study, output: Path, *, number: int | None = None, top: int | None = None, whole_front: bool = False
) -> list[Path]:
    """Write the best trial, the one with this number, or several, which get the rank put into their file names.

    Args:
        top: how many of the best; of several objectives, of the front, the best in the first objective first.
        whole_front: all trials on the front of several objectives.

    Raises StudyError without a finished trial, if there are several objectives and no choice, or if the file cannot be written.
    """
    several = study.spec.goals.are_several
    if whole_front and not several:
        raise StudyError(f"study {study.name!r} has one objective and no front; leave --front out for the best trial")
    found = best(study, k=None if whole_front or several else top or 1, number=number)
    if several and number is None and top is None and not whole_front:
        raise StudyError(*_choose(study, found))
    found = found if number is not None else found[:top]
    if top in (None, 1) and not whole_front:
        return [write(output, pinned(study, found[0]))]
    return [
        write(output.with_suffix(f".{rank}{output.suffix}"), pinned(study, result))
        for rank, result in enumerate(found, start=1)
    ]


def _choose(study: Study, front: list[TrialResult]) -> list[str]:
    """Say what there is to choose from where there is no single best trial."""
    lines = [
        f"study {study.name!r} has several objectives and no single best trial; choose by --trial, or --front for all:"
    ]
    for result in front:
        values = ", ".join(f"{name} {amount_text(value)}" for name, value in result.values.items())
        lines.append(f"  --trial {result.number}: {values}")
    return lines


def pinned(study: Study, result: TrialResult) -> dict[str, Any]:
    """Return the document of a trial: its training sections with every range pinned, and its receipt."""
    document = {key: value for key, value in study.spec.document.items() if key not in LEFT_OUT}
    if study.spec.objective:
        unused = {"metric", *SECTIONS}
        document = {key: value for key, value in document.items() if key not in unused} | {"params": result.params}
    else:
        document.pop("objectives", None)
        document |= space.pin(study.spec.tree, lambda path, _: _value(result, path))
    return _scalars_first(document) | {"receipt": _receipt(study, result)}


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
        "trials_tried": summarize(study).finished,
        "checkpoint": result.checkpoint,
        "code_folder": str(study.code_folder),
        "test_split": "the user's own promise" if study.spec.objective else "sealed",
        **result.receipt,
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
