"""The clocks of this machine that nobody can set, for what must not follow its wall clock.

Wall clocks are set: by hand, by NTP, as a machine wakes up. What lasts a while is measured by these.
"""

from __future__ import annotations

import platform
import time
from functools import cache
from pathlib import Path

#: Added to the time awake. An hpo of before reads a lease as seconds since 1970, and this is the year 2286: it leaves it alone.
FAR = 1e10
BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")


def awake_or_asleep() -> float:
    """Return seconds since the machine started, its sleep included where the system counts that."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def awake() -> float:
    """Return FAR and the seconds for which the machine has been awake since it started: in its sleep nobody can renew a lease."""
    return FAR + time.monotonic()


@cache
def name() -> str | None:
    """Return which clock `awake` is, since it starts anew with the machine: BOOT@HOST; None if the system does not tell."""
    try:
        return f"{BOOT_FILE.read_text().strip()}@{platform.node()}"
    except OSError:
        return None


def started_at() -> float:
    """Return when the machine started by its wall clock, as that is set now: seconds since 1970."""
    return time.time() - awake_or_asleep()
