"""What was measured on this machine, kept between processes: a small file of JSON in the user's cache folder.

It is a cache: what cannot be read is measured again, what cannot be written is not kept, and of two processes that write at
once one's entry may be lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from hpo.files import write_json

log = logging.getLogger(__name__)


def home() -> Path:
    """Return the file: in HPO_CACHE, else in XDG_CACHE_HOME/hpo, else in ~/.cache/hpo."""
    folder = os.environ.get("HPO_CACHE")
    base = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpo"
    return base / "measured.json"


def recall(key: str) -> Any:
    """Return what was kept under a key, None if there is nothing."""
    return _read().get(key)


def keep(key: str, value: Any) -> None:
    """Keep a plain value under a key."""
    file = home()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**_read(), key: value})
    except OSError as error:
        log.info("%s cannot be written (%s); it is measured again next time", file, error)


def _read() -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(home().read_text())
        if isinstance(found, dict):
            return found
    return {}
