"""A worker's calls of a storage that may fail: retried, or given up after some seconds, and since when it has failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hpo.errors import StorageGone
from hpo.storage.connect import UNREACHED, cause
from hpo.storage.retry import Result, Retry, within

log = logging.getLogger(__name__)
ANSWER_SECONDS = 5.0  # for which the training thread waits for the storage before it continues without an answer


class StorageCalls:
    """Calls of the storage, and whether it fails."""

    def __init__(self, retry: Retry) -> None:
        """Start with a storage that is not known to fail.

        Args:
            retry: how long the storage may fail.
        """
        self.retry = retry
        self.gone: StorageGone | None = None  # set when the storage is known to be gone for good
        self._failing_since: float | None = None

    @property
    def is_cut_off(self) -> bool:
        """Whether the storage failed, or did not answer, at the last attempt."""
        return self._failing_since is not None

    @property
    def failing_seconds(self) -> float:
        """For how many seconds the storage has failed; 0 if it does not."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    def ask(self, action: Callable[[], Result]) -> Result | None:
        """Call the storage for the training thread. If it fails or hangs, return None, and the client is cut off."""
        return self._attempt(lambda: within(ANSWER_SECONDS, action))

    def ask_optuna(self, action: Callable[[], Result]) -> Result | None:
        """Call Optuna likewise. The call may use the storage."""

        def ask() -> Result:
            with self.retry.without_retry(ANSWER_SECONDS):
                return action()

        return self._attempt(ask)

    def _attempt(self, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except UNREACHED as error:
            self.note_failure(error)
            return None

    def note_failure(self, error: BaseException) -> None:
        """Note that the storage failed. From now on reports are kept until the heartbeat's thread reaches it.

        If the storage is gone for good, the next `let_go` of each trial raises Outage.
        """
        if isinstance(error, StorageGone):
            self.gone = error
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            what_next = "training goes on" if self.gone is None else "the worker stops"
            log.warning("the storage fails, %s: %s", what_next, cause(error))

    def note_answer(self) -> None:
        """Note that the storage answers and that no report is kept."""
        self._failing_since = None
