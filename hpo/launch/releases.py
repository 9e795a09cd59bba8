"""The leases of workers that have ended: they are released at once, or once the storage answers again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from hpo.errors import Fault
from hpo.launch.slots import Dead, died_of
from hpo.queue import reaper
from hpo.storage.connect import FAILURES, Storage
from hpo.storage.retry import within
from hpo.study import study as studies
from hpo.study.study import Study

RELEASE_SECONDS = 2.0  # between two attempts while the storage fails
ANSWER_SECONDS = 10.0  # for which the only attempt may last


def release_once(open_study: Callable[[], tuple[str, Storage]], dead: Dead) -> bool:
    """Release the leases of a dead worker over a connection of its own. Return whether its end cost a trial.

    If the storage fails, the leases expire.

    Args:
        open_study: returns the study's name and its opened storage.
        dead: the worker.
    """

    def release() -> bool:
        name, place = open_study()
        try:
            return Releases(studies.join(place, name)).release(dead)
        finally:
            place.close()

    with suppress(Fault, *FAILURES):
        return within(ANSWER_SECONDS, release)
    return False


class Releases:
    """Releases the leases of dead workers before they expire."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._unreleased: list[Dead] = []  # dead workers whose leases could not be released yet
        self._again_at = 0.0

    def release(self, dead: Dead) -> bool:
        """Release the leases of a dead worker. Return whether its end cost a trial. If the storage fails, `retry` tries again."""
        ledger = self._study.ledger("launcher")
        try:
            if dead.in_order:
                reaper.release_leases_of(ledger, dead.worker)
            else:
                reaper.fail_leases_of(ledger, dead.worker, died_of(dead.code))
            return reaper.has_lost(ledger, dead.worker)
        except Exception:  # no error of the storage may keep the other workers from being looked after
            self._unreleased.append(dead)
            return False

    def retry(self) -> None:
        """Release what could not be released yet, if it is time."""
        if self._unreleased and time.monotonic() >= self._again_at:
            unreleased, self._unreleased = self._unreleased, []
            for dead in unreleased:
                self.release(dead)
            self._again_at = time.monotonic() + RELEASE_SECONDS
