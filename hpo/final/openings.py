"""Where it is written down that a test split was opened: in the ledger of the study that the config came from.

It is written before the split is opened, and again with the result: a training that is cut off in between has opened it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from hpo.errors import Fault, StudyError
from hpo.spec.study_file import StudySpec
from hpo.storage import sql
from hpo.storage.connect import FAILURES, connect
from hpo.storage.tables import hpo_test_openings
from hpo.study import study as studies
from hpo.study.study import Study

TROUBLE = (Fault, *FAILURES)


def announce(spec: StudySpec, folder: Path, url: str) -> str | None:
    """Record that a training in this folder opens the test split; return why that failed, None if it did not.

    A config may be trained on a machine that does not see the study: no trouble with its storage is raised.
    """
    try:
        with _opened(spec, url) as study, sql.writing(study.storage.engine) as connection:
            opened = {"study_id": study.study_id, "opened_at": sql.now(connection), **_which(study, spec, folder)}
            connection.execute(hpo_test_openings.insert().values(opened))
    except TROUBLE as error:
        return str(error)
    return None


def complete(spec: StudySpec, folder: Path, url: str, metrics: dict[str, Any]) -> None:
    """Record the result of the latest opening that was announced; nothing happens where it could not be."""
    measured = {key: metrics[key] for key in ("test_accuracy", "test_loss")}
    with contextlib.suppress(*TROUBLE), _opened(spec, url) as study:
        same = [hpo_test_openings.c[key] == value for key, value in _which(study, spec, folder).items()]
        latest = sa.select(sa.func.max(hpo_test_openings.c.opening_id)).where(
            *same, hpo_test_openings.c.metrics.is_(None)
        )
        with sql.writing(study.storage.engine) as connection:
            connection.execute(
                hpo_test_openings.update()
                .where(hpo_test_openings.c.opening_id == latest.scalar_subquery())
                .values(metrics=json.dumps(measured))
            )


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
