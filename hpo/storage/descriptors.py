"""The descriptors by which a process reaches its database, watched: user code may close what it does not own.

The number of a closed descriptor goes to the next file that is opened. The database's driver knows nothing of that, and SQLite
would write its pages into that file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from hpo.storage.sqlite_file import Identity, companions, identity


def watch(engine: sa.Engine, lost: Callable[[], None]) -> None:
    """Call `lost` before a connection is used whose descriptors are not what they were when it was opened.

    Connections that are idle now are closed, since nobody knows which descriptors are theirs.
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

    engine.pool._creator = connect  # type: ignore[assignment]  # of one argument, which SQLAlchemy takes as well
    sa.event.listen(engine, "checkout", check, insert=True)  # before a ping, which writes to it
    engine.dispose()


def _descriptors_of(connection: Any, url: sa.URL, before: dict[int, Identity]) -> dict[int, Identity]:
    """Return the descriptors of a new connection; of SQLite's those that were not open before, for it does not tell."""
    if url.get_backend_name() != "sqlite":
        number = connection.fileno()
        return {number: found} if (found := identity(number)) else {}
    connection.execute("PRAGMA journal_mode=WAL")  # which opens its other files
    database = str(url.database)
    files = {identity(path) for path in (database, *companions(database))}
    return {number: found for number, found in _identities().items() if found in files and before.get(number) != found}


def _open_standard_ones() -> None:
    """Let no connection get the number of a standard stream that user code has closed: what is printed would go there."""
    for number in range(3):
        if identity(number) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _identities() -> dict[int, Identity]:
    numbers = [int(name) for name in os.listdir("/dev/fd")]
    return {number: found for number in numbers if (found := identity(number))}
