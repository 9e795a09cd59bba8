"""A JSON file that appears whole or not at all, and holds nothing that JSON does not know; read back, or refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from hpo.errors import StudyError


def read_json(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file; StudyError if it is none."""
    if not path.is_file():  # a pipe would be waited for
        raise StudyError(f"{path}: cannot be read: it is no file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path}: is no JSON any more: {error}; restore it, or name another folder") from None
    if not isinstance(found, dict):
        raise StudyError(f"{path}: holds no table of values; restore it, or name another folder")
    return found


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(without_nan(values), indent=2, allow_nan=False) + "\n")
    os.replace(part, path)


def without_nan(value: Any) -> Any:
    """Return the value with None for every number that JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
