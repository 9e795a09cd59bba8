"""Where it is written down that a test split was opened: in the ledger of the study that the config came from.

It is written before the split is opened, and again with the result: a training that is cut off in between has opened it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpo import storage as storages
from hpo import study as studies
from hpo.errors import Fault
from hpo.spec import StudySpec


def record(spec: StudySpec, folder: Path, url: str, metrics: dict[str, Any] | None = None) -> str | None:
    """Record that a training in this folder opens the test split, and its result; return why that failed, else None.

    A config may be trained on a machine that does not see the study, so this never raises.
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
    measured = None if metrics is None else {key: metrics[key] for key in ("test_accuracy", "test_loss")}
    study.ledger("final").record_test_opening(receipt.get("trial"), str(folder.absolute()), measured)
    return None
