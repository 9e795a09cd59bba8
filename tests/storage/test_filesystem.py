"""The kind of file system is the system's own word for it, on mounts that are really there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from hpo.storage import filesystem


def df(path: Path) -> str:
    """Return what df says of a path that is there."""
    done = subprocess.run(["df", "--output=fstype", str(path)], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def mount(monkeypatch: pytest.MonkeyPatch, *mounts: tuple[Path, str]) -> None:
    """Let psutil list these mounts and no others."""
    one = psutil.disk_partitions(all=True)[0]
    listed = [one._replace(mountpoint=str(point), fstype=kind) for point, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: listed)


@pytest.mark.parametrize("path", ["/proc", "/proc/self/status", "/sys", "/dev/shm", "/"])
def test_a_mount_is_called_what_df_calls_it(path: str) -> None:
    assert filesystem.kind_of(Path(path)) == df(Path(path))


def test_a_folder_of_ours_is_on_a_local_disk(tmp_path: Path) -> None:
    assert filesystem.kind_of(tmp_path) == df(tmp_path)
    assert filesystem.kind_of(tmp_path) not in filesystem.NETWORK


def test_a_path_that_is_not_there_yet_would_lie_where_its_folder_lies(tmp_path: Path) -> None:
    assert filesystem.kind_of(tmp_path / "no" / "studies.db") == df(tmp_path)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert filesystem.kind_of(tmp_path / "link" / "self") == "proc"


def test_a_relative_path_is_one_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    assert filesystem.kind_of(Path("studies.db")) == "proc"


def test_the_innermost_mount_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share, scratch = tmp_path / "share", tmp_path / "share" / "scratch"
    mount(monkeypatch, (share, "nfs4"), (Path("/"), "ext4"), (scratch, "xfs"))
    assert filesystem.kind_of(tmp_path) == "ext4"
    assert filesystem.kind_of(share / "studies.db") == "nfs4"
    assert filesystem.kind_of(tmp_path / "shared") == "ext4"
    assert filesystem.kind_of(scratch / "studies.db") == "xfs"


def test_of_two_mounts_at_one_place_the_later_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(monkeypatch, (tmp_path, "ext4"), (tmp_path, "nfs4"))
    assert filesystem.kind_of(tmp_path / "studies.db") == "nfs4"


def test_where_nothing_is_known_the_kind_is_empty_and_no_network_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(monkeypatch)
    assert filesystem.kind_of(tmp_path) == ""
    assert "" not in filesystem.NETWORK
