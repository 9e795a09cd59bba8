"""Retries calls with back-off while the storage fails, up to a time limit.

Our own calls are idempotent: each is one transaction, and writes the same when it is done twice. So are the calls of
Optuna's that a trial makes. Calls that make or end a study or a trial are not. If the answer to an `enqueue_trial` in
an objective is lost, the trial is queued twice.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TypeVar

from hpo.errors import NoAnswer, Outage, StorageGone
from hpo.storage.connect import OUTAGES, cause

log = logging.getLogger(__name__)
Result = TypeVar("Result")
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
IDLE_SECONDS = 1.0  # for which a thread waits for the next call
STOPPING_SECONDS = 5.0  # a process that was asked to stop retries for so long


class Retry:
    """Calls actions, and retries them while the storage fails."""

    def __init__(
        self,
        seconds: float,
        stopping: Callable[[], bool] = lambda: False,
        *,
        passing: tuple[type[Exception], ...] = OUTAGES,
    ) -> None:
        """Set the time limit.

        Args:
            seconds: how long an action is retried.
            stopping: returns whether the process was asked to stop. Retries then end after STOPPING_SECONDS.
            passing: the errors after which an action is retried.
        """
        self.seconds = seconds
        self.stopping = stopping
        self._passing = passing
        self._thread = threading.local()
        self.is_waiting = False  # for the storage, between two tries

    def __call__(self, action: Callable[[], Result]) -> Result:
        """Call `action`, and retry while the storage fails. Raises Outage after the time limit."""
        if (answer_seconds := getattr(self._thread, "answer_seconds", None)) is not None:
            return within(answer_seconds, action)
        failing_since: float | None = None
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return action()
            except StorageGone:  # never retried: the file does not come back by itself
                raise
            except self._passing as error:
                if failing_since is None:
                    failing_since = time.monotonic()
                    log.warning("the storage fails, waiting for it: %s", cause(error))
                borne = min(self.seconds, STOPPING_SECONDS) if self.stopping() else self.seconds
                if time.monotonic() - failing_since >= borne:
                    raise Outage(cause(error)) from error
            self.is_waiting = True
            time.sleep(random.uniform(0.5, 1.0) * pause)  # random, so that waiting processes do not retry together
            self.is_waiting = False
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    @contextmanager
    def without_retry(self, answer_seconds: float) -> Iterator[None]:
        """Within this context, do not retry in this thread. It is for actions that can be left undone.

        Args:
            answer_seconds: how long each action may take. NoAnswer is raised for one that takes longer.
        """
        self._thread.answer_seconds = answer_seconds
        try:
            yield
        finally:
            self._thread.answer_seconds = None


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """Call `action` in another thread and wait for it. Raises NoAnswer if it takes longer; it may still be done then."""
    try:
        caller = _idle.pop()
    except IndexError:
        caller = _Caller()
        caller.start()
    answer: SimpleQueue[Callable[[], Result]] = SimpleQueue()
    caller.asked.put((action, answer))
    try:
        outcome = answer.get(timeout=seconds)
    except Empty:
        raise NoAnswer(f"no answer from the storage for {seconds:g} s") from None
    return outcome()


class _Caller(threading.Thread):
    """A thread that calls actions one after the other. It ends when nobody asks it for IDLE_SECONDS.

    A new thread for each call took a tenth of a millisecond, on busy cores three times as long.
    """

    def __init__(self) -> None:
        super().__init__(name="storage", daemon=True)
        self.asked: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[Callable[[], Any]]]] = SimpleQueue()

    def run(self) -> None:
        while True:
            try:
                action, answer = self.asked.get(timeout=IDLE_SECONDS)
            except Empty:
                with suppress(ValueError):  # it has just been taken, so an action comes
                    _idle.remove(self)
                    return
                continue
            outcome = _outcome(action)
            _idle.append(self)
            answer.put(outcome)
            del action, answer, outcome  # what they hold is freed now, not at the next action


_idle: list[_Caller] = []
os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads


def _outcome(action: Callable[[], Result]) -> Callable[[], Result]:
    """Call `action`. Return what gives its result, or raises its error."""
    try:
        result = action()
    except BaseException as error:
        return partial(_raised, error)
    return lambda: result


def _raised(error: BaseException) -> NoReturn:
    raise error
