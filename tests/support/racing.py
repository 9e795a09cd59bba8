"""What the processes of test_beside_optuna.py and test_study.py run: started anew, all at once, each with a storage of its own.

They come from the tests' server of forks, so that a process costs no second of imports.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from hpo.spec.study_file import StudySpec
from hpo.storage import trial_writes
from hpo.storage.connect import connect
from hpo.study import study as studies
from tests.integration.processes import context
from tests.support.waiting import PATIENCE

together: Barrier  # of the processes of one race


@contextmanager
def opened(url: str, kind: str) -> Iterator[BaseStorage]:
    """Open the storage as ours, or as Optuna does: `plain` keeps nothing in memory, `cached` is what a study gets."""
    if kind == "ours":
        place = connect(url)
        try:
            yield place.optuna
        finally:
            place.close()
        return
    plain = RDBStorage(url)
    try:
        yield plain if kind == "plain" else optuna.storages.get_storage(plain)
    finally:
        plain.remove_session()
        plain.engine.dispose()


def race(act: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """Call `act` in as many processes as it is given arguments for, and return what each returned."""
    server, count = context(), len(arguments[0])
    with ProcessPoolExecutor(count, server, initializer=_meet_at, initargs=(server.Barrier(count),)) as pool:
        return list(pool.map(act, *arguments))


def _meet_at(barrier: Barrier) -> None:
    global together
    together = barrier
    gc.freeze()  # as in other forks
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def make_study(url: str, document: dict[str, Any]) -> str:
    """Make a storage and a study in it, at the same moment as the others; return the study's uid."""
    spec = StudySpec.from_document(document)
    together.wait(PATIENCE)
    place = connect(url, create=True)
    try:
        return studies.create_or_join(place, spec, code_folder=Path(spec.checkpoints or ""), code_digest="").uid
    finally:
        place.close()


def race_with_a_kill(url: str, document: dict[str, Any], count: int) -> list[str]:
    """Make one study in as many processes. The first is killed within its transaction, while the others begin.

    Return the study's uid as each of the others got it.
    """
    server = context()
    barrier, found = server.Barrier(count), server.SimpleQueue()
    processes = [
        server.Process(target=_make_or_die, args=(barrier, found, url, document, place == 0)) for place in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, *[0] * (count - 1)]
    return [found.get() for _ in range(count - 1)]


def _make_or_die(barrier: Barrier, found: Any, url: str, document: dict[str, Any], dies: bool) -> None:
    _meet_at(barrier)
    if not dies:
        found.put(make_study(url, document))
        return
    insert = trial_writes.insert_queued

    def insert_and_die(*arguments: Any) -> None:
        insert(*arguments)
        barrier.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)

    trial_writes.insert_queued = insert_and_die  # type: ignore[assignment]
    place = connect(url, create=True)
    spec = StudySpec.from_document(document)
    studies.create_or_join(place, spec, code_folder=Path(spec.checkpoints or ""), code_digest="")


def create(url: str, kind: str, study_id: int, templates: Sequence[FrozenTrial | None]) -> list[tuple[int, int]]:
    """Create a trial of each template; return their ids and numbers."""
    with opened(url, kind) as place:
        together.wait(PATIENCE)
        ids = [place.create_new_trial(study_id, template) for template in templates]
        return [(trial_id, place.get_trial_number_from_id(trial_id)) for trial_id in ids]


def pop(url: str, kind: str, trial_ids: Sequence[int]) -> list[int]:
    """Try to get each of these waiting trials, at the same moment as the others; return those that were got."""
    got = []
    with opened(url, kind) as place:
        for trial_id in trial_ids:
            together.wait(PATIENCE)
            if place.set_trial_state_values(trial_id, TrialState.RUNNING):
                got.append(trial_id)
    return got
