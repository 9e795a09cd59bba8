"""The fleet of a study: which workers live, where, on which trials, and what was launched."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from hpo.queue import launches
from hpo.queue.launches import Launch
from hpo.storage import sql
from hpo.study.query import worker_rows
from hpo.study.status import RunningTrial, Summary, read
from hpo.study.study import Study


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A living worker."""

    name: str  # under which it holds leases
    host: str
    pid: int
    gpus: str | None  # CUDA_VISIBLE_DEVICES; None without it
    launch: int | None  # None if no engine has started it, as the next
    slot: int | None
    trials: list[int]  # by number
    epochs_per_second: float | None  # over the finished epochs of its trials; None before the first
    silent_seconds: float  # since it was last seen


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The workers and the launches of a study."""

    summary: Summary
    workers: list[Worker]
    launches: list[Launch]


def read_fleet(study: Study) -> Fleet:
    """Return the fleet as the database has it now."""
    summary = read(study).summary
    of_worker: dict[str, list[RunningTrial]] = defaultdict(list)
    for trial in summary.running:
        of_worker[trial.worker].append(trial)
    with sql.reading(study.storage.engine) as connection:
        rows = worker_rows.living_at_posts(connection, study)
    return Fleet(
        summary=summary,
        workers=sorted(
            (_worker(row, of_worker[row.worker]) for row in rows),
            key=lambda one: (one.launch or 0, one.slot or 0, one.name),
        ),
        launches=launches.of_study(study.storage.engine, study.uid),
    )


def _worker(row: Any, trials: list[RunningTrial]) -> Worker:
    timed = [trial.epochs / trial.seconds for trial in trials if trial.epochs and trial.seconds > 0]
    return Worker(
        name=row.worker,
        host=row.host,
        pid=row.pid,
        gpus=row.gpus,
        launch=row.launch,
        slot=row.slot,
        trials=sorted(trial.number for trial in trials),
        epochs_per_second=sum(timed) if timed else None,
        silent_seconds=max(0.0, row.silent),
    )
