"""Which checkpoint files stay: the last one of a trial that is still open, and that of the best finished trials."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import sqlalchemy as sa

from hpo import rows
from hpo.study import Study
from hpo.tables import hpo_trials, trials

log = logging.getLogger(__name__)
OF_ATTEMPT = re.compile(r"\.?attempt-(\d+)-")  # a file of an attempt; with a dot in front while it is written


def file_name(attempt: int, epoch: int, stamp: int) -> str:
    """Return the name of a checkpoint file: no two workers ever write the same one."""
    return f"attempt-{attempt}-epoch-{epoch}-{stamp}.pt"


def tidy(folder: Path, attempt: int, keep: Path) -> None:
    """Remove what this attempt and the ones before it left in a trial's folder, but for the file recorded just now.

    Earlier attempts can record nothing any more; what a later one has written is not touched.
    """
    for file in folder.iterdir() if folder.exists() else ():
        match = OF_ATTEMPT.match(file.name)
        if match and int(match[1]) <= attempt and file != keep:
            file.unlink(missing_ok=True)


def leads(study: Study, value: float) -> bool:
    """Say whether a trial that ends with this value is among those whose checkpoint is kept."""
    keep = study.spec.recovery.keep_checkpoints
    if not keep:
        return False
    with study.storage.engine.connect() as connection:
        best = rows.ranked(connection, study, keep)
    if len(best) < keep:
        return True
    last = rows.value_of(best[-1])
    return value > last if study.spec.direction == "maximize" else value < last


def sweep(study: Study) -> list[Path]:
    """Remove the folders of settled trials that do not lead, and return them; also what a killed worker left of them."""
    removed = stale(study)
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def stale(study: Study) -> list[Path]:
    """Return the folders of settled trials that do not lead."""
    folders = {int(folder.name.removeprefix("trial-")): folder for folder in study.checkpoints.glob("trial-[0-9]*")}
    if not folders:
        return []
    with study.storage.engine.connect() as connection:
        leading = {row.number for row in rows.ranked(connection, study, study.spec.recovery.keep_checkpoints)}
        settled = connection.execute(
            sa.select(trials.c.number)
            .join(hpo_trials, hpo_trials.c.trial_id == trials.c.trial_id)
            .where(hpo_trials.c.study_uid == study.uid, hpo_trials.c.settled.is_(True), trials.c.number.in_(folders))
        )
        return [folders[number] for (number,) in settled if number not in leading]
