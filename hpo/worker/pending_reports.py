"""What a worker leaves beside a checkpoint that it could not record, for whoever takes the trial up.

When the storage is away, a checkpoint and what was reported since the last recorded one go into the trial's folder. A later
attempt reports that again under its own lease, asking the pruner epoch by epoch as if nothing had happened, and goes on
from there. Whoever records a checkpoint removes what is older (`retention.tidy`), so a note that is there is news.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pydantic

from hpo.queue.models import Checkpoint
from hpo.queue.report import Report
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
NAME = re.compile(r"attempt-(\d{1,9})-handover\.json")


class PendingReports(pydantic.BaseModel):
    """The note: a checkpoint, and what it takes to go on from it."""

    model_config = pydantic.ConfigDict(frozen=True, ser_json_inf_nan="constants")

    checkpoint: Checkpoint
    accumulation: int
    curve: list[float]  # the judged metric, raw, by epoch
    reports: list[tuple[int, float, dict[str, float]]]  # since the last recorded checkpoint: step, value, metrics


def leave(folder: Path, trial: LeasedTrial, checkpoint: Checkpoint, since: Sequence[Report]) -> Path:
    """Write down what a later attempt needs and return the file; OSError if the disk does not take it.

    Args:
        since: what was reported since the last recorded checkpoint.
    """
    claim = trial.lease.claim
    left = PendingReports(
        checkpoint=checkpoint,
        accumulation=claim.accumulation,
        curve=trial.curve,
        reports=[(report.step, report.value, dict(report.metrics)) for report in since],
    )
    note = folder / f"attempt-{claim.attempt}-handover.json"
    part = folder / f".attempt-{claim.attempt}-handover.{os.getpid()}.part"
    with part.open("w") as file:
        file.write(left.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, note)
    return note


def take(folder: Path, trial: LeasedTrial) -> None:
    """Bring a trial just opened to where an earlier attempt left it, if one did; LostLease if it is in other hands."""
    for note in sorted(_notes(folder), key=_attempt, reverse=True):
        left = _read(note)
        if left is not None and _goes_on(trial, left):
            _take_up(trial, left)
            note.unlink(missing_ok=True)
            return


def _notes(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if NAME.fullmatch(file.name)]
    except OSError:  # for the most part: there is no folder
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
    """Say whether the note is of this way of training, from where the trial stands or later, and its file whole."""
    claim = trial.lease.claim
    known = claim.checkpoint.epoch if claim.checkpoint else 0
    if left.checkpoint.epoch < known or left.accumulation != claim.accumulation:
        return False
    try:
        with open(left.checkpoint.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == left.checkpoint.digest
    except OSError:
        return False


def _take_up(trial: LeasedTrial, left: PendingReports) -> None:
    lease = trial.lease
    for step, value, metrics in left.reports:
        trial.write(Report(claim=lease.claim, step=step, value=value, metrics=metrics))
        trial.pruner_says_stop()  # not to obey: what it remembers of the epoch is what later trials are held against
    lease.flush()
    lease.retry(lambda: lease.ledger.record_checkpoint(lease.claim, left.checkpoint))
    lease.claim = replace(lease.claim, checkpoint=left.checkpoint)
    trial.curve[:] = left.curve
