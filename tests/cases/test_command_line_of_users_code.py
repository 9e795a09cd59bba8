"""Code of the user's own sees its own file as the command line, and nothing of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.spec import usercode
from tests.integration.shell import Shell

ARGPARSE = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, {option})
arguments = parser.parse_args()
def objective(trial): return arguments.lr
"""
#: Its trials, the second of them in a process that started afresh, and children of both kinds see what it saw when imported.
#: It sets what may be set once in a process, and goes to a folder that is there once.
TOLD = """
import multiprocessing
import os
import sys

FIRST = multiprocessing.get_start_method(allow_none=True)  # None: the platform's default, which DataLoader takes too
if FIRST is None:
    multiprocessing.set_start_method("spawn")
os.chdir(os.path.join(os.path.dirname(__file__), "inside"))

SEEN = list(sys.argv)

class Double:
    def __call__(self, number):
        assert sys.argv == SEEN == [__file__], (sys.argv, SEEN)
        return 2 * number

def objective(trial):
    trial.suggest_float("x", 0, 1)
    assert sys.argv == SEEN == [__file__], (sys.argv, SEEN)
    assert FIRST is None, FIRST
    assert (multiprocessing.get_start_method(), os.path.basename(os.getcwd())) == ("spawn", "inside")
    total = 0
    for method in ("spawn", "forkserver")[trial.number :]:
        with multiprocessing.get_context(method).Pool(1) as pool:
            total += sum(pool.map(Double(), [1, 2]))
    return total
"""


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hpo", "run", "study.toml", "--workers", "2"])


def test_a_parser_takes_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ARGPARSE.format(option="default=0.5"))
    assert usercode.load_objective("train.py:objective", tmp_path)(None) == 0.5
    assert sys.argv == [str(tmp_path / "train.py")]


def test_a_parser_that_wants_arguments_speaks_of_its_own_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(ARGPARSE.format(option="required=True"))
    with pytest.raises(SpecError) as caught:
        usercode.load_objective("train.py:objective", tmp_path)
    assert str(caught.value) == (
        f"objective: importing train.py failed: SystemExit: 2 ({tmp_path}/train.py:5); "
        'put code that is only for the command line below `if __name__ == "__main__":`'
    )
    assert capsys.readouterr().err == (
        "usage: train.py [-h] --lr LR\ntrain.py: error: the following arguments are required: --lr\n"
    )


def test_each_file_sees_itself(tmp_path: Path) -> None:
    """Of several files each sees its own name, in a package too, and again whenever its part is made."""
    (tmp_path / "pkg").mkdir()
    for name in ("net.py", "source.py", "pkg/__init__.py", "pkg/deep.py"):
        (tmp_path / name).write_text("import sys\nSEEN = list(sys.argv)\ndef part(): return SEEN, list(sys.argv)\n")
    references = {"net.py:part": "net.py", "source:part": "source.py", "pkg.deep:part": "pkg/deep.py"}
    for _ in range(2):
        for reference, file in references.items():
            own = [str(tmp_path / file)]
            assert usercode.load(reference, tmp_path, "model.name")() == (own, own)


def test_it_holds_in_the_launcher_in_workers_and_in_their_children(tmp_path: Path) -> None:
    """Classes of the file are found by children that are spawned or forked from a server, as DataLoader's workers are."""
    shell = Shell(tmp_path, f"sqlite:///{tmp_path}/studies.db")
    shell.write(TOLD, trials=2, more="[recovery]\nrecycle_trials = 1\n")
    (tmp_path / "inside").mkdir()
    said = shell.run("run", "own.toml", "--workers", "1", "--storage", "sqlite:///own.db")
    assert (tmp_path / "own.db").exists()
    assert "2 of 2 finished: 2 complete" in said, said
    assert "winner   trial 1 with 6" in said
