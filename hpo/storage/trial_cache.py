"""A process's cache of one study's trials. Finished trials stay, and open ones are as they were last read.

A read brings only what is new. Numbers are given under a lock that is held until the commit, so no new trial has a
number below one that was read. An open trial is read whole each time, since another attempt may have cut back its
curve.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

from hpo.storage import trial_rows
from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.sql import CHUNK
from hpo.storage.trial_rows import TrialRow


@dataclass(frozen=True, kw_only=True)
class CacheUpdate:
    """The result of one read."""

    ended: list[TrialRow]  # since the last read
    running: list[TrialRow]  # or waiting; with parameters, curves and so on if the read was whole
    last: TrialRow | None  # the trial with the highest number that is not WAITING
    whole: bool
    is_anew: bool  # another study has the id now

    @property
    def is_empty(self) -> bool:
        """Whether the study has no trials or does not exist."""
        return self.last is None and not self.ended and not self.running


class TrialCache:
    """The trials of one study, as far as they were read."""

    def __init__(self, study_id: int) -> None:
        self.study_id = study_id
        self._forget()

    def _forget(self) -> None:
        self.columns = FinishedTrials()
        self.open: dict[int, TrialRow] = {}  # by id, as they were at the last whole read
        self._unfinished: set[int] = set()  # ids
        self._finished: dict[int, TrialRow] = {}  # by id
        self._frozen: dict[int, FrozenTrial] = {}  # finished trials by id, made on demand
        self._last: TrialRow | None = None  # the trial with the highest number that is not WAITING
        self.known_finished: int | None = None  # number of finished trials, as reported from outside

    def __getitem__(self, trial_id: int) -> FrozenTrial:
        """Return a finished trial."""
        if trial_id not in self._frozen:
            self._frozen[trial_id] = self._finished[trial_id].frozen()
        return self._frozen[trial_id]

    # --- reading ----------------------------------------------------------------------------------------------------

    def look(self, connection: sa.Connection, *, whole: bool = True) -> CacheUpdate:
        """Read what is new, for `take_in`. The cache is not changed.

        Args:
            connection: an open connection.
            whole: read open trials in full too; else only newly finished trials are read in full.
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
        is_first = not known and len(wanted) > CHUNK
        trial_rows.complete(connection, wanted, of_study=self.study_id if is_first else None)
        begun = (row for row in rows.values() if row.state != TrialState.WAITING)
        last = max(begun, key=lambda row: row.number, default=None)
        return CacheUpdate(ended=ended, running=running, last=last, whole=whole, is_anew=is_anew)

    def _is_still_there(self, row: TrialRow | None) -> bool:
        """Return whether this row is the last trial. It has the same number and start, or end if it never started."""
        last = self._last
        if row is None or last is None or (row.number, row.started) != (last.number, last.started):
            return False
        return last.started is not None or row.completed == last.completed

    def take_in(self, news: CacheUpdate) -> None:
        """Take the result of a read into the cache."""
        if news.is_anew:
            self._forget()
        news.ended.sort(key=lambda row: row.number)
        self.columns.add(news.ended)
        self._finished.update((row.trial_id, row) for row in news.ended)
        self._unfinished = {row.trial_id for row in news.running}
        known = {row.trial_id: row for row in news.running} if news.whole else self.open
        self.open = {trial_id: row for trial_id, row in known.items() if trial_id in self._unfinished}
        self._last = news.last

    def rows(self) -> list[TrialRow]:
        """Return the rows of all trials, by number."""
        return sorted((*self._finished.values(), *self.open.values()), key=lambda row: row.number)

    # --- Optuna's objects -------------------------------------------------------------------------------------------

    def trials(self, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """Return the trials in these states, by number."""
        found = [self[row.trial_id] for row in self._finished.values() if states is None or row.state in states]
        found += [row.frozen() for row in self.open.values() if states is None or row.state in states]
        found.sort(key=lambda trial: trial.number)
        return found
