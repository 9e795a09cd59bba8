"""What a result was made from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import optuna

from hpo.receipt import git_commit, receipt


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_says_whether_tracked_files_differ_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert git_commit(tmp_path) == head
    git_commit.cache_clear()
    (tmp_path / "a.py").write_text("2")
    assert git_commit(tmp_path) == f"{head}-dirty"


def test_outside_of_git_there_is_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == ""


def test_a_receipt_holds_what_the_caller_knows_beside_the_machine(tmp_path: Path) -> None:
    made = receipt(folder=tmp_path, device="cpu", threads=1, seed=7)
    assert made["seed"] == 7
    assert made["versions"]["optuna"] == optuna.__version__
    assert made.keys() >= {"commit", "device", "threads", "processor", "host", "pid"}
