"""Decides which checkpoint files stay: those of open trials, and those of the best finished trials."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path

from hpo.spec.objectives import NOTHING, Beside
from hpo.study.checkpoint_store import CheckpointStore
from hpo.study.query import ranking, trial_columns
from hpo.study.study import Study, trial_name

log = logging.getLogger(__name__)
OF_TRIAL = re.compile(r"trial-(\d{6,9})")
OF_ATTEMPT = re.compile(r"\.?attempt-(\d+)-.*")  # starts with a dot while it is written


def file_name(attempt: int, epoch: int, stamp: int) -> str:
    """Return the name of a checkpoint file. No two workers write the same one: each attempt is one worker's."""
    return f"attempt-{attempt}-epoch-{epoch}-{stamp}.pt"


def attempt_of(name: str) -> int | None:
    """Return the attempt that wrote a file, None for a file of another kind."""
    match = OF_ATTEMPT.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else None


def tidy(store: CheckpointStore, folder: str, attempt: int, keep: Collection[str], *, anew: bool = False) -> None:
    """Remove the checkpoint files of this and of earlier attempts from a trial's folder, except `keep`.

    Earlier attempts can record nothing any more. Files of later attempts stay.

    Args:
        store: where the study's checkpoints lie.
        folder: the name of the trial's folder.
        attempt: the number of this attempt.
        keep: names of files in the store.
        anew: look for files of which this process does not know.
    """
    found = {name: attempt_of(name) for name in store.names(folder, anew=anew)}
    store.delete(name for name, of in found.items() if of is not None and of <= attempt and name not in keep)


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
        study.store.delete_trial(folder.name)
    return removed


def stale(study: Study) -> list[Path]:
    """Return the folders of settled trials whose checkpoints are not kept. Empty if the checkpoints cannot be listed."""
    settled = _settled(study)  # read first, likewise
    leading = _stored_leaders(study) if settled else set()
    return [folder for number, folder in settled.items() if number not in leading]


def _settled(study: Study) -> dict[int, Path]:
    """Return {number: folder} of settled trials that have a folder."""
    try:
        names = study.store.trials()
    except OSError as error:
        if not study.store.is_away:  # else it has said so itself
            log.warning("%s cannot be read: %s", study.store.place, error)
        return {}
    numbers = sorted(int(match[1]) for name in names if (match := OF_TRIAL.fullmatch(name)))
    folders = {number: study.trial_folder(number) for number in numbers if trial_name(number) in names}
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
