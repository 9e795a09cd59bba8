"""What a worker leaves beside a checkpoint that it could not record, for whoever takes the trial up.

When the storage is away, a checkpoint and what was reported since the last recorded one go into the trial's folder. A later
attempt reports that again under its own lease, asking the pruner epoch by epoch as if nothing had happened, and goes on
from there. Whoever records a checkpoint removes what is older (`retention.tidy`), so a note that is there is news.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hpo.ledger import Checkpoint, Report
from hpo.trial import LeasedTrial

log = logging.getLogger(__name__)
PATTERN = "attempt-*-handover.json"


def leave(folder: Path, trial: LeasedTrial, checkpoint: Checkpoint, since: Sequence[Report]) -> Path:
    """Write down what a later attempt needs and return the file; OSError if the disk does not take it.

    Args:
        since: what was reported since the last recorded checkpoint.
    """
    claim = trial.lease.claim
    left = {
        "checkpoint": asdict(checkpoint),
        "accumulation": claim.accumulation,
        "curve": trial.curve,
        "reports": [[report.step, report.value, dict(report.metrics)] for report in since],
    }
    note = folder / f"attempt-{claim.attempt}-handover.json"
    part = folder / f".attempt-{claim.attempt}-handover.{os.getpid()}.part"
    with part.open("w") as file:
        json.dump(left, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, note)
    return note


def take(folder: Path, trial: LeasedTrial) -> None:
    """Bring a trial just opened to where an earlier attempt left it, if one did; LostLease if it is in other hands."""
    for note in sorted(folder.glob(PATTERN), key=_attempt, reverse=True):
        left = _read(note)
        if left is not None and _goes_on(trial, left):
            _take_up(trial, left)
            note.unlink(missing_ok=True)
            return


def _attempt(note: Path) -> int:
    return int(note.name.split("-")[1])


def _read(note: Path) -> dict[str, Any] | None:
    try:
        left: dict[str, Any] = json.loads(note.read_text())
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the trial goes on from its last recorded checkpoint", note, error)
        return None
    return left


def _goes_on(trial: LeasedTrial, left: dict[str, Any]) -> bool:
    """Say whether the note is of this way of training, from where the trial stands or later, and its file still there."""
    claim, checkpoint = trial.lease.claim, left["checkpoint"]
    known = claim.checkpoint.epoch if claim.checkpoint else 0
    is_later = checkpoint["epoch"] >= known and left["accumulation"] == claim.accumulation
    return is_later and Path(checkpoint["path"]).exists()


def _take_up(trial: LeasedTrial, left: dict[str, Any]) -> None:
    lease = trial.lease
    for step, value, metrics in left["reports"]:
        trial.write(Report(claim=lease.claim, step=step, value=value, metrics=metrics))
        trial.pruner_says_stop()  # not to obey: what it remembers of the epoch is what later trials are held against
    lease.flush()
    checkpoint = Checkpoint(**left["checkpoint"])
    lease.patience(lambda: lease.ledger.record_checkpoint(lease.claim, checkpoint))
    lease.claim = replace(lease.claim, checkpoint=checkpoint)
    trial.curve[:] = left["curve"]
