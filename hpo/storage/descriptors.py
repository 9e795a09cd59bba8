"""Watches the file descriptors of database connections, since user code may close descriptors that it does not own.

The next opened file gets the number of a closed descriptor. The database's driver does not notice, and SQLite would
write its pages into that file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from hpo.storage.sqlite_file import Identity, companions, identity


def watch(engine: sa.Engine, lost: Callable[[], None]) -> None:
    """Call `lost` before a connection is used whose descriptors have changed since it was opened.

    Idle connections are closed now, since their descriptors are not known.
    """
    one_by_one = threading.Lock()
    open_one = engine.pool._invoke_creator

    def connect(connection_record: Any) -> Any:
        with one_by_one:
            _open_standard_ones()
            before = _identities()
            made = open_one(connection_record)
            connection_record.info["descriptors"] = _descriptors_of(made, engine.url, before)
        return made

    def check(connection: Any, record: Any, proxy: Any) -> None:  # noqa: ARG001  (SQLAlchemy passes all three)
        if any(identity(number) != known for number, known in record.info.get("descriptors", {}).items()):
            lost()

    engine.pool._creator = connect  # type: ignore[assignment]  # SQLAlchemy accepts one argument too
    sa.event.listen(engine, "checkout", check, insert=True)  # before `_ping`, which writes to the connection
    engine.dispose()


def _descriptors_of(connection: Any, url: sa.URL, before: dict[int, Identity]) -> dict[int, Identity]:
    """Return the descriptors of a new connection. SQLite does not tell them: they are new ones on its files."""
    if url.get_backend_name() != "sqlite":
        number = connection.fileno()
        return {number: found} if (found := identity(number)) else {}
    connection.execute("PRAGMA journal_mode=WAL")  # opens the files beside the database
    database = str(url.database)
    files = {identity(path) for path in (database, *companions(database))}
    return {number: found for number, found in _identities().items() if found in files and before.get(number) != found}


def _open_standard_ones() -> None:
    """Open closed standard streams on the null device. Else a connection gets their number, and prints go into it."""
    for number in range(3):
        if identity(number) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def _identities() -> dict[int, Identity]:
    numbers = [int(name) for name in os.listdir("/dev/fd")]
    return {number: found for number in numbers if (found := identity(number))}
