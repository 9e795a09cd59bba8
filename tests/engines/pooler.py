"""A real pgbouncer in transaction mode, before a Postgres that tests started."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.engines.needed import program
from tests.support.postgres import ROLE, USER, PostgresServer, free_port
from tests.support.waiting import wait_for

SETTINGS = """
[databases]
* = host=127.0.0.1 port={server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = {server_connections}
max_client_conn = {clients}
logfile = {folder}/pgbouncer.log
pidfile = {folder}/pgbouncer.pid
"""


class Pooler:
    """A running pgbouncer, and the URL under which it serves the database `postgres`."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.process = process
        self.url = f"postgresql+psycopg://{ROLE}@127.0.0.1:{port}/postgres"

    @property
    def answers(self) -> bool:
        """Whether it takes connections."""
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def pooler(server: PostgresServer, *, server_connections: int = 4, clients: int = 500) -> Iterator[Pooler]:
    """Run a pgbouncer before a server, with so many connections to it for each user and database."""
    binary, port = program("pgbouncer", "pgbouncer"), free_port()
    folder = server.folder / f"pooler-{port}"
    folder.mkdir()
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        SETTINGS.format(
            server=server.port, port=port, folder=folder, server_connections=server_connections, clients=clients
        )
    )
    (folder / "users").write_text(f'"{ROLE}" ""\n')
    command = [binary, str(settings)]
    if os.geteuid() == 0:  # it refuses to run as root
        user = pwd.getpwnam(USER)
        os.chown(folder, user.pw_uid, user.pw_gid)
        command[1:1] = ["--user", USER]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running = Pooler(port, process)
    try:
        wait_for(lambda: running.answers)
        yield running
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
