"""Everything that can go wrong, in one tree.

HpoError
├── NoAnswer              the storage hangs; borne like every outage
├── Diverged              an outcome: the trial's loss is no number any more; the study learns of it as PRUNED
└── Fault                 the user or the machine must mend it; the command ends with exit code 2
    ├── SpecError         the study file (or a pinned config) says something impossible
    ├── CheckpointError   a checkpoint file is missing, damaged, or not the one that was recorded
    ├── StorageError      the database cannot be reached, opened or trusted; StorageBusy: it has no room just now,
    │                     StorageGone: its file was removed or replaced while it was open
    ├── StudyError        the study is not there, has nothing to show, or its state forbids what was asked
    └── MismatchError     the study was made with another spec, other data or other code

Signal (BaseException)    not errors: how a trial learns, inside a report, that it must let go
├── Parked                it was asked to stop and keeps its place: checkpoint, release the lease, go on later
├── Unasked               its worker is ended by nobody who may: an attempt that cost a worker
├── Stopped               a person ended it: it keeps the value it has
├── TimeUp                it trained for longer than a trial may
├── LostLease             another worker owns it by now: drop it, write nothing
├── ChangedSpace          changed code asks for what the study cannot take: as if it had never begun
└── Outage                the storage failed for too long: not the trial's fault, it keeps its place
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, time

from hpo import text

MAX_SHOWN = 300  # characters of a value in a message


class HpoError(Exception):
    """Raised by `hpo`; the message names what was wrong, the value and the mend.

    Each argument is a line of the message. A newline within one comes from foreign text and is shown as `\\n`.
    """

    @property
    def lines(self) -> list[str]:
        """The message's lines, safe to show."""
        return [text.safe(line) for line in self.args]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class Diverged(HpoError):
    """Raised when a trial's loss is not finite; an outcome that the study records, not a fault."""


class Fault(HpoError):
    """Raised when the user or the machine must change something before the command can work."""


class SpecError(Fault):
    """Raised when a study file or a pinned config cannot be used as it stands."""


class Mistakes:
    """What is wrong with a file, collected line by line, so that a person sees all of it at once."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}  # in their order, each once
        self._cause: BaseException | None = None

    def __bool__(self) -> bool:
        return bool(self.lines)

    def add(self, error: SpecError) -> None:
        """Take note of what an error says."""
        self.lines |= dict.fromkeys(error.lines)
        self._cause = self._cause or error.__cause__

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Go on behind a block that raises SpecError, with what it says."""
        try:
            yield
        except SpecError as error:
            self.add(error)

    def raise_if_any(self) -> None:
        """Raise SpecError with all that was collected, if there is something."""
        if self:
            raise SpecError(*self.lines) from self._cause


class CheckpointError(Fault):
    """Raised when a checkpoint file is missing, damaged, or not the one that was recorded."""


class StorageError(Fault):
    """Raised when the storage cannot be reached, opened or trusted."""


class StorageBusy(StorageError):
    """Raised when the storage is there and has no room just now: worth another try."""


class StorageGone(StorageError):
    """Raised when the file of a storage was removed or replaced while it was open: nothing that passes by itself."""


class NoAnswer(HpoError):
    """Raised when the storage says neither yes nor no for too long: an outage like any other."""


class StudyError(Fault):
    """Raised when a study is missing or not in a state that allows what was asked."""


class MismatchError(Fault):
    """Raised when a study was made with another spec, other data or other code."""


class Signal(BaseException):
    """Raised inside a trial to end it early; a BaseException, so that `except Exception` in user code lets it pass."""


class Parked(Signal):
    """Raised when a trial was asked to stop and keeps its place for a later worker."""


class Unasked(Signal):
    """Raised when a signal ends the trial's worker that `hpo run` did not send: the trial's own code did, as a rule."""


class Stopped(Signal):
    """Raised when a person ended the trial with `hpo stop`."""


class TimeUp(Signal):
    """Raised when a trial has trained for longer than `budget.trial_timeout`."""


class LostLease(Signal):
    """Raised when a trial's lease went to another worker; nothing more may be written for it."""


class ChangedSpace(Signal):
    """Raised when code that changed during a study asks for a parameter in a way that the study cannot take.

    Args:
        given: the parameters that the trial was given before.
    """

    def __init__(self, why: str, given: Collection[str]) -> None:
        super().__init__(why)
        self.given = given


class Outage(Signal):
    """Raised when the storage failed for longer than a worker bears; the trial is not to blame and keeps its place."""


@contextmanager
def located(place: object) -> Iterator[None]:
    """Put a file's name, or a key's, in front of each line of a SpecError."""
    try:
        yield
    except SpecError as error:
        raise SpecError(*(f"{place}: {line}" for line in error.lines)) from error.__cause__


def shown(value: object) -> str:
    """Return a value as a study file writes it, for a message to whoever wrote the file; a long one is cut."""
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


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the closest of `words`, or all of them when none is close."""
    known = sorted(words)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(known)})" if known else ""
