"""Failures by kind: what is tried again and how, what ends a trial, a process or a study; a worker that starts afresh."""

from __future__ import annotations

import json
import signal

import pytest
from optuna.trial import TrialState

from hpo.storage.connect import Storage
from hpo.study import control
from tests.integration.processes import failures, rows, trials_of
from tests.integration.shell import Shell
from tests.support.waiting import PATIENCE, wait_for

OUT_OF_MEMORY = """
import json, os, pathlib, uuid
import psutil
import torch
PROCESS = uuid.uuid4().hex  # another one after the process started afresh
KEPT = []

def objective(trial):
    size = psutil.Process().memory_info().rss
    with pathlib.Path(__file__).with_name("seen.jsonl").open("a") as seen:
        seen.write(json.dumps([trial.number, os.getpid(), PROCESS, size]) + "\\n")
    first = pathlib.Path(__file__).with_name("first")
    if trial.number == 1 and not first.exists():
        first.touch()
        KEPT.append(torch.ones(50_000_000))  # 200 MB that nothing frees
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return float(trial.number)
"""


def seen(shell: Shell) -> list[list[object]]:
    return [json.loads(line) for line in (shell.folder / "seen.jsonl").read_text().splitlines()]


def test_after_an_out_of_memory_the_process_starts_afresh_and_the_trial_is_tried_again(
    shell: Shell, place: Storage
) -> None:
    shell.write(OUT_OF_MEMORY, trials=3)
    said = shell.run("run", "own.toml", "--workers", "1")
    assert "1 × out_of_memory (1 tried again)" in said
    study = shell.study(place)
    assert [(trial.state, trial.value) for trial in trials_of(study)] == [
        (TrialState.COMPLETE, float(n)) for n in range(3)
    ]
    assert [(row.number, row.kind, row.verdict) for row in failures(study)] == [(1, "out_of_memory", "retry")]
    assert "CUDA out of memory" in failures(study)[0].traceback
    numbers, pids, processes, sizes = zip(*seen(shell), strict=True)
    assert numbers == (0, 1, 1, 2)
    assert len(set(pids)) == 1  # the same process for whoever watches it,
    assert processes[0] == processes[1] != processes[2] == processes[3]  # and a new one inside
    assert abs(sizes[2] - sizes[0]) < 60e6  # the next trial starts with the memory that the first one had


ALWAYS = """
def objective(trial):
    raise RuntimeError(f"no luck with trial {trial.number}")
"""


def test_an_objective_that_always_raises_stops_the_study_and_goes_on_once_it_is_mended(
    shell: Shell, place: Storage
) -> None:
    shell.write(ALWAYS, trials=30)
    said = shell.forked("run", "own.toml", "--workers", "1", code=1)
    assert "10 trials in a row ended by exception, the last: RuntimeError: no luck with trial 9" in said
    assert "hpo resume own" in said
    study = shell.study(place)
    assert [trial.state for trial in trials_of(study)] == [TrialState.FAIL] * 10
    assert "no worker is started: stopped: 10 trials in a row" in shell.forked(
        "run", "own.toml", "--workers", "1", code=1
    )
    assert len(trials_of(study)) == 10
    shell.write("def objective(trial):\n    return 1.0\n", trials=30)
    assert "goes on" in shell.forked("resume", "own")
    shell.forked("worker", "own", "--allow-code-change")
    assert [trial.state.name for trial in trials_of(study)] == ["FAIL"] * 10 + ["COMPLETE"] * 20


KILLER = """
import os, signal
def objective(trial):
    if trial.number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return float(trial.number)
"""


LEAVER = """
import os
def objective(trial):
    if trial.number in (1, 2):
        os._exit(0 if trial.number == 1 else 75)
    return float(trial.number)
"""


def test_a_trial_that_ends_its_process_has_lost_its_worker(shell: Shell, place: Storage) -> None:
    """A trial that ends its process in silence has lost its worker all the same, whatever the code."""
    shell.write(LEAVER, trials=4)
    shell.forked("run", "own.toml", "--workers", "1")
    study = shell.study(place)
    assert [trial.state.name for trial in trials_of(study)] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    found = [(row.number, row.kind, row.verdict) for row in failures(study)]
    assert found == [(n, "lost_worker", verdict) for n in (1, 2) for verdict in ("retry", "retry", "fail")]


def test_a_trial_that_kills_its_worker_each_time_ends_and_the_others_go_on(shell: Shell, place: Storage) -> None:
    shell.write(KILLER, trials=4)
    said = shell.forked("run", "own.toml", "--workers", "1")
    assert "3 × lost_worker (2 tried again)" in said
    study = shell.study(place)
    assert [trial.state.name for trial in trials_of(study)] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert [(row.number, row.attempt, row.verdict) for row in failures(study)] == [
        (1, 1, "retry"), (1, 2, "retry"), (1, 3, "fail"),
    ]  # fmt: skip
    assert signal.SIGSEGV.name in failures(study)[0].message


HUNG = """
import pathlib, time
def objective(trial):
    if trial.number == 0:
        trial.report(3.0, 1)
        pathlib.Path(__file__).with_name("begun").touch()
        time.sleep(600)
    return float(trial.number)
"""


def test_a_trial_that_hangs_is_ended_from_outside(shell: Shell, place: Storage) -> None:
    """A trial that hangs beyond its time is ended from outside and the others go on."""
    shell.write(HUNG, trials=2, more='[recovery]\nlease = "1s"\n')
    file = shell.folder / "own.toml"
    file.write_text(file.read_text().replace("trials = 2", 'trials = 2\ntrial_timeout = "3s"'))
    shell.forked("run", "own.toml", "--workers", "1")
    study = shell.study(place)
    assert [(trial.state.name, trial.value) for trial in trials_of(study)] == [("PRUNED", 3.0), ("COMPLETE", 1.0)]
    assert [(row.kind, row.verdict) for row in failures(study)] == [("time_limit", "prune")]


def test_a_trial_that_hangs_does_not_keep_its_worker(shell: Shell, place: Storage) -> None:
    """A trial that hangs and that a person has ended does not keep its worker."""
    shell.write(HUNG, trials=2, more='[recovery]\nlease = "1s"\n')
    file = shell.folder / "own.toml"
    file.write_text(file.read_text().replace("trials = 2", 'trials = 2\ntrial_timeout = "3s"'))
    run = shell.start("run", "own.toml", "--workers", "1")
    wait_for(lambda: (shell.folder / "begun").exists())
    control.stop_trial(shell.study(place), 0)  # at once: as a command it would take longer than the trial has
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, said
    assert [(trial.state.name, trial.value) for trial in trials_of(shell.study(place))] == [
        ("PRUNED", 3.0),
        ("COMPLETE", 1.0),
    ]


DUMMY = """
import json, os, pathlib, uuid
import psutil
PROCESS = uuid.uuid4().hex
KEPT = []

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    size = psutil.Process().memory_info().rss
    with pathlib.Path(__file__).with_name("seen.jsonl").open("a") as seen:
        seen.write(json.dumps([trial.number, os.getpid(), PROCESS, size]) + "\\n")
    for step in range(1, 4):
        trial.report(x / step, step)
        trial.should_prune()
    KEPT.append(b"x" * LEAK)
    return x
"""


def test_two_hundred_trials_grow_a_worker_by_less_than_fifty_megabytes(shell: Shell) -> None:
    shell.write(DUMMY.replace("LEAK", "0"), trials=200)
    shell.forked("run", "own.toml", "--workers", "0")
    shell.run("worker", "own")
    _, _, processes, sizes = zip(*seen(shell), strict=True)
    assert len(set(processes)) == 1
    assert sizes[-1] - sizes[0] < 50e6


@pytest.mark.parametrize(
    ("limit", "leak", "runs"),
    [
        pytest.param(
            "recycle_trials = 3", 0, [3, 3, 1], marks=pytest.mark.soak
        ),  # tests/worker/test_restart.py counts them
        ("recycle_growth_mb = 100", 60 * 2**20, [3, 3, 1]),
    ],
)
def test_a_worker_starts_afresh_after_a_set_number_of_trials_or_growth(
    shell: Shell, place: Storage, limit: str, leak: int, runs: list[int]
) -> None:
    shell.write(DUMMY.replace("LEAK", str(leak)), trials=7, more=f"[recovery]\n{limit}\n")
    shell.forked("run", "own.toml", "--workers", "0")
    shell.run("worker", "own")
    numbers, pids, processes, _ = zip(*seen(shell), strict=True)
    assert numbers == tuple(range(7))
    assert len(set(pids)) == 1
    assert [processes.count(process) for process in dict.fromkeys(processes)] == runs
    assert [row.attempt for row in rows(shell.study(place))] == [1] * 7
