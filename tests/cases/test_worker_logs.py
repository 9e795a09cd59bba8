"""What workers and user code print is kept to a size, and logs to a number."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import pytest

from hpo.launch import logs
from tests.cases.test_exit_codes import run_fleet
from tests.support.trials import MakeStudy

PRINTING = """
import os, subprocess, time
def objective(trial):
    for number in range(100):
        print(f"line {number} " + "x" * 1000, flush=True)
        os.write(2, b"y" * 1000)
        time.sleep(0.005)
    subprocess.run(["sh", "-c", "echo from a child; echo the last"])
    return 1.0
"""


def test_what_user_code_prints_is_bounded(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 20_000)
    study = make_study(trials=2)
    fleet = run_fleet(study, PRINTING)
    (slot,) = fleet.slots
    sizes = [path.stat().st_size for path in (slot.log, logs.before(slot.log))]
    assert max(sizes) <= 60_000  # and what is printed between two looks
    assert logs.before(slot.log).stat().st_size <= 20_000
    assert sorted(path.name for path in slot.log.parent.iterdir()) == [slot.log.name, f"{slot.log.name}.1"]
    assert "the last" in logs.last_lines(slot.log, 12)


def test_a_log_is_cut_off_under_whoever_writes_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 10)
    log = tmp_path / "worker-a.log"
    with log.open("ab", buffering=0) as written:
        written.write(b"0123456789")
        logs.bound(log)
        assert (log.read_text(), logs.before(log).exists()) == ("0123456789", False)
        written.write(b"abc\n")
        logs.bound(log)
        assert (log.read_bytes(), logs.before(log).read_text()) == (b"", "456789abc\n")
        written.write(b"def\n")
        subprocess.run(["echo", "ghi"], stdout=written, check=True)
    assert log.read_text() == "def\nghi\n"
    assert logs.last_lines(log, 3) == ["456789abc", "def", "ghi"]
    logs.bound(tmp_path / "none.log")


def test_old_logs_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not those of workers that may live: on this machine one can look, on another one the last line tells."""
    monkeypatch.setattr(logs, "KEPT", 2)
    (gone := subprocess.Popen(["true"])).wait()
    here, ended = f"worker-{platform.node()}-{os.getpid()}-0.log", f"worker-{platform.node()}-{gone.pid}-0.log"
    kept = [("mine.txt", 1e9), (here, 9e8), (f"{here}.1", 9e8), ("worker-other-1-0.log", 100), ("worker-1.log", 2)]
    deleted = [
        (ended, 3),
        (f"{ended}.1", 4),
        (f"{ended}.0a1b2c3d", 5),
        ("worker-other-2-0.log", 9e8),
        ("worker-2.log", 9e8),
    ]
    for name, age in [*kept, *deleted, ("worker-3.log", 1)]:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    logs.delete_old(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"worker-3.log", *(name for name, _ in kept)}
