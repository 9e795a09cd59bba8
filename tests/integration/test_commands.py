"""The commands as a person types them, from the study file to the tested weights; interrupted, resumed, joined, read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.integration.shell import forked

REPOSITORY = Path(__file__).parents[2]

DIGITS = """
name = "digits"
[data]
name = "digits"
[model]
name = "mlp"
widths = [8]
dropout = { low = 0.0, high = 0.5 }
[training]
epochs = EPOCHS
[optimizer]
name = { choices = ["sgd", "adamw"] }
lr = { low = 1e-3, high = 1e-1, log = true }
[budget]
trials = 6
[sampler]
name = "random"
[pruner]
name = "none"
"""


class Shell:
    """A folder to type `hpo` commands in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("HPO_")}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "hpo", *arguments],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run a command to its end and return what it printed; what it said on stderr is shown if the code is another."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return out + err

    def forked(self, *arguments: str, code: int = 0) -> str:
        """Run a command in a fork, where nothing hangs on its being a process of its own; return what it said."""
        return forked(arguments, self.folder, self.environment, code)

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return name

    def trials(self, study: str = "digits") -> list[optuna.trial.FrozenTrial]:
        """Read the study as plain Optuna does."""
        storage = optuna.storages.RDBStorage(f"sqlite:///{self.folder}/studies.db")
        try:
            return optuna.load_study(study_name=study, storage=storage).trials
        finally:
            storage.engine.dispose()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.05)


def has_reports(shell: Shell) -> bool:
    """Say whether some trial has reported an epoch, without getting into anybody's way."""
    file = shell.folder / "studies.db"
    if not file.exists():
        return False
    connection = sqlite3.connect(file, timeout=30)
    try:
        return connection.execute("SELECT count(*) FROM hpo_curves").fetchone()[0] > 0
    except sqlite3.OperationalError:  # the table is not made yet
        return False
    finally:
        connection.close()


def test_from_a_study_file_to_tested_weights(shell: Shell) -> None:
    shell.write("digits.toml", DIGITS.replace("EPOCHS", "3"))
    said = shell.run("run", "digits.toml", "--workers", "2")
    assert "winner" in said
    assert "6/6" in said
    assert "\x1b" not in said  # no colours where stdout is no terminal
    assert [trial.state for trial in shell.trials()] == [TrialState.COMPLETE] * 6

    again = shell.forked("run", "digits.toml", "--workers", "2")
    assert "winner" in again
    assert len(shell.trials()) == 6

    summary = json.loads(shell.run("run", "digits.toml", "--trials", "8", "--json"))
    assert (summary["counts"]["complete"], summary["budget"]) == (8, 8)
    assert len(shell.trials()) == 8

    shell.forked("export", "digits", "-o", "best.toml")
    best = max(shell.trials(), key=lambda trial: (trial.value, -trial.number))
    assert tomllib.loads((shell.folder / "best.toml").read_text())["receipt"]["trial"] == best.number
    assert "equal the trial's bit for bit" in shell.forked("train", "best.toml", "--replay")
    trained = shell.forked("train", "best.toml", "-o", "runs/digits")
    assert "test accuracy" in trained
    assert "opened once" in trained
    assert "stays shut" in shell.forked("train", "best.toml", "-o", "runs/digits")
    status = json.loads(shell.forked("status", "digits", "--json"))
    assert status["counts"]["running"] == status["counts"]["waiting"] == status["counts"]["parked"] == 0
    assert "8/8" in shell.forked("status")


def test_a_ctrl_c_parks_the_trials_and_the_next_run_goes_on_with_them(shell: Shell) -> None:
    shell.write("digits.toml", DIGITS.replace("EPOCHS", "150"))
    process = shell.start("run", "digits.toml", "--workers", "2", "--trials", "2")
    wait_for(lambda: has_reports(shell), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    status = json.loads(shell.forked("status", "digits", "--json"))
    assert status["counts"]["running"] == 0
    parked = status["counts"]["parked"]
    assert parked >= 1
    reached = max(trial["epoch"] for trial in status["parked"])
    assert reached >= 1

    said = json.loads(shell.run("run", "digits.toml", "--workers", "2", "--trials", "2", "--json"))
    assert said["counts"]["complete"] == 2
    made = shell.trials()
    assert [trial.state for trial in made] == [TrialState.COMPLETE] * 2
    assert [sorted(trial.intermediate_values) for trial in made] == [list(range(1, 151))] * 2
    shell.forked("export", "digits", "--trial", "0", "-o", "first.toml")
    assert "equal the trial's bit for bit" in shell.forked("train", "first.toml", "--replay")


def test_a_second_ctrl_c_ends_at_once_and_still_loses_nothing(shell: Shell) -> None:
    shell.write("mine.py", STUBBORN)
    shell.write("mine.toml", OWN.replace("FUNCTION", "stubborn"))
    process = shell.start("run", "mine.toml", "--workers", "1")
    wait_for(lambda: (shell.folder / "started").exists(), process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # it waits for the worker, whose objective does not look up
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    status = json.loads(shell.forked("status", "mine", "--json"))
    assert (status["counts"]["running"], status["counts"]["parked"]) == (0, 1)


STUBBORN = """
import pathlib, time
def stubborn(trial):
    pathlib.Path("started").touch()
    time.sleep(600)

def objective(trial):
    return trial.suggest_float("x", 0, 1)

def failing(trial):
    raise RuntimeError("no luck")
"""

OWN = """
name = "mine"
objective = "mine.py:FUNCTION"
direction = "minimize"
[budget]
trials = 3
[sampler]
name = "random"
[pruner]
name = "none"
"""


def test_a_timeout_parks_what_runs_and_ends_well(shell: Shell) -> None:
    shell.write("digits.toml", DIGITS.replace("EPOCHS", "100000"))
    said = shell.run("run", "digits.toml", "--workers", "1", "--timeout", "6s")
    assert "the same command goes on" in said
    parked = json.loads(shell.forked("status", "digits", "--json"))["counts"]["parked"]
    assert parked == len(shell.trials()) >= 1  # all that were in training, however many that was at once


def test_a_worker_joins_by_name_and_a_disagreeing_file_is_refused(shell: Shell) -> None:
    shell.write("digits.toml", DIGITS.replace("EPOCHS", "2"))
    shell.forked("run", "digits.toml", "--workers", "0")
    assert shell.trials() == []
    shell.write("other.toml", DIGITS.replace("EPOCHS", "3"))
    refused = shell.forked("worker", "other.toml", code=2)
    assert "training.epochs: the study has 2, the file has 3" in refused
    shell.write("larger.toml", DIGITS.replace("EPOCHS", "2").replace("trials = 6", "trials = 60"))
    shell.run("worker", "larger.toml")  # a larger budget is no disagreement; the study's own stands
    assert len(shell.trials()) == 6


def test_a_run_of_failed_trials_has_no_winner(shell: Shell) -> None:
    """Failed trials are counted with their reason and end without a winner."""
    shell.write("mine.py", STUBBORN)
    shell.write("mine.toml", OWN.replace("FUNCTION", "failing"))
    said = shell.run("run", "mine.toml", "--workers", "1")
    assert "RuntimeError: no luck" in said
    assert [trial.state for trial in shell.trials("mine")] == [TrialState.FAIL] * 3
    assert "no finished trial" in shell.forked("export", "mine", code=2)
    assert not (shell.folder / "best.toml").exists()


def test_a_fork_takes_along_the_trials_that_fit(shell: Shell) -> None:
    shell.write("digits.toml", DIGITS.replace("EPOCHS", "2"))
    shell.run("run", "digits.toml", "--workers", "1")
    wider = DIGITS.replace("EPOCHS", "2").replace("high = 1e-1", "high = 5e-1").replace("trials = 6", "trials = 2")
    shell.write("wider.toml", wider)
    assert "lr" in shell.forked("run", "wider.toml", code=2)
    said = shell.forked("fork", "digits", "wider", "wider.toml")
    assert "with 6 trials" in said
    shell.run("run", "wider.toml", "--name", "wider", "--workers", "1")
    assert [trial.number for trial in shell.trials("wider")] == list(range(8))
    narrower = DIGITS.replace("EPOCHS", "2").replace("low = 0.0, high = 0.5", "low = 0.6, high = 0.7")
    shell.write("narrow.toml", narrower)
    assert "with 0 trials of 'digits'; 6 do not fit" in shell.forked("fork", "digits", "narrow", "narrow.toml")


@pytest.mark.parametrize(("file", "trials"), [("own_objective.toml", "3"), ("own_model.toml", "3")])
def test_the_examples_run_export_and_train(shell: Shell, file: str, trials: str) -> None:
    shell.forked("check", str(REPOSITORY / "examples" / file))
    shell.run("run", str(REPOSITORY / "examples" / file), "--trials", trials, "--workers", "2")
    name = file.removesuffix(".toml").replace("_", "-")
    shell.forked("export", name, "-o", "best.toml")
    said = shell.forked("train", "best.toml", "-o", "runs/own")
    assert ("the objective returned" if name == "own-objective" else "test accuracy") in said
    assert "Traceback" not in said


def test_a_file_that_only_workers_see_to_be_wrong_leaves_no_study(shell: Shell) -> None:
    text = (REPOSITORY / "examples" / "csv_search.toml").read_text()
    shell.write("wrong.toml", text)  # without the tables beside it
    said = shell.run("run", "wrong.toml", "--workers", "2", code=2)
    assert "csv_images.csv" in said
    assert "there is no study" in shell.forked("status", "csv-search", code=2)


def test_the_example_on_spreadsheets_runs_exports_and_trains(shell: Shell) -> None:
    for name in ("csv_search.py", "csv_search.toml"):
        shutil.copy(REPOSITORY / "examples" / name, shell.folder)
    subprocess.run([sys.executable, "csv_search.py"], cwd=shell.folder, check=True, stdout=subprocess.DEVNULL)
    shell.run("run", "csv_search.toml", "--trials", "2")
    shell.forked("export", "csv-search", "-o", "best.toml")
    assert "test accuracy" in shell.forked("train", "best.toml", "-o", "runs/own")
    assert json.loads((shell.folder / "runs/own/metrics.json").read_text())["classes"] == [
        "digit 1",
        "digit 7",
        "digit 3+digit 8",
    ]


def test_optuna_s_command_line_reads_the_study(shell: Shell) -> None:
    shell.write("mine.py", STUBBORN)
    shell.write("mine.toml", OWN.replace("FUNCTION", "objective"))
    shell.run("run", "mine.toml", "--workers", "1")
    command = [str(Path(sys.executable).with_name("optuna")), "trials", "--study-name", "mine", "-f", "json"]
    listed = subprocess.run(
        [*command, "--storage", f"sqlite:///{shell.folder}/studies.db"], capture_output=True, text=True, check=True
    )
    assert [trial["state"] for trial in json.loads(listed.stdout)] == ["COMPLETE"] * 3


def test_the_demo_s_commands_leave_what_the_readme_promises(shell: Shell) -> None:
    shell.run("run", str(REPOSITORY / "examples" / "digits.toml"), "--trials", "4")
    shell.forked("export", "digits", "-o", "best.toml")
    assert "test accuracy" in shell.forked("train", "best.toml", "-o", "runs/digits")
    left = {path.name + "/" * path.is_dir() for path in shell.folder.iterdir()}
    assert {"studies.db", "best.toml", "runs/"} <= left
    ignored = subprocess.run(
        ["git", "check-ignore", *sorted(left)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert set(ignored.stdout.split()) == left
