"""What a trial's program prints, kept in files of bounded size: its beginning and its end."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path

log = logging.getLogger(__name__)
HEAD_BYTES = 256 * 2**10  # kept of the beginning
TAIL_BYTES = 384 * 2**10  # in each of the two files that hold the end; together 1 MiB is kept
ALL_BYTES = 2**30  # of all trials of a study; the oldest files are deleted first
LEFT_OUT = b"\n[hpo left out output here: it keeps the first 256 KiB and at least the last 384 KiB of a trial]\n"

HEADING = re.compile(r"--- attempt (\d+), ")


def head(folder: Path, number: int) -> Path:
    """Return the file with the beginning of what a trial's program printed, over all attempts."""
    return folder / f"trial-{number:06d}.log"


def tail(folder: Path, number: int) -> Path:
    """Return the file with its end. What was moved out of it lies in the file of this name with `.1` added."""
    return folder / f"trial-{number:06d}.tail.log"


def delete_oldest(folder: Path) -> None:
    """Delete the oldest output of trials until at most ALL_BYTES are left."""
    files = []
    for file in folder.glob("trial-*.log*"):
        with suppress(FileNotFoundError):  # another worker has deleted it just now
            found = file.stat()
            files.append((found.st_mtime, found.st_size, file))
    left = sum(size for _, size, _ in files) - ALL_BYTES
    for _, size, file in sorted(files):
        if left <= 0:
            break
        file.unlink(missing_ok=True)
        left -= size


class KeptOutput:
    """Writes one trial's output. A disk that takes nothing more does not end the program."""

    def __init__(self, folder: Path, number: int) -> None:
        self._number = number
        self._head, self._tail = head(folder, number), tail(folder, number)
        self._moved = self._tail.with_name(f"{self._tail.name}.1")
        self._is_failing = False

    def begin(self, attempt: int) -> None:
        """Write the line with which an attempt begins, and delete the oldest output of the study if there is too much."""
        delete_oldest(self._head.parent)
        self.write(f"--- attempt {attempt}, {datetime.now():%Y-%m-%d %H:%M:%S} ---\n".encode())

    def write(self, chunk: bytes) -> None:
        try:
            self._head.parent.mkdir(parents=True, exist_ok=True)
            with self._head.open("ab") as file:
                room = max(0, HEAD_BYTES - file.tell())
                file.write(chunk[:room])
            if len(chunk) > room:
                self._write_tail(chunk[room:])
        except OSError as error:
            if not self._is_failing:
                log.warning("trial %d: its output cannot be kept: %s", self._number, error)
            self._is_failing = True

    def _write_tail(self, chunk: bytes) -> None:
        with self._tail.open("ab") as file:
            if file.tell() + len(chunk) > TAIL_BYTES:
                mark = LEFT_OUT if self._moved.exists() else b""
                self._moved.write_bytes(mark + self._tail.read_bytes())
                file.truncate(0)
            file.write(chunk)
