"""What workers and user code print is kept to a size, and logs to a number."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import pytest

from hpo.launch import logs
from hpo.storage.connect import plain_url
from tests.cases.test_exit_codes import run_fleet
from tests.cli.test_commands import Hpo, hpo
from tests.support.trials import MakeStudy

__all__ = ["hpo"]

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


def test_what_user_code_prints_is_shown(hpo: Hpo, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=2)
    monkeypatch.setenv("HPO_STORAGE", plain_url(study.storage.url))
    code, _, err = hpo("logs", "own")
    assert (code, err.partition(";")[0]) == (2, "error: study 'own': no log can be read")
    (slot,) = run_fleet(study, "def objective(trial): return print(f'I am {trial.number}', end='') or 1.0\n").slots
    stamps = [line.rpartition("INFO ")[::2] for line in slot.log.read_text().splitlines()]
    begun = [f"{stamp}INFO {said}" for stamp, said in stamps if said == "trial 1 begins, attempt 1"]
    for options in ([], ["--worker", "0"]):
        assert hpo("logs", "own", *options) == (0, slot.log.read_text(), "")
    code, said, err = hpo("logs", "own", "--trial", "1")
    assert (code, err) == (0, "")
    assert (said.splitlines()[0], said.count("I am"), said.count("I am 1")) == (begun[0], 1, 1)
    slot.log.unlink()
    code, said, err = hpo("logs", "own", "--trial", "1")
    assert (code, said, err.partition(",")[0]) == (2, "", "error: study 'own': trial 1: the log of attempt 1 is gone")


def line(said: str) -> str:
    return f"2026-11-29 22:00:00,000 INFO {said}\n"


def test_the_lines_of_a_trial_are_found_in_all_logs(tmp_path: Path) -> None:
    first, second = tmp_path / "worker-a-b-1-0.log", tmp_path / "worker-a-b-2-0.log"
    begins = [line(f"trial 7 begins, attempt {attempt}") for attempt in (1, 2, 3)]
    logs.before(first).write_text(line("joined study 'own'") + begins[0] + "one, cut")
    first.write_text(" off\nbar 1\rbar 2\r\n" + line("trial 7 parked") + "two\n")
    second.write_text(line("trial 8 begins, attempt 1") + begins[2] + "3" + line("trial 8 settled") + "killed here\n")
    os.utime(first, (1, 1))
    with second.open("a") as file:
        file.write(line("joined study 'own' again") + "after\n")
    tail = logs.Tail(tmp_path, trial=7)
    found = [begins[0], "one, cut off\n", "bar 2\n", line("trial 7 parked"), begins[2], "3" + line("trial 8 settled")]
    assert "\n".join([*tail.lines(), ""]) == "".join([*found, "killed here\n"])
    assert (tail.lines(), tail.rest()) == ([], [])
    assert str(tail.missing(3)).startswith("trial 7: the log of attempt 2 is gone")


def test_logs_are_followed(tmp_path: Path) -> None:
    """Also when one is cut off, and when a worker comes. Only of the last run on each machine."""
    old, first, second = (tmp_path / f"worker-{name}.log" for name in ("here-1-0", "here-2-0", "here-2-1"))
    old.write_text("old\n")
    first.write_text("a\nb")
    os.utime(old, (1, 1))
    tail = logs.Tail(tmp_path)
    assert tail.lines() == ["a"]
    with first.open("a") as file:
        file.write("c\nlonger than what follows\n")
    assert tail.lines() == ["bc", "longer than what follows"]
    first.write_text("anew\n")
    second.write_text("d")
    assert tail.lines() == ["0 | anew"]
    assert tail.rest() == ["1 | d"]
    (tmp_path / "worker-there-5-0.log").write_text("e\n")
    assert tail.lines() == ["there:0 | e"]


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


def test_the_last_entry_of_a_log_is_the_worker_s_own(tmp_path: Path) -> None:
    """What user code prints is no entry, nor is what stands far from the end."""
    log = tmp_path / "worker-a.log"
    assert logs.last_entry(log) == ""
    log.write_text("2026-11-29 22:57:50,585 INFO first\n2026-11-29 22:57:51,001 WARNING second: half\nprinted\n\xff\n")
    assert logs.last_entry(log) == "second: half"
    with log.open("a") as written:
        written.write("x\n" * logs.LAST_BYTES)
    assert logs.last_entry(log) == ""


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
