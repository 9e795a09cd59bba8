"""Decides which checkpoint files stay: those of open trials, and those of the best finished trials."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from hpo.spec.objectives import NOTHING, Beside
from hpo.study.query import ranking, trial_columns
from hpo.study.study import Study

log = logging.getLogger(__name__)
OF_TRIAL = re.compile(r"trial-(\d{6,9})")
OF_ATTEMPT = re.compile(r"\.?attempt-(\d+)-.*")  # starts with a dot while it is written


def file_name(attempt: int, epoch: int, stamp: int) -> str:
    """Return the name of a checkpoint file. No two workers write the same one: each attempt is one worker's."""
    return f"attempt-{attempt}-epoch-{epoch}-{stamp}.pt"


def tidy(folder: Path, attempt: int, keep: Collection[Path]) -> None:
    """Remove the checkpoint files of this and of earlier attempts from a trial's folder, except `keep`.

    Earlier attempts can record nothing any more. Files of later attempts stay.
    """
    for file in folder.iterdir() if folder.exists() else ():
        match = OF_ATTEMPT.fullmatch(file.name)
        if match and int(match[1]) <= attempt and file not in keep:
            file.unlink(missing_ok=True)


def is_kept(study: Study, number: int, value: float, beside: Beside = NOTHING) -> bool:
    """Return whether the checkpoint of a trial that is about to be COMPLETE is kept.

    Args:
        study: the study.
        number: the trial's number.
        value: its value of the first objective.
        beside: its other values and its constraints.
    """
    violation = sum(violation for violation in beside.constraints.values() if violation > 0)
    return number in leaders(study, with_end=(number, (value, *beside.values), violation))


def leaders(study: Study, with_end: tuple[int, tuple[float, ...], float] | None = None) -> list[int]:
    """Return the numbers of the COMPLETE trials whose checkpoints are kept, the best first.

    Ties go to the lower number. These are the `recovery.keep_checkpoints` best trials. With several objectives, they
    are all on the Pareto front, or none if that setting is 0.

    Args:
        study: the study.
        with_end: number, values and violation of a trial that is about to be COMPLETE.
    """
    import numpy as np  # in a worker both are loaded already
    from optuna.trial import TrialState

    from hpo.study import pareto

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
    """Remove and return the folders of settled trials whose checkpoints are not kept."""
    settled = _settled(study)  # read first: a trial that ends meanwhile is not among them
    leading = set(leaders(study)) if settled else set()
    removed = [folder for number, folder in settled.items() if number not in leading]
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def stale(study: Study) -> list[Path]:
    """Return the folders of settled trials whose checkpoints are not kept. Empty if the checkpoint folder cannot be read."""
    settled = _settled(study)  # read first, likewise
    leading = _stored_leaders(study) if settled else set()
    return [folder for number, folder in settled.items() if number not in leading]


def _settled(study: Study) -> dict[int, Path]:
    """Return {number: folder} of settled trials that have a folder."""
    try:
        found = [match for file in study.checkpoints.iterdir() if (match := OF_TRIAL.fullmatch(file.name))]
    except OSError as error:
        log.warning("%s cannot be read: %s", study.checkpoints, error)
        return {}
    folders = {number: study.trial_folder(number) for number in sorted(int(match[1]) for match in found)}
    folders = {number: folder for number, folder in folders.items() if folder.exists()}
    if not folders:
        return {}
    with study.storage.engine.connect() as connection:
        settled = trial_columns.settled(connection, study, folders)
    return {number: folder for number, folder in folders.items() if number in settled}


def _stored_leaders(study: Study) -> set[int]:
    """Return the numbers of `leaders` from plain queries, without loading all trials into columns."""
    keep = study.spec.recovery.keep_checkpoints
    if not keep:
        return set()
    with study.storage.engine.connect() as connection:
        if ranking.is_plain(study):
            return {row.number for row in ranking.ranked(connection, study, keep)}
        found = ranking.best_trials(connection, study)
    return {row.number for row in (found if study.spec.goals.are_several else found[:keep])}
