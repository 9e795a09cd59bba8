"""The log files of workers on this machine, limited in size and number.

A worker, its libraries and the processes of user code write to a log through one file descriptor. So the writer cannot rotate
the log, as `logging.handlers` does. The parent process copies the end of a long log and truncates it.
"""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from hpo.own import output
from hpo.worker import descendants

MOST_BYTES = 8 * 2**20  # of a log, and of the cut-off part beside it
BOUND_SECONDS = 10.0  # between two looks at a launched worker's log
#: A line that the worker logged, with its words; all else is the output of user code, or of what ended the worker.
STAMPED = re.compile(r"\d{4}-\d\d-\d\d \S+ [A-Z]+ (.*)")
LAST_BYTES = 4096  # of a log in which its last entry is looked for
KEPT = 100  # logs in a folder, those of earlier runs included
YOUNG_SECONDS = 86_400.0  # since the last line; a younger log of another machine is kept, its worker may be alive
NAME = re.compile(r"worker-(?P<machine>.*)-(?P<run>\d+)-(?P<worker>\d+)\.log")
LAUNCHED = (
    "launch"  # in place of the machine in the name of a launched worker's log; the run is then the launch's number
)
STAMP = r"\d{4}-\d\d-\d\d [\d:,]+ INFO "
JOINED = re.compile(f"{STAMP}joined study ")  # a worker's first line
#: An attempt begins or ends. Output of user code without a newline may stand before it.
MARK = re.compile(rf"{STAMP}trial (?P<trial>\d+) (begins, attempt (?P<attempt>\d+)|settled|parked|left)$")


def before(log: Path) -> Path:
    """Return the file that holds the cut-off part of a log."""
    return log.with_name(f"{log.name}.1")


def bound(log: Path) -> None:
    """Truncate a log that has grown too long. The end of its content is kept in the file `before(log)`."""
    with suppress(OSError):  # the log is missing or unreadable at the moment; the next call tries again
        if log.stat().st_size <= MOST_BYTES:
            return
        with (
            suppress(OSError),
            log.open("rb") as long,
            before(log).open("wb") as kept,
        ):  # if the disk is full, truncating is all that can be done
            long.seek(-MOST_BYTES, os.SEEK_END)
            kept.write(long.read(MOST_BYTES))
        os.truncate(log, 0)


def keep_bounded(log: Path) -> None:
    """Bound a log from now on, as long as this process lives. A log that is not there is no error."""

    def again() -> None:
        while True:
            bound(log)
            time.sleep(BOUND_SECONDS)

    threading.Thread(target=again, name="log", daemon=True).start()


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last `count` lines of a log, from its cut-off part too."""
    lines: list[str] = []
    for part in (log, before(log)):
        with suppress(OSError):
            lines = [*part.read_text(errors="replace").splitlines()[-count:], *lines][-count:]
    return lines


def last_entry(log: Path) -> str:
    """Return the words of the last line that a worker logged; "" if none is near the end of its log."""
    with suppress(OSError), log.open("rb") as handle:
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - LAST_BYTES))
        for line in reversed(handle.read().decode(errors="replace").splitlines()):
            if found := STAMPED.match(line):
                return found[1]
    return ""


def delete_old(folder: Path) -> None:
    """Delete the oldest logs of ended runs, so that KEPT files are left."""
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


# --- read -------------------------------------------------------------------------------------------------------------


def launched_name(launch: int | str, slot: int | str) -> str:
    """Return the file name of a launched worker's log."""
    return f"worker-{LAUNCHED}-{launch}-{slot}.log"


def of_last_run(folder: Path, worker: int | None = None, *, launch: int | None = None) -> dict[str, Path]:
    """Return the logs of the last run on each machine, and of the last launch, by the workers' names.

    A name is the worker's number, with its machine if there are several. A launched worker is named as 2.0: launch and slot.

    Args:
        folder: the study's logs.
        worker: return this worker's log only.
        launch: return logs of this launch only.
    """
    found = [match for log in by_age(folder) if (match := NAME.fullmatch(log.name))]
    if launch is not None:
        found = [match for match in found if (match["machine"], int(match["run"])) == (LAUNCHED, launch)]
    last = {match["machine"]: match["run"] for match in found}
    return {
        _worker_name(match, is_alone=len(last) == 1): folder / match[0]
        for match in sorted(found, key=lambda match: (match["machine"], int(match["worker"])))
        if last[match["machine"]] == match["run"] and worker in (None, int(match["worker"]))
    }


def _worker_name(match: re.Match[str], *, is_alone: bool) -> str:
    if match["machine"] == LAUNCHED:
        return f"{match['run']}.{match['worker']}"
    return match["worker"] if is_alone else f"{match['machine']}:{match['worker']}"


def by_age(folder: Path) -> list[Path]:
    """Return the logs in a folder, the one with the oldest last line first."""
    return [log for _, log in sorted(_ages(folder.glob("worker-*.log")), reverse=True)]


class LogReader:
    """Reads a log, and later what was added to it.

    Args:
        log: the file.
        trial: return only what was printed while this trial was at work. Lines of trials in the same stack are among it.
    """

    def __init__(self, log: Path, trial: int | None = None) -> None:
        self.attempts: set[int] = set()  # attempts of the trial that begin in this log
        self._log = log
        self._trial = trial
        self._is_at_work = False
        self._position = 0
        self._left = b""  # an unfinished line
        with suppress(OSError):
            self._left = before(log).read_bytes()

    def lines(self) -> list[str]:
        """Return the finished lines that were not returned yet."""
        with suppress(OSError), self._log.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._position:  # the log was cut off
                self._position = 0
            file.seek(self._position)
            self._left += file.read()
            self._position = file.tell()
        *lines, self._left = self._left.split(b"\n")
        return self._shown(lines)

    def rest(self) -> list[str]:
        """Return the unfinished line at the end, if there is one."""
        left, self._left = self._left, b""
        return self._shown([left] if left else [])

    def _shown(self, lines: Iterable[bytes]) -> list[str]:
        # Of what was printed over itself, such as a progress bar, a terminal keeps the last.
        texts = (line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in lines)
        return [text for text in texts if self._trial is None or self._is_of_trial(text)]

    def _is_of_trial(self, line: str) -> bool:
        was_at_work = self._is_at_work
        if JOINED.match(line):  # another process: the one before has ended
            was_at_work = self._is_at_work = False
        elif (mark := MARK.search(line)) and int(mark["trial"]) == self._trial:
            self._is_at_work = mark["attempt"] is not None
            if mark["attempt"]:
                self.attempts.add(int(mark["attempt"]))
        return was_at_work or self._is_at_work


class OutputReader(LogReader):
    """Reads what a trial's program has printed."""

    def _shown(self, lines: Iterable[bytes]) -> list[str]:
        texts = super()._shown(lines)
        self.attempts |= {int(heading[1]) for text in texts if (heading := output.HEADING.match(text))}
        return texts


class Tail:
    """Reads the logs of a study's last run, or all that belongs to a trial, and later what was added.

    After the logs of workers comes what the trial's program has printed, if it has one.

    Args:
        folder: the study's logs.
        worker: of this worker only.
        trial: of this trial only, in any run.
        launch: of this launch only.
    """

    def __init__(
        self, folder: Path, *, worker: int | None = None, trial: int | None = None, launch: int | None = None
    ) -> None:
        self._folder = folder
        self._launch = launch
        self._worker = worker
        self._trial = trial
        self._readers: dict[Path, LogReader] = {}

    def lines(self) -> list[str]:
        """Return the finished lines that were not returned yet. Those of several workers begin with the worker's name."""
        return self._read(LogReader.lines)

    def rest(self) -> list[str]:
        """Return the unfinished line at the end of each log."""
        return self._read(LogReader.rest)

    def _read(self, read: Callable[[LogReader], list[str]]) -> list[str]:
        of_trial = self._trial is not None
        logs = {log.name: log for log in by_age(self._folder)} if of_trial else self._of_last_run()
        found = {}
        for name, log in logs.items():
            reader = self._readers.setdefault(log, LogReader(log, self._trial))
            found[name] = read(reader)
        if self._trial is not None:
            for log in (output.head(self._folder, self._trial), output.tail(self._folder, self._trial)):
                found[log.name] = read(self._readers.setdefault(log, OutputReader(log)))
        is_one = of_trial or len(logs) == 1
        return [line if is_one else f"{name} | {line}" for name, lines in found.items() for line in lines]

    def _of_last_run(self) -> dict[str, Path]:
        return of_last_run(self._folder, self._worker, launch=self._launch)

    def missing(self, attempts: int) -> str | None:
        """Return what was not found, in words; None if everything was.

        Args:
            attempts: how often the trial was taken up; 0 without a trial.
        """
        where = (
            f"logs of this machine's workers are in {self._folder}; a worker started by hand prints to its own terminal"
        )
        if self._trial is None:
            named = f"worker {self._worker}" if self._launch is None else f"worker {self._launch}.{self._worker}"
            which = "no log can be read" if self._worker is None else f"the last run has no log of {named}"
            return None if self._readers else f"{which}; {where}"
        if not attempts:
            return f"trial {self._trial} has no log, since no worker of hpo has begun it"
        found = {attempt for reader in self._readers.values() for attempt in reader.attempts}
        lost = sorted({*range(1, attempts + 1)} - found)
        if not lost:
            return None
        numbers = ", ".join(map(str, lost))
        return f"trial {self._trial}: the log of attempt {numbers} is gone, or on another machine; {where}"
