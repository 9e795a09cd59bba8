"""Which checkpoint files stay: the last one of a trial that is still open, and that of the best finished trials."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.spec.objectives import NOTHING, Beside
from hpo.storage.tables import hpo_trials, trials
from hpo.study import pareto, query
from hpo.study.study import Study

log = logging.getLogger(__name__)
OF_TRIAL = re.compile(r"trial-(\d{6,9})")
OF_ATTEMPT = re.compile(r"\.?attempt-(\d+)-.*")  # a file of an attempt; with a dot in front while it is written


def file_name(attempt: int, epoch: int, stamp: int) -> str:
    """Return the name of a checkpoint file: no two workers ever write the same one."""
    return f"attempt-{attempt}-epoch-{epoch}-{stamp}.pt"


def tidy(folder: Path, attempt: int, keep: Collection[Path]) -> None:
    """Remove what this attempt and the ones before it left in a trial's folder, but for these files.

    Earlier attempts can record nothing any more; what a later one has written is not touched.
    """
    for file in folder.iterdir() if folder.exists() else ():
        match = OF_ATTEMPT.fullmatch(file.name)
        if match and int(match[1]) <= attempt and file not in keep:
            file.unlink(missing_ok=True)


def is_kept(study: Study, number: int, value: float, beside: Beside = NOTHING) -> bool:
    """Say whether a trial that ends so is among those whose checkpoint is kept.

    Args:
        value: of the first objective.
        beside: what else it ends with.
    """
    violation = sum(violation for violation in beside.constraints.values() if violation > 0)
    return number in leaders(study, with_end=(number, (value, *beside.values), violation))


def leaders(study: Study, with_end: tuple[int, tuple[float, ...], float] | None = None) -> list[int]:
    """Return the numbers of the COMPLETE trials whose checkpoints are kept, the best one first; of equal ones the lower number
    leads.

    Those are the best ones, `recovery.keep_checkpoints` at most; of several objectives all on the front, unless that is 0.

    Args:
        with_end: number, values and violation of a trial that is about to be COMPLETE.
    """
    goals, keep = study.spec.goals, study.spec.recovery.keep_checkpoints
    if not keep:
        return []
    columns = study.storage.optuna.columns(study.study_id, anew=True)
    complete = np.flatnonzero(columns.states == TrialState.COMPLETE.value)
    numbers, violations = columns.numbers[complete], columns.violations[complete]
    values = np.stack([columns.values_of(objective)[complete] for objective in range(len(goals.names))], axis=1)
    if with_end is not None:
        number, own, violation = with_end
        numbers, violations = np.append(numbers, number), np.append(violations, violation)
        values = np.append(values, [own], axis=0)
    found: list[int] = numbers[pareto.best_trials(goals, numbers, values, violations)].tolist()
    return found if goals.are_several else found[:keep]


def delete_stale(study: Study) -> list[Path]:
    """Remove the folders of settled trials that do not lead, and return them; also what a killed worker left of them."""
    settled = _settled(study)  # read first: a trial that ends as the best in between is not among them
    leading = set(leaders(study)) if settled else set()
    removed = [folder for number, folder in settled.items() if number not in leading]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def stale(study: Study) -> list[Path]:
    """Return the folders of settled trials that do not lead; none if the folder of checkpoints cannot be read."""
    settled = _settled(study)  # read first, likewise
    leading = _stored_leaders(study) if settled else set()
    return [folder for number, folder in settled.items() if number not in leading]


def _settled(study: Study) -> dict[int, Path]:
    """Return the folders of settled trials by number."""
    try:
        found = [match for file in study.checkpoints.iterdir() if (match := OF_TRIAL.fullmatch(file.name))]
    except OSError as error:
        log.warning("%s cannot be read: %s", study.checkpoints, error)
        return {}
    folders = {number: study.trial_folder(number) for number in sorted(int(match[1]) for match in found)}
    folders = {number: folder for number, folder in folders.items() if folder.exists()}
    if not folders:
        return {}
    ours = sa.select(trials.c.number).join(hpo_trials, hpo_trials.c.trial_id == trials.c.trial_id)
    with study.storage.engine.connect() as connection:
        settled = set(
            connection.execute(
                ours.where(
                    hpo_trials.c.study_uid == study.uid,
                    hpo_trials.c.settled.is_(True),
                    trials.c.study_id == study.study_id,
                    trials.c.number.in_(folders),
                )
            ).scalars()
        )
    return {number: folder for number, folder in folders.items() if number in settled}


def _stored_leaders(study: Study) -> set[int]:
    """Return the numbers of `leaders` by the database alone: who only looks has no columns of all trials yet."""
    keep = study.spec.recovery.keep_checkpoints
    if not keep:
        return set()
    with study.storage.engine.connect() as connection:
        if query.is_plain(study):
            return {row.number for row in query.ranked(connection, study, keep)}
        found = query.best_trials(connection, study)
    return {row.number for row in (found if study.spec.goals.are_several else found[:keep])}
