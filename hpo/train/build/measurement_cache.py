"""Measurements of this machine, kept between processes in a small JSON file in the user's cache folder.

It is only a cache. An unreadable entry is measured again, and a failed write is ignored. If two processes write at the
same time, one entry may be lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from hpo.files import cache_folder, write_json

log = logging.getLogger(__name__)


def home() -> Path:
    """Return the path of the file, in the user's cache folder."""
    return cache_folder() / "measured.json"


def recall(key: str) -> Any:
    """Return the value that is kept under a key, or None."""
    return _read().get(key)


def keep(key: str, value: Any) -> None:
    """Keep a value of plain Python types under a key. A failed write is only logged."""
    file = home()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**_read(), key: value})
    except OSError as error:
        log.info("%s cannot be written (%s); the measurement is repeated next time", file, error)


def _read() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(home().read_text())
        if isinstance(found, dict):
            return found
    return {}
