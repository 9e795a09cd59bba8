"""What a worker leaves beside a checkpoint that it could not record, for whoever takes the trial up.

When the storage is away, a checkpoint and what was reported since the last recorded one go into the trial's folder. The
next attempt reports that again under its own lease and goes on from there; any other attempt does not look at it.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

from hpo.lease import Lease
from hpo.ledger import Checkpoint, Claim, Report

log = logging.getLogger(__name__)


def leave(folder: Path, lease: Lease, checkpoint: Checkpoint) -> None:
    """Write down what the next attempt needs; OSError if that cannot be written."""
    reports = [[report.step, report.value, dict(report.metrics)] for report in lease.since_checkpoint]
    text = json.dumps({"checkpoint": asdict(checkpoint), "reports": reports})
    part = folder / f".{os.getpid()}.part"
    part.write_text(text)
    os.replace(part, note(folder, lease.claim.attempt))


def note(folder: Path, attempt: int) -> Path:
    """Return where an attempt leaves what it could not record."""
    return folder / f"attempt-{attempt}-handover.json"


def take(folder: Path, lease: Lease) -> Claim:
    """Report what the attempt before this one left, and return the claim with its checkpoint; else the claim as it is.

    LostLease if the trial is in other hands meanwhile.
    """
    claim = lease.claim
    file = note(folder, claim.attempt - 1)
    try:
        left = json.loads(file.read_text())
        checkpoint = Checkpoint(**left["checkpoint"])
        reports = [
            Report(claim=claim, step=step, value=value, metrics=metrics) for step, value, metrics in left["reports"]
        ]
    except FileNotFoundError:
        return claim
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning(
            "trial %d: %s cannot be read (%s); it goes on from its last recorded checkpoint", claim.number, file, error
        )
        return claim
    if (claim.checkpoint is not None and checkpoint.epoch <= claim.checkpoint.epoch) or not Path(
        checkpoint.path
    ).exists():
        return claim
    lease.ledger.report(reports)
    lease.ledger.record_checkpoint(claim, checkpoint)
    return replace(claim, checkpoint=checkpoint)
