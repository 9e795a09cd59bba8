"""The Postgres that the tests of faults are made with does what they rely on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil  # comes with the package of the test Postgres
import psycopg
import pytest

from tests.support.postgres import PostgresServer
from tests.support.waiting import PATIENCE

MakeServer = Callable[..., PostgresServer]


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """Start a server, removed after the test; keywords go to PostgresServer."""
    with ExitStack() as stack:

        def make(max_connections: int = 20) -> PostgresServer:
            folder = Path(tempfile.mkdtemp(prefix="hpo-pg-", dir="/tmp"))
            return stack.enter_context(PostgresServer(folder, max_connections=max_connections))

        yield make


def connect(url: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(url.replace("postgresql+psycopg", "postgresql"), autocommit=True)


def test_it_keeps_its_data_and_its_url_over_a_crash_and_a_restart(make_server: MakeServer) -> None:
    server = make_server()
    url = server.database("kept")
    with connect(url) as connection:
        connection.execute("CREATE TABLE told (number int)")
        connection.execute("INSERT INTO told VALUES (7)")
        server.stop("immediate")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        connect(url)
    server.start()
    server.restart()
    with connect(url) as connection:
        assert connection.execute("SELECT number FROM told").fetchall() == [(7,)]


def test_it_ends_all_connections_and_takes_new_ones(make_server: MakeServer) -> None:
    server = make_server()
    with connect(server.url) as one, connect(server.url) as other:
        assert server.terminate_backends() == 2
        for connection in (one, other):
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
    with connect(server.url) as connection:
        assert connection.execute("SELECT 1").fetchall() == [(1,)]


def test_it_refuses_too_many_connections(make_server: MakeServer) -> None:
    """It refuses more connections than it may have but not the superuser."""
    server = make_server(max_connections=2)
    with connect(server.url), connect(server.url):
        with pytest.raises(psycopg.OperationalError, match="connection slots"):
            connect(server.url)
        assert server.terminate_backends() == 2


def test_nothing_is_left_of_a_removed_server(make_server: MakeServer) -> None:
    server = make_server()
    first = psutil.Process(server.pid)
    processes = [first, *first.children(recursive=True)]
    assert len(processes) > 1
    with connect(server.url):
        server.remove()
    assert not server.folder.exists()
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    assert alive == []
