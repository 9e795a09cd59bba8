"""What a process knows of one study's trials: the finished ones for good, the open ones as they were when last read.

A read brings what is new only. Numbers are given under a lock that is held to the commit, so no trial turns up later below
one that was seen. An open trial is read whole each time: its curve may have been cut back by another attempt.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

from hpo.storage import trial_rows
from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.trial_rows import TrialRow


@dataclass(frozen=True, kw_only=True)
class CacheUpdate:
    """What a look has found."""

    ended: list[TrialRow]  # since the last look
    running: list[TrialRow]  # or waiting; with what hangs on them if the look was a whole one
    last: TrialRow | None  # the one with the highest number of those that left the queue
    whole: bool
    is_anew: bool  # the study is another one, in the place of the one that was known

    @property
    def is_empty(self) -> bool:
        """Whether the study has no trials, or is not there."""
        return self.last is None and not self.ended and not self.running


class TrialCache:
    """The trials of one study, as far as they are known."""

    def __init__(self, study_id: int) -> None:
        self.study_id = study_id
        self._forget()

    def _forget(self) -> None:
        self.columns = FinishedTrials()
        self.open: dict[int, TrialRow] = {}  # by id, as they were at the last whole read
        self._unfinished: set[int] = set()  # ids
        self._finished: dict[int, TrialRow] = {}  # by id
        self._frozen: dict[int, FrozenTrial] = {}  # of finished trials, by id, as far as somebody asked for them
        self._last: TrialRow | None = None  # the one with the highest number of those that left the queue
        self.low = 0  # every trial below this number is known to have finished
        self.known_finished: int | None = None  # how many have finished, as somebody else has found out

    def __getitem__(self, trial_id: int) -> FrozenTrial:
        """Return a finished trial."""
        if trial_id not in self._frozen:
            self._frozen[trial_id] = self._finished[trial_id].frozen()
        return self._frozen[trial_id]

    # --- reading ----------------------------------------------------------------------------------------------------

    def look(self, connection: sa.Connection, *, whole: bool = True) -> CacheUpdate:
        """Read what is new and change nothing: whoever waits for it takes it in.

        Args:
            whole: open trials too, with all that hangs on them; else only those that have finished since.
        """
        beyond = -1 if self._last is None else self._last.number - 1
        found = trial_rows.read(connection, self.study_id, beyond=beyond, among=self._unfinished)
        rows = {row.trial_id: row for row in found}
        is_anew = self._last is not None and not self._is_still_there(rows.get(self._last.trial_id))
        if is_anew:  # SQLite gives the ids of a deleted study to the next one
            rows = {row.trial_id: row for row in trial_rows.read(connection, self.study_id, beyond=-1)}
        known = {} if is_anew else self._finished
        ended = [row for row in rows.values() if row.is_finished and row.trial_id not in known]
        running = [row for row in rows.values() if not row.is_finished]
        wanted = ended + running if whole else ended
        is_first = not known and len(wanted) > trial_rows.CHUNK
        trial_rows.complete(connection, wanted, of_study=self.study_id if is_first else None)
        begun = (row for row in rows.values() if row.state != TrialState.WAITING)
        last = max(begun, key=lambda row: row.number, default=None)
        return CacheUpdate(ended=ended, running=running, last=last, whole=whole, is_anew=is_anew)

    def _is_still_there(self, row: TrialRow | None) -> bool:
        """Say whether this is the last trial: known again by its number and its start, or its end if it never started."""
        last = self._last
        if row is None or last is None or (row.number, row.started) != (last.number, last.started):
            return False
        return last.started is not None or row.completed == last.completed

    def take_in(self, news: CacheUpdate) -> None:
        """Know what a look has found."""
        if news.is_anew:
            self._forget()
        news.ended.sort(key=lambda row: row.number)
        self.columns.add(news.ended)
        self._finished.update((row.trial_id, row) for row in news.ended)
        self._unfinished = {row.trial_id for row in news.running}
        known = {row.trial_id: row for row in news.running} if news.whole else self.open
        self.open = {trial_id: row for trial_id, row in known.items() if trial_id in self._unfinished}
        self._last = news.last
        after_last = 0 if news.last is None else news.last.number + 1
        self.low = min((row.number for row in news.running), default=after_last)

    def rows(self) -> list[TrialRow]:
        """Return all trials as they are stored, by number."""
        return sorted((*self._finished.values(), *self.open.values()), key=lambda row: row.number)

    # --- Optuna's objects -------------------------------------------------------------------------------------------

    def trials(self, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Return the trials in these states, by number."""
        found = [self[row.trial_id] for row in self._finished.values() if states is None or row.state in states]
        found += [row.frozen() for row in self.open.values() if states is None or row.state in states]
        found.sort(key=lambda trial: trial.number)
        return found
