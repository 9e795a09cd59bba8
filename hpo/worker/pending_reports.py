"""Pending reports: what a worker could not write during an outage, stored beside a checkpoint for the next attempt.

While the storage fails, a checkpoint and the reports since the last recorded one go into the trial's folder. A later
attempt reports these again under its own lease. It asks the pruner epoch by epoch as usual, and continues from there.
Recording a checkpoint deletes older files (`retention.tidy`), so a note that is there is newer than the recorded
checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path

import pydantic

from hpo.files import atomic_write
from hpo.queue.models import Checkpoint
from hpo.queue.report import Report
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
NAME = re.compile(r"attempt-(\d{1,9})-handover\.json")


class PendingReports(pydantic.BaseModel):
    """The note: a checkpoint, and what a later attempt needs to continue from it."""

    model_config = pydantic.ConfigDict(frozen=True, ser_json_inf_nan="constants")

    checkpoint: Checkpoint
    accumulation: int
    curve: list[float]  # the judged metric, raw, by epoch
    reports: list[tuple[int, float, dict[str, float]]]  # since the last recorded checkpoint: step, value, metrics


def leave(folder: Path, trial: LeasedTrial, checkpoint: Checkpoint) -> Path:
    """Write what a later attempt needs and return the file. Raises OSError if the disk does not take it."""
    claim, since = trial.lease.claim, trial.lease.unrecorded or ()
    left = PendingReports(
        checkpoint=checkpoint,
        accumulation=claim.accumulation,
        curve=trial.curve,
        reports=[(report.step, report.value, dict(report.metrics)) for report in since],
    )
    note = folder / f"attempt-{claim.attempt}-handover.json"
    with atomic_write(note) as part:
        part.write_text(left.model_dump_json())
    return note


def take(folder: Path, trial: LeasedTrial) -> None:
    """Bring a trial just opened to where an earlier attempt left it. Raises LostLease if the claim is lost."""
    for note in sorted(_notes(folder), key=_attempt, reverse=True):
        left = _read(note)
        if left is not None and _goes_on(trial, left):
            _take_up(trial, left)
            note.unlink(missing_ok=True)
            return


def _notes(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if NAME.fullmatch(file.name)]
    except OSError:  # usually there is no folder
        return []


def _attempt(note: Path) -> int:
    match = NAME.fullmatch(note.name)
    assert match is not None
    return int(match[1])


def _read(note: Path) -> PendingReports | None:
    try:
        return PendingReports.model_validate_json(note.read_text())
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the trial goes on from its last recorded checkpoint", note, error)
        return None


def _goes_on(trial: LeasedTrial, left: PendingReports) -> bool:
    """Return whether the trial can continue from the note.

    It has the trial's accumulation, its epoch is not before the recorded checkpoint's, and its file is undamaged.
    """
    claim = trial.lease.claim
    known = claim.checkpoint.epoch if claim.checkpoint else -1
    if left.checkpoint.epoch < known or left.accumulation != claim.accumulation:
        return False
    try:
        with open(left.checkpoint.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == left.checkpoint.digest
    except OSError:
        return False


def _take_up(trial: LeasedTrial, left: PendingReports) -> None:
    client, lease = trial.client, trial.lease
    for step, value, metrics in left.reports:
        trial.write(Report(claim=lease.claim, step=step, value=value, metrics=metrics))
        trial.pruner_says_stop()  # the answer is ignored; the pruner stores the epoch for its decisions on later trials
    client.take_up_checkpoint(lease, left.checkpoint)
    lease.claim = replace(lease.claim, checkpoint=left.checkpoint)
    trial.curve[:] = left.curve
