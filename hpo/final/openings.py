"""Records in the study's ledger that a final training opened the test split.

An opening is recorded before the split is opened, and its result afterwards. So an opening is on record even if the training is
killed in between.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpo.errors import Fault, StudyError
from hpo.spec.metrics import of_test
from hpo.spec.study_file import StudySpec
from hpo.storage import study_rows
from hpo.storage.connect import FAILURES, connect
from hpo.study import study as studies
from hpo.study.study import Study

TROUBLE = (Fault, *FAILURES)


def announce(spec: StudySpec, folder: Path, url: str, *, trainings: int = 1) -> str | None:
    """Record that the test split is opened for so many trainings in this folder: who, when, and after how many trials.

    Return why that failed, None if it did not.

    No error of the storage is raised, since a config may be trained on a machine without access to the study.
    """
    try:
        with _opened(spec, url) as study:
            about = {"opened_by": _person(), "trainings": trainings, "trials_tried": spec.receipt.get("trials_tried")}
            study_rows.announce_opening(study.storage.engine, study.study_id, **_which(study, spec, folder), **about)
    except TROUBLE as error:
        return str(error)
    return None


def complete(spec: StudySpec, folder: Path, url: str, metrics: dict[str, Any]) -> list[str]:
    """Record the result of the latest announced opening.

    Return the folder of each opening for the same trial, the oldest first. Does nothing and returns none if the storage cannot
    be used.
    """
    measured = {f"test_{name}": metrics[f"test_{name}"] for name in of_test(metrics, spec.metric)}
    with contextlib.suppress(*TROUBLE), _opened(spec, url) as study:
        study_rows.complete_opening(study.storage.engine, measured, **_which(study, spec, folder))
        with study.storage.engine.connect() as connection:
            found = study_rows.openings(connection, study.uid)
        return [opened.folder for opened in found if opened.trial_number == spec.receipt.get("trial")]
    return []


def _person() -> str:
    """Return the user and the machine, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have it
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def _which(study: Study, spec: StudySpec, folder: Path) -> dict[str, Any]:
    return {
        "study_uid": study.uid,
        "trial_number": spec.receipt.get("trial"),
        "folder": str(folder.absolute()),
    }


@contextlib.contextmanager
def _opened(spec: StudySpec, url: str) -> Iterator[Study]:
    receipt = spec.receipt
    if "study_uid" not in receipt:
        raise StudyError("the config has no receipt of a study")
    place = connect(url)
    try:
        study = studies.join(place, receipt["study"])
        if study.uid != receipt["study_uid"]:
            raise StudyError(f"study {receipt['study']!r} in {place.shown} is not the one that the config came from")
        yield study
    finally:
        place.close()
