"""The exit codes of workers, the same for every engine.

| code | meaning | what an engine does |
|---|---|---|
| 0 | nothing is left to do, or the worker was taken out of the launch | nothing |
| 138, 140, 143 | left after SIGUSR1, SIGUSR2 or SIGTERM | runs it again; this is no failure |
| 75 | the storage was away for too long | runs it again; this is no failure |
| 2 | the user must change something first | never runs it again |
| else | a failure | counts it |
"""

from __future__ import annotations

import signal

DONE = 0
FAILED = 1
USAGE_ERROR = 2  # a fault that a restart would not mend
TRY_AGAIN = 75  # the storage failed: EX_TEMPFAIL of sysexits.h
PARKED = tuple(128 + number for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))
RUN_AGAIN = (TRY_AGAIN, *sorted(PARKED))


def of(word: str, asked_by: int | None) -> int:
    """Return the exit code of a supervised worker. What user code has exited with does not count.

    A worker that the engine asked to leave is run again, even if it had to be killed: a preemption is no failure.

    Args:
        word: the exit code that the worker recorded as it left in order; "" if it did not.
        asked_by: the signal by which the engine asked it to leave.
    """
    if not word.isdecimal():
        return FAILED if asked_by is None else 128 + asked_by
    code = int(word)
    if code > 128 and asked_by is not None:
        return 128 + asked_by  # the worker itself was asked by another signal
    return code if code in (DONE, USAGE_ERROR, *RUN_AGAIN) else FAILED
