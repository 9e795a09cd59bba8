"""The folder in which a command's program saves. Each attempt of a trial has one, so two programs never share a folder."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

OF_ATTEMPT = re.compile(r"checkpoint-(\d+)")


def of_attempt(trial_folder: Path, attempt: int) -> Path:
    """Return the folder of an attempt. It need not exist."""
    return trial_folder / f"checkpoint-{attempt}"


def newest(trial_folder: Path, *, up_to: int | None = None) -> Path | None:
    """Return the folder of the latest attempt that has one, None if no attempt has.

    Args:
        trial_folder: the folder of the trial.
        up_to: the last attempt that counts. By default all count.
    """
    attempts = [attempt for attempt in _attempts(trial_folder) if up_to is None or attempt <= up_to]
    return of_attempt(trial_folder, max(attempts)) if attempts else None


def _attempts(trial_folder: Path) -> list[int]:
    """Return the attempts that have a folder."""
    names = [file.name for file in trial_folder.iterdir()] if trial_folder.is_dir() else []
    return [int(match[1]) for name in names if (match := OF_ATTEMPT.fullmatch(name))]


def take_over(trial_folder: Path, attempt: int) -> None:
    """Make the newest folder that of this attempt, and delete those of earlier attempts.

    A program of an earlier attempt may still run. What it opens from now on does not reach this attempt's folder.
    """
    target = of_attempt(trial_folder, attempt)
    while (found := newest(trial_folder, up_to=attempt)) and found != target:
        with suppress(FileNotFoundError):  # a worker whose lease has expired may have renamed it just now
            found.rename(target)
    delete(trial_folder, attempt - 1)


def delete(trial_folder: Path, attempt: int) -> None:
    """Delete the folders of this and of earlier attempts.

    A program of an earlier attempt may still save there. Then something may stay, which no later attempt reads.
    """
    for found in _attempts(trial_folder):
        if found <= attempt:
            shutil.rmtree(of_attempt(trial_folder, found), ignore_errors=True)


def holds_files(folder: Path | None) -> bool:
    """Return whether a program has saved something in its folder."""
    return folder is not None and folder.is_dir() and any(folder.iterdir())
