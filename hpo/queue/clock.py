"""The clock by which this process measures what others measure by the database's: it goes on while the machine sleeps."""

from __future__ import annotations

import time


def awake_or_asleep() -> float:
    """Return seconds since the machine started, its sleep included where the system counts that."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
