"""The SQLite file behind an engine, told from others by device and inode: what is put in its place is left alone.

A connection keeps the file that it opened, whatever becomes of the name. The write-ahead log beside it goes by the name,
so whoever opened another file under that name would have it overwritten from the log of the old one.
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

from hpo.errors import StorageGone

HANDED_ON = "HPO_SQLITE_FILE"  # the variable in which a process tells those that it starts which file it has open
COMPANIONS = ("-wal", "-shm")  # beside the file for as long as a connection stands
LOOK_SECONDS = 1.0  # between two looks at these
SAVE_SECONDS = 2.0  # that the last look at a file that is gone may wait for other processes
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
        self._known = _handed_on(self.path)
        self._found_gone: StorageGone | None = None  # it stays so: whatever comes to the path later

    def open(self, *, timeout: float, isolation_level: Literal["IMMEDIATE"] | None) -> sqlite3.Connection:
        """Return a connection as `sqlite3.connect` does; StorageGone if the file is not the one that was opened before."""
        self._look()
        mode = "rwc" if self._create and self._known is None else "rw"
        connection = sqlite3.connect(
            f"file:{quote(self.path)}?mode={mode}",
            uri=True,
            timeout=timeout,
            isolation_level=isolation_level,
            check_same_thread=False,  # a connection of a pool
        )
        self._known = self._known or identity(self.path)
        try:
            self._look()  # once more: it may have gone meanwhile
        except StorageGone:
            connection.close()  # nothing was read, so nothing beside the file was touched
            raise
        return connection

    def _look(self) -> None:
        if self._found_gone is None and self._known is not None and _is_gone(self.path, self._known):
            self._found_gone = self._gone(self.path)
        if self._found_gone is not None:
            raise self._found_gone

    def check(self, connection: sqlite3.Connection, record: Any, proxy: object) -> None:  # noqa: ARG002  (SQLAlchemy passes all three)
        """Refuse a connection, before it is used, whose files are not at their paths: StorageGone.

        The file itself is looked at each time, which takes a few microseconds, what lies beside it once a second.
        """
        beside: dict[str, Identity] = record.info.setdefault("beside", {})  # what this connection keeps open
        try:
            self._look()
            if time.monotonic() - record.info.get("looked_at", -math.inf) >= LOOK_SECONDS:
                record.info["looked_at"] = time.monotonic()
                self._look_beside(beside)
        except StorageGone:
            self._save(connection, beside)
            raise

    def _look_beside(self, beside: dict[str, Identity]) -> None:
        for path in self._companions:
            if path not in beside and (found := identity(path)) is not None:
                beside[path] = found
            if path in beside and _is_gone(path, beside[path]):
                self._found_gone = self._gone(path)
                raise self._found_gone

    def _save(self, connection: sqlite3.Connection, beside: dict[str, Identity]) -> None:
        """Move what the write-ahead log holds into the file that is open, so that the log, found by its name, is empty.

        Not if somebody has put another log there: what that holds is not ours.
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
        """What a process that is to open this very file needs in its environment."""
        return {} if self._known is None else {HANDED_ON: f"{self._known[0]}:{self._known[1]}:{self.path}"}


def _handed_on(path: str) -> Identity | None:
    found = re.fullmatch(r"([0-9]+):([0-9]+):(.*)", os.environ.get(HANDED_ON, ""), re.DOTALL)
    return (int(found[1]), int(found[2])) if found and found[3] == path else None


def companions(path: str) -> list[str]:
    """Return what SQLite keeps beside a file; it follows links first."""
    return [os.path.realpath(path) + ending for ending in COMPANIONS]


def identity(file: int | str) -> Identity | None:
    """Return what a descriptor, or a path, leads to; None if to nothing."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_gone(path: str, known: Identity) -> bool:
    """Say whether a path does not lead to this file any more; no if the system does not tell."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # the folder may not be looked into just now: what is open stays so
        return False
    return (found.st_dev, found.st_ino) != known
