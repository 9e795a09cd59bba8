"""The commands as a person types them, from the study file to the tested weights; interrupted, resumed, joined, read."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState

from hpo.study.format import with_interval
from hpo.study.interval import wilson
from tests.integration.shell import forked
from tests.support.waiting import PATIENCE

REPOSITORY = Path(__file__).parents[2]

#: The demo, with fewer and shorter trials.
DEMO = (REPOSITORY / "examples" / "digits.toml").read_text()
DEMO = DEMO.replace("epochs = 20\n", "epochs = 3\n").replace("trials = 64\n", "trials = 6\n")
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
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return out + err

    def forked(self, *arguments: str, code: int = 0, prepare: Callable[[], object] = bool) -> str:
        """Run a command in a fork, where nothing hangs on its being a process of its own; return what it said."""
        return forked(arguments, self.folder, self.environment, code, prepare)

    def search(self, file: str, name: str, *arguments: str) -> None:
        """Search what a study file asks for, as `hpo run` does, but by one worker that is a fork."""
        self.forked("run", file, "--workers", "0", *arguments)
        self.forked("worker", name)

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


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = PATIENCE) -> None:
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
    """The demo's commands do and leave what the README promises."""
    shell.write("digits.toml", DEMO)
    said = shell.run("run", "digits.toml")
    assert "\nchance   the best of 6 trials, each at its best epoch, is partly luck\n" in said
    assert "6/6" in said
    assert "hpo export digits -o digits-best.toml && hpo train digits-best.toml -o runs/digits-best" in said
    assert "\x1b" not in said  # no colours where stdout is no terminal
    assert [trial.state for trial in shell.trials()] == [TrialState.COMPLETE] * 6

    again = shell.forked("run", "digits.toml", "--workers", "2")
    assert "winner" in again
    assert len(shell.trials()) == 6

    exported = shell.forked("export", "digits", "-o", "best.toml")
    best = max(shell.trials(), key=lambda trial: (trial.value, -trial.number))
    shown = with_interval(best.value, wilson(best.value, 270))
    assert f"winner   trial {best.number} with {shown}\n" in said
    assert (
        f"wrote best.toml: trial {best.number}, {shown}; next: hpo train best.toml -o runs/best\nchance   " in exported
    )
    assert tomllib.loads((shell.folder / "best.toml").read_text())["receipt"]["trial"] == best.number
    assert "equal the trial's bit for bit" in shell.forked("train", "best.toml", "--replay")
    trained = shell.forked("train", "best.toml", "-o", "runs/digits")
    assert re.search(r"^test accuracy 0\.\d{4} \(0\.\d{4} to \d\.\d{4}, n = 270\)$", trained, re.MULTILINE)
    assert re.search(r"^test split of trial \d+: opened once, for .*/runs/digits$", trained, re.MULTILINE)
    assert "the test split is not opened again" in shell.forked("train", "best.toml", "-o", "runs/digits")
    status = json.loads(shell.forked("status", "digits", "--json"))
    assert status["counts"]["running"] == status["counts"]["waiting"] == status["counts"]["parked"] == 0
    assert "6/6" in shell.forked("status")

    left = {path.name + "/" * path.is_dir() for path in shell.folder.iterdir()} - {"digits.toml"}
    assert {"studies.db", "best.toml", "runs/"} <= left
    ignored = subprocess.run(
        ["git", "check-ignore", *sorted(left)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert set(ignored.stdout.split()) == left

    command = [str(Path(sys.executable).with_name("optuna")), "trials", "--study-name", "digits", "-f", "json"]
    listed = subprocess.run(
        [*command, "--storage", f"sqlite:///{shell.folder}/studies.db"], capture_output=True, text=True, check=True
    )
    assert [trial["state"] for trial in json.loads(listed.stdout)] == ["COMPLETE"] * 6


def test_a_ctrl_c_parks_the_trials_and_the_next_run_goes_on_with_them(shell: Shell) -> None:
    shell.write("slow.py", SLOW_MODEL)
    slow = DIGITS.replace('"mlp"\nwidths = [8]', '"slow:net"').replace("EPOCHS", "40")
    shell.write("digits.toml", 'executor = "loop"\n' + slow)  # auto may change amid a trial
    process = shell.start("run", "digits.toml", "--workers", "2", "--trials", "2")
    wait_for(lambda: has_reports(shell), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    status = json.loads(shell.forked("status", "digits", "--json"))
    assert status["counts"]["running"] == 0
    parked = status["counts"]["parked"]
    assert parked >= 1
    reached = max(trial["epoch"] for trial in status["parked"])
    assert reached >= 1

    shell.write("go", "")
    shell.forked("worker", "digits")
    *_, summary = shell.forked("run", "digits.toml", "--trials", "2", "--json").splitlines()  # after what stderr says
    said = json.loads(summary)
    assert (said["counts"]["complete"], said["budget"]) == (2, 2)
    made = shell.trials()
    assert [trial.state for trial in made] == [TrialState.COMPLETE] * 2
    assert [sorted(trial.intermediate_values) for trial in made] == [list(range(1, 41))] * 2
    shell.forked("export", "digits", "--trial", "0", "-o", "first.toml")
    assert "equal the trial's bit for bit" in shell.forked("train", "first.toml", "--replay")


SLOW_MODEL = """
import time
from pathlib import Path

from torch import nn

GO = Path(__file__).with_name("go")

class Net(nn.Module):
    def __init__(self, inputs, classes, dropout):
        super().__init__()
        self.dropout, self.layer = nn.Dropout(dropout), nn.Linear(inputs, classes)

    def forward(self, images):
        if not GO.exists():
            time.sleep(0.01)  # so the trials cannot end before the signal
        return self.layer(self.dropout(images.flatten(1)))

def net(input_shape, num_classes, dropout):
    return Net(input_shape[0] * input_shape[1] * input_shape[2], num_classes, dropout)
"""


def test_a_second_ctrl_c_ends_at_once_and_still_loses_nothing(shell: Shell) -> None:
    shell.write("mine.py", STUBBORN)
    shell.write("mine.toml", OWN.replace("FUNCTION", "stubborn"))
    process = shell.start("run", "mine.toml", "--workers", "1")
    wait_for(lambda: (shell.folder / "started").exists(), process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # it waits for the worker, whose objective does not look up
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "each goes on from its last checkpoint, or starts again with the same parameters" in said
    assert "with a checkpoint" not in said
    status = json.loads(shell.forked("status", "mine", "--json"))
    assert (status["counts"]["running"], status["counts"]["parked"]) == (0, 1)


STUBBORN = """
import pathlib, time
def stubborn(trial):
    pathlib.Path("started").touch()
    time.sleep(600)

def slow(trial):
    for step in range(1, 6000):
        trial.report(0.0, step)
        pathlib.Path("started").touch()
        time.sleep(0.1)

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


def time_passes_once_it_has_started() -> None:
    """Let the launcher's clock jump by an hour when the first trial runs, however long a busy machine takes until then."""
    from hpo.launch import launcher

    def monotonic() -> float:
        return time.monotonic() + 3600 * Path("started").exists()

    vars(launcher)["time"] = SimpleNamespace(**(vars(time) | {"monotonic": monotonic}))


def test_a_timeout_parks_what_runs_and_ends_well(shell: Shell) -> None:
    shell.write("mine.py", STUBBORN)
    shell.write("mine.toml", OWN.replace("FUNCTION", "slow"))
    command = ("run", "mine.toml", "--workers", "1", "--timeout", "1h")
    said = shell.forked(*command, prepare=time_passes_once_it_has_started)
    assert "the same command continues" in said
    counts = json.loads(shell.forked("status", "mine", "--json"))["counts"]
    assert (counts["running"], counts["parked"], len(shell.trials("mine"))) == (0, 1, 1)


def test_a_worker_joins_by_name_and_a_disagreeing_file_is_refused(shell: Shell) -> None:
    shell.write("digits.toml", DIGITS.replace("EPOCHS", "2"))
    shell.forked("run", "digits.toml", "--workers", "0")
    assert shell.trials() == []
    shell.write("other.toml", DIGITS.replace("EPOCHS", "3"))
    refused = shell.forked("worker", "other.toml", code=2)
    assert "training.epochs: the study has 2, the file has 3" in refused
    shell.write("larger.toml", DIGITS.replace("EPOCHS", "2").replace("trials = 6", "trials = 60"))
    shell.forked("worker", "larger.toml")  # a larger budget is no disagreement; the study's own stands
    assert len(shell.trials()) == 6


def test_a_run_of_failed_trials_has_no_winner(shell: Shell) -> None:
    """Failed trials are counted with their reason and end without a winner, which the exit code tells too."""
    shell.write("mine.py", STUBBORN)
    shell.write("mine.toml", OWN.replace("FUNCTION", "failing"))
    said = shell.forked("run", "mine.toml", "--workers", "1", code=1)
    assert "RuntimeError: no luck" in said
    assert [trial.state for trial in shell.trials("mine")] == [TrialState.FAIL] * 3
    assert "none of its trials is complete (3 failed)" in shell.forked("export", "mine", code=2)
    assert not (shell.folder / "best.toml").exists()


def test_a_fork_takes_along_the_trials_that_fit(shell: Shell) -> None:
    shell.write("digits.toml", DIGITS.replace("EPOCHS", "2"))
    shell.search("digits.toml", "digits")
    wider = DIGITS.replace("EPOCHS", "2").replace("high = 1e-1", "high = 5e-1").replace("trials = 6", "trials = 2")
    shell.write("wider.toml", wider)
    assert "lr" in shell.forked("run", "wider.toml", code=2)
    said = shell.forked("fork", "digits", "wider", "wider.toml")
    assert "with 6 trials" in said
    shell.search("wider.toml", "wider", "--name", "wider")
    assert [trial.number for trial in shell.trials("wider")] == list(range(8))
    narrower = DIGITS.replace("EPOCHS", "2").replace("low = 0.0, high = 0.5", "low = 0.6, high = 0.7")
    shell.write("narrow.toml", narrower)
    assert "with 0 trials of 'digits'; 6 do not fit" in shell.forked("fork", "digits", "narrow", "narrow.toml")


@pytest.mark.parametrize(
    "file", ["own_objective.toml", "own_training.toml", "own_loop.toml", "own_command.toml", "own_model.toml"]
)
def test_the_examples_run_export_and_train(shell: Shell, file: str) -> None:
    shell.forked("check", str(REPOSITORY / "examples" / file))
    name = file.removesuffix(".toml").replace("_", "-")
    shell.search(str(REPOSITORY / "examples" / file), name, "--trials", "3")
    exported = shell.forked("export", name, "-o", "best.toml")
    assert ("\nits weights of step " in exported) == (name in ("own-loop", "own-training"))
    said = shell.forked("train", "best.toml", "-o", "runs/own")
    ends = {"own-model": "test accuracy", "own-command": "the program's value is"}
    assert ends.get(name, "the objective returned") in said
    assert "Traceback" not in said


def test_a_command_is_checked_its_output_shown_and_its_winner_replayed(shell: Shell) -> None:
    file = str(REPOSITORY / "examples" / "own_command.toml")
    checked = shell.forked("check", file)
    assert "study own-command: maximize what 'epoch (?P<epoch>" in checked
    assert "\ncommand: python own_command.py --lr '{lr}' '--weight-decay={weight_decay}'\n" in checked
    shell.search(file, "own-command", "--trials", "1")
    said = shell.forked("logs", "own-command", "--trial", "0").splitlines()
    printed = [line.partition("  ")[0] for line in said if line.startswith("epoch ")]
    assert printed == [f"epoch {epoch}/15" for epoch in range(1, 16)]
    exported = shell.forked("export", "own-command", "-o", "best.toml")
    folder = Path(exported.partition("what its program saved: ")[2].strip())
    assert [file.name for file in folder.iterdir()] == ["state.json"]
    assert "the value and the curve of 15 steps equal the trial's" in shell.forked("train", "best.toml", "--replay")
    shell.forked("train", "best.toml", "-o", "runs/best")
    again = shell.forked("train", "best.toml", "-o", "runs/best", code=2)
    assert "best: holds the result of an earlier run; remove it, or name another folder with -o" in again


def test_a_file_that_only_workers_see_to_be_wrong_leaves_no_study(shell: Shell) -> None:
    text = (REPOSITORY / "examples" / "csv_search.toml").read_text()
    shell.write("wrong.toml", text)
    missing = "data: 'csv_{0}.csv' does not exist; correct the path, a relative path starts at {1}"
    told = shell.forked("run", "wrong.toml", "--workers", "2", code=2)
    assert [line.partition("wrong.toml: ")[2] for line in told.splitlines()] == [
        missing.format(name, shell.folder) for name in ("images", "labels")
    ]
    for name in ("csv_images.csv", "csv_labels.csv"):
        shell.write(name, "no table of images\n")
    said = shell.forked("run", "wrong.toml", "--workers", "2", code=2)
    assert "csv_images.csv" in said
    assert "there is no study" in shell.forked("status", "csv-search", code=2)


def test_the_example_on_spreadsheets_runs_exports_and_trains(shell: Shell) -> None:
    for name in ("csv_search.py", "csv_search.toml"):
        shutil.copy(REPOSITORY / "examples" / name, shell.folder)
    subprocess.run([sys.executable, "csv_search.py"], cwd=shell.folder, check=True, stdout=subprocess.DEVNULL)
    shell.search("csv_search.toml", "csv-search", "--trials", "2")
    shell.forked("export", "csv-search", "-o", "best.toml")
    assert "test accuracy" in shell.forked("train", "best.toml", "-o", "runs/own")
    assert json.loads((shell.folder / "runs/own/metrics.json").read_text())["classes"] == [
        "digit 1",
        "digit 7",
        "digit 3+digit 8",
    ]
