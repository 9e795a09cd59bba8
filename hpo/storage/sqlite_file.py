"""The SQLite file of an engine, identified by device and inode. A file that was put in its place is left alone.

A connection keeps the file that it opened, even if the path changes. But SQLite finds the write-ahead log by its path.
So another file at that path would be overwritten from the log of the old one.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sqlite3
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import sqlalchemy as sa

from hpo.errors import StorageGone

HANDED_ON = "HPO_SQLITE_FILE"  # tells child processes which file is open
COMPANIONS = ("-wal", "-shm")  # beside the file while a connection is open
LOOK_SECONDS = 1.0  # between two checks of the companions
WAL_VERSIONS = b"\2\2"  # bytes 18 and 19 of a file in write-ahead mode
SAVE_SECONDS = 2.0  # how long the last checkpoint into a gone file waits for other processes
Identity = tuple[int, int]  # of a file or socket: device and inode


class SqliteFile:
    """One file, opened by as many connections as its process needs."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open nothing yet.

        Args:
            create: make the file if it is not there.
        """
        self.path = str(path)
        self._companions = companions(self.path)
        self._create = create
        self.is_read_only = False  # see `read_only`
        self._known = _handed_on(self.path)
        self._found_gone: StorageGone | None = None  # stays set, whatever is put at the path later

    def open(self, *, timeout: float, isolation_level: Literal["IMMEDIATE"] | None) -> sqlite3.Connection:
        """Return a connection, as `sqlite3.connect`. Raises StorageGone if the file is not the one opened before."""
        self._look()
        connection = sqlite3.connect(
            f"file:{quote(self.path)}?{self._access()}",
            uri=True,
            timeout=timeout,
            isolation_level=isolation_level,
            check_same_thread=False,  # the pool hands it to other threads
        )
        self._known = self._known or identity(self.path)
        try:
            self._look()  # again: the file may have been replaced meanwhile
        except StorageGone:
            connection.close()  # nothing was read yet, so the companions are untouched
            raise
        return connection

    def _access(self) -> str:
        if self.is_read_only:
            return "mode=ro&immutable=1" if self._is_closed() else "mode=ro"
        return "mode=rwc" if self._create and self._known is None else "mode=rw"

    def read_only(self) -> None:
        """From now on open the file only for reading, if the file or its folder may not be written."""
        real = os.path.realpath(self.path)
        self.is_read_only = not all(
            os.access(path, os.W_OK, effective_ids=True) for path in (real, os.path.dirname(real))
        )

    def _is_closed(self) -> bool:
        """Return whether the file is in write-ahead mode and no process has it open.

        SQLite then makes the companions even for a read. Where it may not, `immutable` reads the file without them.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(18)
                return file.read(2) == WAL_VERSIONS and not all(map(os.path.exists, self._companions))
        except OSError:  # SQLite cannot read it either, and says so
            return False

    @property
    def unread(self) -> str | None:
        """A warning about what a reading connection does not see, None if it sees everything."""
        log = self._companions[0]
        if not (self.is_read_only and self._is_closed() and os.path.exists(log) and os.path.getsize(log)):
            return None
        return (
            f"{log} may hold the last changes and is not read, since SQLite cannot write beside it; "
            "copy both files into a folder of your own to see all"
        )

    def _look(self) -> None:
        if self._found_gone is None and self._known is not None and _is_gone(self.path, self._known):
            self._found_gone = self._gone(self.path)
        if self._found_gone is not None:
            raise self._found_gone

    def check(self, connection: sqlite3.Connection, record: Any, proxy: object) -> None:  # noqa: ARG002  (SQLAlchemy passes all three)
        """Check a connection before use. Raises StorageGone if its files are not at their paths.

        The file is checked each time, which takes a few microseconds. Its companions are checked once a second.
        """
        beside: dict[str, Identity] = record.info.setdefault("beside", {})  # companions that this connection has open
        try:
            self._look()
            if self.is_read_only:
                self._look_for_writers(record)
            elif time.monotonic() - record.info.get("looked_at", -math.inf) >= LOOK_SECONDS:
                record.info["looked_at"] = time.monotonic()
                self._look_beside(beside)
        except StorageGone:
            self._save(connection, beside)
            raise

    def _look_for_writers(self, record: Any) -> None:
        """Let the pool open the file again after a write: SQLite assumes that an immutable file never changes."""
        found = os.stat(self.path)
        state = (found.st_mtime_ns, found.st_size) if self._is_closed() else None
        if record.info.setdefault("state", state) != state:
            raise sa.exc.DisconnectionError(f"{self.path} was written to")

    def _look_beside(self, beside: dict[str, Identity]) -> None:
        for path in self._companions:
            if path not in beside and (found := identity(path)) is not None:
                beside[path] = found
            if path in beside and _is_gone(path, beside[path]):
                self._found_gone = self._gone(path)
                raise self._found_gone

    def _save(self, connection: sqlite3.Connection, beside: dict[str, Identity]) -> None:
        """Write the write-ahead log into the open file, so that the log at its path is empty.

        If another log lies at that path, it is left alone.
        """
        if any(identity(path) not in (None, known) for path, known in beside.items()):
            return
        with contextlib.suppress(sqlite3.Error):
            connection.execute(f"PRAGMA busy_timeout = {SAVE_SECONDS * 1000:.0f}")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _gone(self, path: str) -> StorageGone:
        what = "the file" if path == self.path else f"{path}, where SQLite keeps what it wrote last,"
        if identity(path) is None:
            return StorageGone(
                f"storage sqlite:///{self.path}: {what} was removed or moved away while hpo had it open; "
                "put the same file back and give the command again, or start anew"
            )
        return StorageGone(
            f"storage sqlite:///{self.path}: {what} was replaced by another while hpo had it open; "
            "the new one was left as it is: give the command again to use it, or put the old one back first"
        )

    @property
    def handed_on(self) -> dict[str, str]:
        """The environment variable with which another process opens this very file."""
        return {} if self._known is None else {HANDED_ON: f"{self._known[0]}:{self._known[1]}:{self.path}"}


def _handed_on(path: str) -> Identity | None:
    found = re.fullmatch(r"([0-9]+):([0-9]+):(.*)", os.environ.get(HANDED_ON, ""), re.DOTALL)
    return (int(found[1]), int(found[2])) if found and found[3] == path else None


def companions(path: str) -> list[str]:
    """Return the paths of SQLite's files beside a database. SQLite resolves links first."""
    return [os.path.realpath(path) + ending for ending in COMPANIONS]


def identity(file: int | str) -> Identity | None:
    """Return the device and inode of a descriptor or path, None if there is no file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_gone(path: str, known: Identity) -> bool:
    """Return whether a path no longer leads to this file. False if the system does not say."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # for example no permission on the folder; the open file stays usable
        return False
    return (found.st_dev, found.st_ino) != known
