"""The storage taken away from running workers and given back: a pause, in which training goes on and nobody dies."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.storage import engine
from hpo.storage.connect import Storage, connect
from hpo.study.study import Study
from tests.integration.digits import alone, assert_finished_once, made
from tests.integration.processes import WorkerProcesses, curves, failures, reported, rows, trials_of
from tests.integration.shell import Shell
from tests.support.postgres import PostgresServer
from tests.support.waiting import wait_for


def assert_nothing_happened(
    study: Study, processes: WorkerProcesses, codes: list[int | None], number_of_trials: int
) -> None:
    """No worker died, no trial was taken up twice, every curve is whole and right: as if there had been no fault."""
    assert codes == [0] * len(codes), processes.said[-3000:]
    assert_finished_once(study, processes, number_of_trials)
    assert [row.attempt for row in rows(study)] == [1] * number_of_trials
    assert {trial.state for trial in trials_of(study)} == {TrialState.COMPLETE}
    assert failures(study) == []
    for number, found in curves(study).items():
        assert found == alone(study, number), number


def test_postgres_stopped_amid_a_study_is_a_pause(
    server: PostgresServer, tmp_path: Path, hire: Callable[[Study], WorkerProcesses]
) -> None:
    place = connect(server.url, create=True)
    study = made(place, tmp_path, 3, training={"epochs": 24, "batch_size": 32}, recovery={"lease": "8s"})
    processes = hire(study)
    workers = [processes.start() for _ in range(3)]
    wait_for(lambda: reported(study) >= 6 and processes.said.count("joined study") == len(workers))
    before = curves(study)
    server.stop("immediate")
    time.sleep(10.0)  # longer than a lease
    server.start()
    codes = processes.leave(workers)
    assert_nothing_happened(study, processes, codes, 3)
    for number, found in before.items():  # what was acknowledged is still there
        for metric, values in found.items():
            assert curves(study)[number][metric][: len(values)] == values
    assert "the storage fails, training goes on" in processes.said
    place.close()


def test_backends_terminated_amid_a_study_are_not_noticed(
    server: PostgresServer,
    tmp_path: Path,
    hire: Callable[[Study], WorkerProcesses],
    request: pytest.FixtureRequest,
) -> None:
    place = connect(server.url, create=True)
    request.addfinalizer(place.close)
    study = made(place, tmp_path, 3, training={"epochs": 60, "batch_size": 32}, recovery={"lease": "60s"})
    processes = hire(study)
    workers = [processes.start() for _ in range(3)]
    wait_for(lambda: processes.said.count("joined study") == len(workers))
    for epochs in (4, 16, 32):
        # Each worker and this process hold a connection again. A worker that waits for its next try holds none.
        wait_for(lambda epochs=epochs: reported(study) >= epochs and server.clients() > len(workers))
        assert server.terminate_backends() >= len(workers)
    codes = processes.leave(workers)
    place.close()  # this process's own connections were cut as well
    assert_nothing_happened(study, processes, codes, 3)


def test_more_workers_than_postgres_has_connections_wait_for_their_turn(
    tmp_path: Path, hire: Callable[[Study], WorkerProcesses]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="hpo-pg-", dir="/tmp"))
    with PostgresServer(folder, max_connections=6) as running:
        place = connect(running.url, create=True)
        study = made(place, tmp_path, 4, recovery={"lease": "60s"})
        place.close()  # its connections are for the workers, who need eight
        processes = hire(study)
        with running.connections(6):
            workers = [processes.start() for _ in range(4)]
            wait_for(lambda: "connection slots" in processes.said or "too many clients" in processes.said)
        assert_nothing_happened(study, processes, processes.leave(workers), 4)
        place.close()


def test_a_run_with_too_many_workers_is_refused(tmp_path: Path) -> None:
    """A run with more workers than Postgres can carry is refused with the numbers."""
    folder = Path(tempfile.mkdtemp(prefix="hpo-pg-", dir="/tmp"))
    with PostgresServer(folder, max_connections=6) as running:
        shell = Shell(tmp_path, running.url)
        shell.write("def objective(trial):\n    return 1.0\n", trials=2)
        said = shell.forked("run", "own.toml", "--workers", "8", code=2)
        assert "8 workers and this process take up to 18 connections" in said
        assert "start at most 2 workers, or raise max_connections" in said
        assert "0 of 2 finished" in shell.forked("status", "own")  # nothing was started
        shell.forked("run", "own.toml", "--workers", "2")
        assert "2 of 2 finished" in shell.forked("status", "own")


@pytest.fixture
def sqlite_place(tmp_path: Path) -> Iterator[Storage]:
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    yield place
    place.close()


def test_sqlite_locked_for_longer_than_a_lease_and_the_busy_timeout_is_a_pause(
    sqlite_place: Storage, tmp_path: Path, hire: Callable[[Study], WorkerProcesses]
) -> None:
    study = made(sqlite_place, tmp_path, 2, training={"epochs": 30, "batch_size": 32}, recovery={"lease": "4s"})
    busy = 3.0  # seconds; of the product's own, a test need not wait out all
    assert busy < engine.BUSY_SECONDS
    processes = hire(study)
    workers = [processes.start(busy_seconds=busy) for _ in range(2)]
    wait_for(lambda: reported(study) >= 4)
    holder = sqlite3.connect(tmp_path / "studies.db", timeout=30, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    time.sleep(busy + 3.0)
    holder.execute("ROLLBACK")
    holder.close()
    assert_nothing_happened(study, processes, processes.leave(workers), 2)
    assert "database is locked" in processes.said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_that_is_freed_again_is_a_pause(
    small_disk: Path, tmp_path: Path, hire: Callable[[Study], WorkerProcesses]
) -> None:
    place = connect(f"sqlite:///{small_disk}/studies.db", create=True)
    study = made(
        place,
        small_disk,
        2,
        training={"epochs": 30, "batch_size": 32},
        recovery={"lease": "4s", "checkpoint_every": "0s"},
    )
    processes = hire(study)
    workers = [processes.start() for _ in range(2)]
    wait_for(lambda: reported(study) >= 4)
    before = curves(study)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"\0" * 4096)
            except OSError:
                break
    wait_for(lambda: "disk is full" in processes.said or "No space left" in processes.said)
    time.sleep(6.0)  # a lease and a half
    ballast.unlink()
    assert_nothing_happened(study, processes, processes.leave(workers), 2)
    for number, found in before.items():
        for metric, values in found.items():
            assert curves(study)[number][metric][: len(values)] == values
    assert "the storage fails" in processes.said
    place.close()


def test_a_storage_away_for_longer_than_the_patience_leaves_the_trial_where_it_was(
    server: PostgresServer, tmp_path: Path, hire: Callable[[Study], WorkerProcesses]
) -> None:
    place = connect(server.url, create=True)
    recovery = {"lease": "2s", "outage_patience": "2s", "checkpoint_every": "30s"}
    study = made(place, tmp_path, 1, training={"epochs": 2000, "batch_size": 64}, recovery=recovery)
    processes = hire(study)
    worker = processes.start()
    wait_for(lambda: reported(study) >= 4)
    server.stop("immediate")
    assert processes.leave([worker]) == [2]
    server.start()
    known = reported(study)
    last = processes.start()
    wait_for(lambda: any(row.attempt == 2 for row in rows(study)))
    wait_for(lambda: (rows(study)[0].checkpoint_epoch or 0) > known)  # further than what the storage had heard of
    assert last.pid is not None
    os.kill(last.pid, signal.SIGTERM)
    assert processes.leave([last]) == [128 + signal.SIGTERM]
    assert curves(study)[0] == alone(study, 0)
    place.close()
