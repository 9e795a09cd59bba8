"""Calls to a failing storage are retried with back-off, until it has failed for too long.

Every call of ours may be repeated: each is one transaction, and each writes the same when it is written twice. So does
what a trial calls of Optuna's. What makes or ends a study or a trial does not: if the answer to an `enqueue_trial` in an
objective is lost, the trial is queued again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NoReturn, TypeVar

from hpo.errors import NoAnswer, Outage, StorageGone
from hpo.storage.connect import OUTAGES, cause

log = logging.getLogger(__name__)
Result = TypeVar("Result")
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
STOPPING_SECONDS = 5.0  # for which a process that was asked to stop still retries


class Retry:
    """How long this process retries while the storage fails, and whether it is asked to stop meanwhile."""

    def __init__(
        self,
        seconds: float,
        stopping: Callable[[], bool] = lambda: False,
        *,
        passing: tuple[type[Exception], ...] = OUTAGES,
    ) -> None:
        """Retry for so many seconds.

        Args:
            stopping: whether the process was asked to stop: then it retries for a few seconds only.
            passing: the errors after which it retries.
        """
        self.seconds = seconds
        self.stopping = stopping
        self._passing = passing
        self._thread = threading.local()
        self.is_waiting = False  # for a storage that fails

    def __call__(self, action: Callable[[], Result]) -> Result:
        """Do it, again and again while the storage fails; Outage if it does so for too long, or if asked to stop."""
        if (answer_seconds := getattr(self._thread, "answer_seconds", None)) is not None:
            return within(answer_seconds, action)
        failing_since: float | None = None
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return action()
            except StorageGone:  # though it may be a kind of error that passes: it will not come back by itself
                raise
            except self._passing as error:
                if failing_since is None:
                    failing_since = time.monotonic()
                    log.warning("the storage fails, waiting for it: %s", cause(error))
                borne = min(self.seconds, STOPPING_SECONDS) if self.stopping() else self.seconds
                if time.monotonic() - failing_since >= borne:
                    raise Outage(cause(error)) from error
            self.is_waiting = True
            time.sleep(random.uniform(0.5, 1.0) * pause)  # apart from the others that wait
            self.is_waiting = False
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    @contextmanager
    def without_retry(self, answer_seconds: float) -> Iterator[None]:
        """Let errors of the storage through at once in this thread, for what can be left undone.

        Args:
            answer_seconds: how long each action may take; NoAnswer if one takes longer.
        """
        self._thread.answer_seconds = answer_seconds
        try:
            yield
        finally:
            self._thread.answer_seconds = None


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """Do something in a thread of its own and wait for it; NoAnswer if it takes longer, and then it may still be done."""
    outcome: list[Callable[[], Result]] = []

    def run() -> None:
        try:
            result = action()
        except BaseException as error:
            outcome.append(partial(_raised, error))
        else:
            outcome.append(lambda: result)

    thread = threading.Thread(target=run, name="storage", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise NoAnswer(f"no answer from the storage for {seconds:g} s")
    return outcome[0]()


def _raised(error: BaseException) -> NoReturn:
    raise error
