"""Where it is written down that a test split was opened: in the ledger of the study that the config came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpo import storage as storages
from hpo import study as studies
from hpo.errors import Fault
from hpo.spec import StudySpec


def record(spec: StudySpec, metrics: dict[str, Any], folder: Path, url: str) -> str | None:
    """Record an opening; return why it could not be, None if it was.

    The config may be trained on a machine that does not see the study, so this never fails.
    """
    receipt = spec.receipt
    if "study_uid" not in receipt:
        return "the config has no receipt of a study"
    try:
        study = studies.join(storages.connect(url), receipt["study"])
    except Fault as fault:
        return str(fault)
    if study.uid != receipt["study_uid"]:
        return f"study {receipt['study']!r} in {study.storage.shown} is not the one that the config came from"
    measured = {key: metrics[key] for key in ("test_accuracy", "test_loss")}
    study.ledger("final").record_test_opening(receipt.get("trial"), measured, str(folder.absolute()))
    return None
