"""What a trial's program prints, kept in files of bounded size: its beginning and its end."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from contextlib import suppress
from datetime import datetime
from pathlib import Path

log = logging.getLogger(__name__)
HEAD_BYTES = 256 * 2**10  # kept of the beginning
TAIL_BYTES = 384 * 2**10  # in each of the two files that hold the end; together 1 MiB is kept
ALL_BYTES = 2**30  # of all trials of a study
LEFT_OUT = b"\n[hpo left out output here: it keeps the first 256 KiB and at least the last 384 KiB of a trial]\n"

HEADING = re.compile(r"--- attempt (\d+), ")


def head(folder: Path, number: int) -> Path:
    """Return the file with the beginning of what a trial's program printed, over all attempts."""
    return folder / f"trial-{number:06d}.log"


def tail(folder: Path, number: int) -> Path:
    """Return the file with its end. What was moved out of it lies in the file of this name with `.1` added."""
    return folder / f"trial-{number:06d}.tail.log"


def delete_oldest(folder: Path) -> None:
    """Delete the output of trials until at most ALL_BYTES are left. What was printed the longest ago goes first.

    All files of a trial go together: a running one would print on into the place of its beginning.
    """
    files: dict[str, list[Path]] = defaultdict(list)
    printed_at: dict[str, float] = defaultdict(float)
    sizes: dict[str, int] = defaultdict(int)
    for file in folder.glob("trial-*.log*"):
        with suppress(FileNotFoundError):  # another worker has deleted it just now
            found, trial = file.stat(), file.name.partition(".")[0]
            files[trial].append(file)
            printed_at[trial] = max(printed_at[trial], found.st_mtime)
            sizes[trial] += found.st_size
    left = sum(sizes.values())
    for trial in sorted(files, key=lambda trial: printed_at[trial]):
        if left <= ALL_BYTES:
            return
        for file in files[trial]:
            file.unlink(missing_ok=True)
        left -= sizes[trial]


class KeptOutput:
    """Writes one trial's output. A disk that takes nothing more does not end the program."""

    def __init__(self, folder: Path, number: int) -> None:
        self._number = number
        self._head, self._tail = head(folder, number), tail(folder, number)
        self._moved = self._tail.with_name(f"{self._tail.name}.1")
        self._is_failing = False

    def begin(self, attempt: int) -> None:
        """Write the line with which an attempt begins, and delete the oldest output of the study if there is too much."""
        try:
            delete_oldest(self._head.parent)
        except OSError as error:
            log.warning("trial %d: the oldest output of the study cannot be deleted: %s", self._number, error)
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
