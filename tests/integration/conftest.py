"""Fixtures of the tests that start processes: studies, processes of workers, a shell, a Postgres to stop and start."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpo.storage.connect import Storage
from hpo.study.study import Study
from tests.integration.digits import made
from tests.integration.processes import WorkerProcesses
from tests.integration.shell import Shell
from tests.support.postgres import PostgresServer
from tests.support.trials import MakeStudy


@pytest.fixture
def make_digits(place: Storage, tmp_path: Path) -> MakeStudy:
    """Make a study that trains the digits; keywords go into its document."""
    return lambda trials, **changes: made(place, tmp_path, trials, **changes)


@pytest.fixture
def hire(tmp_path: Path) -> Iterator[Callable[[Study], WorkerProcesses]]:
    """Start processes of workers for a study; none of them outlives the test."""
    groups = []

    def processes_of(study: Study) -> WorkerProcesses:
        folder = tmp_path / f"logs-{len(groups)}"
        folder.mkdir()
        groups.append(WorkerProcesses(study, folder))
        return groups[-1]

    yield processes_of
    for processes in groups:
        processes.end()


@pytest.fixture
def shell(tmp_path: Path, url: str) -> Iterator[Shell]:
    found = Shell(tmp_path, url)
    yield found
    for process in found.running:
        process.kill()
        process.communicate()


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A Postgres of the test's own, to stop and to start."""
    folder = Path(tempfile.mkdtemp(prefix="hpo-pg-", dir="/tmp"))
    with PostgresServer(folder) as running:
        yield running
