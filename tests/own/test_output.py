"""What a program prints is kept in files of bounded size, with its beginning and its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpo.launch.logs import Tail
from hpo.own import output
from hpo.own.output import KeptOutput


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_little_output_is_kept_whole_over_all_attempts(tmp_path: Path) -> None:
    for attempt in (1, 2):
        kept = KeptOutput(tmp_path / "logs", 7)
        kept.begin(attempt)
        kept.write(b"one\n")
        kept.write(b"two")
        kept.write(b" words\n")
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["trial-000007.log"]
    tail = Tail(tmp_path / "logs", trial=7)
    first, *others = tail.lines()
    assert first.startswith("--- attempt 1, ")
    assert others[0:2] == ["one", "two words"]
    assert len(others) == 5
    assert tail.missing(2) is None
    assert tail.missing(3) is not None


def test_of_much_output_the_beginning_and_the_end_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "HEAD_BYTES", 1000)
    monkeypatch.setattr(output, "TAIL_BYTES", 2000)
    kept = KeptOutput(tmp_path, 0)
    for number in range(10_000):
        kept.write(f"{number:09}\n".encode())
    assert size(tmp_path) < 1000 + 2 * 2000 + len(output.LEFT_OUT) + 20
    lines = Tail(tmp_path, trial=0).lines()
    assert lines[:100] == [f"{number:09}" for number in range(100)]
    numbers = [int(line) for line in lines if line.isdigit()]
    assert numbers[-1] == 9999
    assert numbers[100:] == list(range(numbers[100], 10_000))  # without a gap, from the mark on
    assert 200 <= len(numbers[100:]) <= 402
    assert [line for line in lines if line and not line.isdigit()] == [output.LEFT_OUT.decode().strip()]


def test_a_hundred_megabytes_take_one(tmp_path: Path) -> None:
    kept = KeptOutput(tmp_path, 0)
    for _ in range(1600):
        kept.write(b"x" * 2**16)
    kept.write(b"\nthe end\n")
    assert size(tmp_path) < 1.2 * 2**20
    assert Tail(tmp_path, trial=0).lines()[-1] == "the end"


def test_new_lines_are_followed_across_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "HEAD_BYTES", 40)
    monkeypatch.setattr(output, "TAIL_BYTES", 60)
    kept, tail, shown = KeptOutput(tmp_path, 0), Tail(tmp_path, trial=0), list[str]()
    for number in range(40):
        kept.write(f"{number:09}\n".encode())
        shown += tail.lines()
    assert shown == [f"{number:09}" for number in range(40)]


def test_a_full_disk_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").write_text("a file in the place of the folder")
    kept = KeptOutput(tmp_path / "logs", 3)
    kept.write(b"one\n")
    kept.write(b"two\n")
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["trial 3"]


def test_the_trial_that_printed_the_longest_ago_loses_all_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 0 is still running. Its beginning is the oldest file."""
    monkeypatch.setattr(output, "HEAD_BYTES", 1000)
    monkeypatch.setattr(output, "ALL_BYTES", 4000)
    for number, seconds in ((0, 1), (1, 2), (2, 3)):
        KeptOutput(tmp_path, number).write(b"x" * 1500)
        for file in tmp_path.glob(f"trial-{number:06d}*"):
            os.utime(file, (seconds, seconds))
    os.utime(output.tail(tmp_path, 0), (4, 4))
    output.delete_oldest(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "trial-000000.log",
        "trial-000000.tail.log",
        "trial-000002.log",
        "trial-000002.tail.log",
    ]


def test_output_that_cannot_be_deleted_does_not_end_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(output, "ALL_BYTES", 0)
    (tmp_path / "trial-000001.log").mkdir()
    KeptOutput(tmp_path, 2).begin(1)
    assert ["cannot be deleted" in record.getMessage() for record in caplog.records] == [True]
    assert output.head(tmp_path, 2).read_text().startswith("--- attempt 1, ")
