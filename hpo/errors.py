"""All errors and signals of `hpo`.

HpoError
├── NoAnswer              the storage did not answer in time; treated as an outage
├── ProgramError          a trial's program failed, or printed what cannot be read; also a RuntimeError
└── Fault                 the user must change something; the command ends with exit code 2
    ├── SpecError         a study file or pinned config is wrong
    ├── CheckpointError   a checkpoint file is missing, damaged, or not the recorded one
    ├── StorageError      the database cannot be reached, opened or used safely
    │   ├── StorageBusy   the database is locked, starting up, or has no free connection
    │   ├── StorageAway   no database server answers
    │   └── StorageGone   the database file was removed or replaced while it was open
    ├── LaunchError       an engine is missing, or refused what it was asked for
    ├── StudyError        the study does not exist, has no result, or is in the wrong state
    └── MismatchError     the study was made with another spec, other data or other code

Signal (BaseException)    not errors: they end a trial's attempt early, inside a report
├── Parked                the trial was asked to stop; it is parked with a checkpoint
├── Unasked               a signal that `hpo run` did not send ended the worker; counts as a lost worker
├── Stopped               a person ended the trial; it keeps its current value
├── TimeUp                the trial trained for longer than `budget.trial_timeout`
├── Diverged              the trial diverged; by default it ends as PRUNED
├── LostLease             another worker owns the trial now; nothing more may be written
├── ChangedSpace          changed code asks for a parameter that does not fit the study; the trial is handed back
└── Outage                the storage failed for too long; the trial is parked
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, time

from hpo import text

MAX_SHOWN = 300  # characters of a value in a message


class HpoError(Exception):
    """Base class of the errors that `hpo` raises. The message gives the mistake, the value and the mend.

    Each argument is one line of the message. A newline within an argument is shown as `\\n`.
    """

    @property
    def lines(self) -> list[str]:
        """The message's lines, safe to show."""
        return [text.safe(line) for line in self.args]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class ProgramError(HpoError, RuntimeError):
    """Raised when a trial's program failed. Its text shows the kind of the failure, as a RuntimeError's of torch does."""


class Fault(HpoError):
    """Raised when the user must change something before the command can work."""


class SpecError(Fault):
    """Raised when a study file, pinned config or command-line option is wrong."""


class Mistakes:
    """All mistakes in a file, collected so that they are reported together."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}  # an ordered set
        self._cause: BaseException | None = None

    def __bool__(self) -> bool:
        return bool(self.lines)

    def add(self, error: SpecError) -> None:
        """Add the lines of an error."""
        self.lines |= dict.fromkeys(error.lines)
        self._cause = self._cause or error.__cause__

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Add the SpecError that the block raises, and continue after the block."""
        try:
            yield
        except SpecError as error:
            self.add(error)

    def raise_if_any(self) -> None:
        """Raise SpecError with all collected lines, if there are any."""
        if self:
            raise SpecError(*self.lines) from self._cause


class CheckpointError(Fault):
    """Raised when a checkpoint file is missing, damaged, or not the recorded one."""


class StorageError(Fault):
    """Raised when the database cannot be reached, opened or used safely."""


class StorageBusy(StorageError):
    """Raised when the database is locked, starting up, or has no free connection. A later try may succeed."""


class StorageAway(StorageError):
    """Raised when no database server answers at the URL: it is down, or the URL is wrong."""


class StorageGone(StorageError):
    """Raised when a database file was removed or replaced while it was open. Trying again does not help."""


class NoAnswer(HpoError):
    """Raised when the database does not answer in time. It is treated as an outage."""


class LaunchError(Fault):
    """Raised when an engine is missing, or refused what it was asked for."""


class StudyError(Fault):
    """Raised when a study or its result does not exist, or its state forbids the operation."""


class MismatchError(Fault):
    """Raised when a study was made with another spec, other data or other code."""


class Signal(BaseException):
    """Raised inside a trial to end its attempt early. It is a BaseException, so `except Exception` in user code lets it pass."""


class Parked(Signal):
    """Raised when a trial is asked to stop. It is parked for a later attempt."""


class Unasked(Signal):
    """Raised when a signal that `hpo run` did not send ends the worker. The usual sender is the trial's own code."""


class Stopped(Signal):
    """Raised when a person ended the trial with `hpo stop`."""


class TimeUp(Signal):
    """Raised when a trial has trained for longer than `budget.trial_timeout`."""


class Diverged(Signal):
    """Raised when a trial's loss or result is not finite, or when the divergence guard ends it."""


class LostLease(Signal):
    """Raised when another worker has taken the trial's lease. Nothing more may be written for the trial."""


class ChangedSpace(Signal):
    """Raised when code that changed during a study asks for a parameter with a distribution that the study cannot store.

    Args:
        why: the message.
        given: the names of the parameters that the trial was given before.
    """

    def __init__(self, why: str, given: Collection[str]) -> None:
        super().__init__(why)
        self.given = given


class Outage(Signal):
    """Raised when the storage failed for longer than `recovery.outage_patience`.

    `hpo run` parks the trial. A worker started by hand cannot, so its trial counts as one of a lost worker.
    """


@contextmanager
def located(place: object) -> Iterator[None]:
    """Put the name of a file or key in front of each line of a SpecError."""
    try:
        yield
    except SpecError as error:
        raise SpecError(*(f"{place}: {line}" for line in error.lines)) from error.__cause__


def shown(value: object) -> str:
    """Return a value as TOML writes it, for messages. A long value is cut after MAX_SHOWN characters."""
    text = _written(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_written(child)}' for key, child in value.items())} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return str(value) if isinstance(value, date | time) else repr(value)


def closest(word: str, words: Iterable[str]) -> str | None:
    """Return the word that was probably meant: the closest one in any case, or one abbreviated by its initials, such as lr."""
    of_lower = {one.lower(): one for one in sorted(words)}
    if close := difflib.get_close_matches(word.lower(), of_lower, n=1, cutoff=0.6):
        return of_lower[close[0]]
    return next((one for one in of_lower.values() if one == _initials(word) or _initials(one) == word), None)


def _initials(word: str) -> str | None:
    return "".join(part[:1] for part in word.lower().split("_")) if "_" in word else None


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the word that was probably meant, or ' (known: ...)' with all words if none is close."""
    known = sorted(words)
    if (meant := closest(word, known)) is not None:
        return f" (did you mean {meant!r}?)"
    return f" (known: {', '.join(known)})" if known else ""
