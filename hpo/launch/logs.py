"""The logs of workers on this machine, kept to a size, and to a number.

A log is a file that a worker, its libraries and all that user code starts write to by one descriptor. So it cannot be rotated
by its writer, as `logging.handlers` does: whoever watches the workers copies it away and cuts it off.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hpo.worker import descendants

MOST_BYTES = 8 * 2**20  # of a log, and of what came before, which lies beside it
KEPT = 100  # logs in a folder, of earlier runs too
YOUNG_SECONDS = 86_400.0  # since its last line; such a log of another machine is kept, its worker may live


def before(log: Path) -> Path:
    """Return where the part of a log that was cut off lies."""
    return log.with_name(f"{log.name}.1")


def bound(log: Path) -> None:
    """Cut a log off that has grown too long, and keep the end of what it held beside it."""
    with suppress(OSError):  # it is not there, or cannot be read just now: the next look tries again
        if log.stat().st_size <= MOST_BYTES:
            return
        with (
            suppress(OSError),
            log.open("rb") as long,
            before(log).open("wb") as kept,
        ):  # a full disk: cutting is all the mend
            long.seek(-MOST_BYTES, os.SEEK_END)
            kept.write(long.read(MOST_BYTES))
        os.truncate(log, 0)


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last lines of a log."""
    lines: list[str] = []
    for part in (log, before(log)):
        with suppress(OSError):
            lines = [*part.read_text(errors="replace").splitlines()[-count:], *lines][-count:]
    return lines


def delete_old(folder: Path) -> None:
    """Delete the logs of runs that have ended, and what lies beside them, but for so many."""
    found = sorted(_ages(folder.glob("worker-*.log*")))
    for age, log in found[KEPT:]:
        if not _is_in_use(log, age):
            log.unlink(missing_ok=True)


def _is_in_use(log: Path, age: float) -> bool:
    own = re.match(rf"worker-{re.escape(platform.node())}-(\d+)-\d+\.log", log.name)
    return descendants.is_alive(int(own[1])) if own else age <= YOUNG_SECONDS


def _ages(logs: Iterable[Path]) -> Iterable[tuple[float, Path]]:
    now = time.time()
    for log in logs:
        with suppress(OSError):
            yield now - log.stat().st_mtime, log
