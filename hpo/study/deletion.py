"""Deletes a study: its rows in Optuna's tables and in ours, and its folder of checkpoints and logs."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import psutil

from hpo.errors import StudyError
from hpo.storage import sql, study_rows
from hpo.study.query import recorded, trouble, worker_rows
from hpo.study.study import Study
from hpo.text import command


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a study consists of."""

    trials: int
    openings: int  # records of openings of the test split
    place: str | None  # of checkpoints; None if it is not this study's, or not seen from here
    unseen: str = ""  # the place in that case
    checkpoints: int = 0
    logs: int = 0
    size: int = 0  # bytes of all files there

    @property
    def text(self) -> str:
        """The holdings in words."""
        rows = _counted(self.trials, "trial")
        if self.openings:
            rows += f", {_counted(self.openings, 'record')} of an opened test split"
        if self.place is None:
            return f"{rows}; its checkpoints are not seen in {self.unseen}, so what is there stays"
        files = f"{_counted(self.checkpoints, 'checkpoint')} and {_counted(self.logs, 'log')}"
        return f"{rows}; {files} in {self.place} ({self.size / 2**20:.1f} MiB)"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def holdings(study: Study) -> Holdings:
    """Return what a study consists of."""
    with study.storage.engine.connect() as connection:
        trials = study_rows.count_trials(connection, study.study_id)
        openings = recorded.count_openings(connection, study)
    if not study.sees_checkpoints:
        return Holdings(trials=trials, openings=openings, place=None, unseen=study.store.place)
    sizes = study.store.sizes()
    return Holdings(
        trials=trials,
        openings=openings,
        place=study.store.place,
        checkpoints=sum(name.endswith(".pt") for name in sizes),
        logs=sum(file.is_file() for file in study.logs.iterdir()) if study.logs.is_dir() else 0,
        size=sum(sizes.values()),
    )


def refuse_if_at_work(study: Study, connection: sql.Connection | None = None) -> None:
    """Raise StudyError if workers are at work on the study."""
    if connection is None:
        with study.storage.engine.connect() as opened:
            return refuse_if_at_work(study, opened)
    working = [row for row in worker_rows.living_workers(connection, study) if not _is_dead_here(row.host, row.pid)]
    if working:
        raise StudyError(
            f"study {study.name!r}: {len(working)} of its workers are alive, such as {working[0].worker}; "
            f"end them by Ctrl-C, or by `{command('stop', study.name, options='--now')}`. One on another machine that is gone "
            f"counts for {study.spec.recovery.lease} more"
        )
    for held in trouble.held_elsewhere(study):  # on SQLite this machine cannot see whether such a worker lives
        raise StudyError(
            f"study {study.name!r}: trial {held.number} is held by {held.worker} on another machine; end that worker, or if "
            f"it is gone: `{command('doctor', study.name, options=f'--release {held.number}')}`"
        )
    return None


def _is_dead_here(host: str, pid: int) -> bool:
    return host == platform.node() and not psutil.pid_exists(pid)


def delete(study: Study) -> None:
    """Delete a study for good. Raises StudyError if workers are at work on it or the folder cannot be removed."""
    with sql.writing(study.storage.engine) as connection:
        row = study_rows.lock_and_read(connection, study.study_id)
        if row is None or row.uid != study.uid:
            raise StudyError(f"study {study.name!r} was deleted")
        refuse_if_at_work(study, connection)
        study_rows.delete(connection, study.study_id)
        study_rows.delete_ours(connection, study.uid)
    if study.sees_checkpoints:
        try:
            study.store.delete_all()
        except OSError as error:
            raise StudyError(
                f"study {study.name!r} is deleted, but its checkpoints are not: {error.strerror}; remove {study.store.place}"
            ) from None
