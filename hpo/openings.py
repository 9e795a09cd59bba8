"""Where it is written down that a test split was opened: in the ledger of the study that the config came from.

It is written before the split is opened, and again with the result: a training that is cut off in between has opened it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hpo import storage as storages
from hpo import study as studies
from hpo.errors import Fault, StudyError
from hpo.ledger import Ledger
from hpo.spec import StudySpec

TROUBLE = (Fault, *storages.FAILURES)


def announce(spec: StudySpec, folder: Path, url: str) -> str | None:
    """Record that a training in this folder opens the test split; return why that failed, None if it did not.

    A config may be trained on a machine that does not see the study: no trouble with its storage is raised.
    """
    try:
        _ledger(spec, url).announce_test_opening(spec.receipt.get("trial"), str(folder.absolute()))
    except TROUBLE as error:
        return str(error)
    return None


def complete(spec: StudySpec, folder: Path, url: str, metrics: dict[str, Any]) -> None:
    """Record the result of an opening that was announced; nothing happens where it could not be."""
    measured = {key: metrics[key] for key in ("test_accuracy", "test_loss")}
    with contextlib.suppress(*TROUBLE):
        _ledger(spec, url).complete_test_opening(spec.receipt.get("trial"), str(folder.absolute()), measured)


def _ledger(spec: StudySpec, url: str) -> Ledger:
    receipt = spec.receipt
    if "study_uid" not in receipt:
        raise StudyError("the config has no receipt of a study")
    study = studies.join(storages.connect(url), receipt["study"])
    if study.uid != receipt["study_uid"]:
        raise StudyError(
            f"study {receipt['study']!r} in {study.storage.shown} is not the one that the config came from"
        )
    return study.ledger("final")
