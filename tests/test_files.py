"""Files appear whole and on the disk, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.files import atomic_write


def test_file_and_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is synced before the rename, the folder after it."""
    path = tmp_path / "a.json"
    calls: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    def renamed(source: Path, target: Path) -> None:
        calls.append(("replace", source.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_write(path) as part:
        part.write_text("new")
    assert calls == [("fsync", part.name), ("replace", part.name), ("fsync", tmp_path.name)]
    assert path.read_text() == "new"


def write(path: Path, then: Callable[[], None] | None) -> None:
    with atomic_write(path) as part:
        part.write_text("new")
        if then:
            then()


@pytest.mark.parametrize("failing", ["fsync", "replace", None])
def test_a_failure_leaves_the_older_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str | None
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    path = tmp_path / "a.json"
    path.write_text("old")
    if failing:
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, fail if failing is None else None)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
