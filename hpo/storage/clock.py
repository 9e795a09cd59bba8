"""Clocks of this machine that nobody can set. Durations are measured by them.

A wall clock can be set: by hand, by NTP, or when a machine wakes up.
"""

from __future__ import annotations

import platform
import time
from functools import cache
from pathlib import Path

#: Added to the time awake. An earlier hpo reads leases as seconds since 1970, so these end in the year 2286 for it.
FAR = 1e10
BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")


def awake_or_asleep() -> float:
    """Return the seconds since the machine started. Its sleep is included where the system counts it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def awake() -> float:
    """Return FAR plus the seconds awake since the machine started. While it sleeps nobody can renew a lease."""
    return FAR + time.monotonic()


@cache
def name() -> str | None:
    """Return the name of the clock of `awake`, BOOT@HOST: it restarts with the machine. None if there is no boot id."""
    try:
        return f"{BOOT_FILE.read_text().strip()}@{platform.node()}"
    except OSError:
        return None


def started_at() -> float:
    """Return when the machine started, in seconds since 1970 by its wall clock as it is set now."""
    return time.time() - awake_or_asleep()
