"""Pending reports: what a worker could not write during an outage, stored beside a checkpoint for the next attempt.

While the storage fails, a checkpoint and the reports since the last recorded one go into the trial's folder. While a bucket
fails, they stay in the machine's own folder, and a later attempt on this machine finds them. A later
attempt reports these again under its own lease. It asks the pruner epoch by epoch as usual, and continues from there.
Recording a checkpoint deletes older files (`retention.tidy`), so a note that is there is newer than the recorded
checkpoint.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import replace

import pydantic

from hpo.errors import Parked
from hpo.files import atomic_write
from hpo.queue.models import Checkpoint
from hpo.queue.report import Report
from hpo.study import retention
from hpo.study.bucket_store import BucketError
from hpo.study.checkpoint_store import CheckpointStore, digest_of, names_in
from hpo.study.study import trial_name
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
    follows: str | None = None  # digest of that checkpoint, "" if there was none; None in notes of earlier versions
    is_stored: bool = True  # every worker can read the checkpoint's file; if not, only the machine that has the note


def leave(
    store: CheckpointStore,
    trial: LeasedTrial,
    checkpoint: Checkpoint,
    *,
    follows: str | None = None,
    is_stored: bool = True,
) -> str:
    """Write what a later attempt needs, and return the note's name. Raises OSError if the disk does not take it.

    If the checkpoint is not stored, the note stays on this machine too.

    Args:
        store: where the study's checkpoints lie.
        trial: the trial.
        checkpoint: where the trial has come to.
        follows: the digest of the checkpoint that the database has, "" for none; None if it is not known.
        is_stored: whether every worker can read the checkpoint's file.
    """
    claim, since = trial.lease.claim, trial.lease.unrecorded or ()
    left = PendingReports(
        checkpoint=checkpoint,
        accumulation=claim.accumulation,
        curve=trial.curve,
        reports=[(report.step, report.value, dict(report.metrics)) for report in since],
        follows=follows,
        is_stored=is_stored,
    )
    name = f"{trial_name(trial.number)}/attempt-{claim.attempt}-handover.json"
    with atomic_write(store.folder / name) as part:
        part.write_text(left.model_dump_json())
    if is_stored:
        with suppress(BucketError):  # the bucket has said so; another machine goes on from the recorded checkpoint
            store.put(name)
    return name


def take(store: CheckpointStore, trial: LeasedTrial) -> None:
    """Bring a trial just opened to where an earlier attempt left it.

    Raises LostLease if the claim is lost. Raises Parked if what was left cannot be stored at present.
    """
    if trial.lease.claim.attempt == 1:
        return
    for note in sorted(_notes(store, trial_name(trial.number)), key=_attempt, reverse=True):
        left = _read(store, note)
        if left is not None and _goes_on(store, trial, left, note):
            _store(store, trial, left)
            _take_up(trial, left)
            _delete(store, note)
            return


def _notes(store: CheckpointStore, folder: str) -> list[str]:
    try:
        names = store.names(folder, anew=True)
    except OSError:  # a bucket does not answer
        names = names_in(store.folder, folder)
    return [name for name in names if NAME.fullmatch(name.rpartition("/")[2])]


def _attempt(note: str) -> int:
    attempt = retention.attempt_of(note)
    assert attempt is not None
    return attempt


def _read(store: CheckpointStore, note: str) -> PendingReports | None:
    here = store.folder / note
    try:
        return PendingReports.model_validate_json((here if here.exists() else store.get(note)).read_text())
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the trial goes on from its last recorded checkpoint", note, error)
        return None


def _goes_on(store: CheckpointStore, trial: LeasedTrial, left: PendingReports, note: str) -> bool:
    """Return whether the trial can continue from the note.

    It has the trial's accumulation, its epoch is not before the recorded checkpoint's, no other attempt has recorded one
    since, and its file is undamaged.
    """
    claim = trial.lease.claim
    known = claim.checkpoint.epoch if claim.checkpoint else -1
    if left.checkpoint.epoch < known or left.accumulation != claim.accumulation:
        return False
    digest = claim.checkpoint.digest if claim.checkpoint else ""
    is_own = claim.checkpoint is not None and retention.attempt_of(claim.checkpoint.path) == _attempt(note)
    if left.follows not in (None, digest) and not is_own:
        return False
    try:
        file = store.get(store.name_of(left.checkpoint.path), left.checkpoint.digest)
    except OSError:
        return False
    return digest_of(file) == left.checkpoint.digest


def _store(store: CheckpointStore, trial: LeasedTrial, left: PendingReports) -> None:
    """Let every worker read a checkpoint that only this machine has. Raises Parked if a bucket does not take it."""
    if left.is_stored:
        return
    try:
        store.put(store.name_of(left.checkpoint.path))
    except BucketError as error:
        log.warning("trial %d waits with epoch %d on this machine: %s", trial.number, left.checkpoint.epoch, error)
        raise Parked(f"trial {trial.number}: its checkpoint cannot be stored at present") from error


def _delete(store: CheckpointStore, note: str) -> None:
    try:
        store.delete([note])
    except OSError as error:
        log.debug("%s stays for now: %s", note, error)  # the next checkpoint removes it


def _take_up(trial: LeasedTrial, left: PendingReports) -> None:
    client, lease = trial.client, trial.lease
    for step, value, metrics in left.reports:
        trial.write(Report(claim=lease.claim, step=step, value=value, metrics=metrics))
        trial.pruner_says_stop()  # the answer is ignored; the pruner stores the epoch for its decisions on later trials
    client.take_up_checkpoint(lease, left.checkpoint)
    lease.claim = replace(lease.claim, checkpoint=left.checkpoint)
    trial.curve[:] = left.curve
