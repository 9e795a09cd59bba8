"""The folders of a command's attempts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hpo.study import program_folder
from hpo.study.program_folder import of_attempt


def test_an_attempt_takes_over_the_newest_folder_of_an_earlier_one(tmp_path: Path) -> None:
    for attempt in (1, 2, 4):
        of_attempt(tmp_path, attempt).mkdir()
        (of_attempt(tmp_path, attempt) / "saved").write_text(str(attempt))
    program_folder.take_over(tmp_path, 3)
    assert {(folder.name, (folder / "saved").read_text()) for folder in tmp_path.iterdir()} == {
        ("checkpoint-3", "2"),
        ("checkpoint-4", "4"),
    }
    assert program_folder.newest(tmp_path) == of_attempt(tmp_path, 4)


def test_a_program_that_still_saves_does_not_keep_the_next_attempt_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saves a file after the folder was emptied, so the folder cannot be removed."""
    rmdir = os.rmdir

    def rmdir_too_late(path: str, **given: Any) -> None:
        (of_attempt(tmp_path, 1) / "saved").touch()
        rmdir(path, **given)

    of_attempt(tmp_path, 1).mkdir()
    monkeypatch.setattr(os, "rmdir", rmdir_too_late)
    program_folder.delete(tmp_path, 2)
    assert program_folder.holds_files(of_attempt(tmp_path, 1))
