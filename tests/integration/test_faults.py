"""Workers killed, frozen and told to go, on SQLite and on a real Postgres: no trial is lost or done twice, no curve bent."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState

from hpo.storage import sql
from hpo.storage.connect import Storage
from hpo.storage.tables import hpo_trials
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.worker import descendants
from tests.integration.digits import alone, assert_finished_once
from tests.integration.processes import WorkerProcesses, curves, failures, reported, rows, trials_of
from tests.integration.shell import Shell
from tests.support.trials import MakeStudy
from tests.support.waiting import PATIENCE, wait_for


def kill_at_random_instants(processes: WorkerProcesses, times: int, workers: int, seed: int) -> None:
    """Keep so many workers running and kill one after the other at random moments, once all of them have begun."""
    draw = random.Random(seed)
    crew_now = [processes.start() for _ in range(workers)]
    wait_for(lambda: processes.said.count("joined study") == workers and reported(processes.study) > 0)
    for _ in range(times):
        time.sleep(draw.uniform(0.1, 0.7))
        place = draw.randrange(workers)
        crew_now[place].kill()
        crew_now[place] = processes.start()
    processes.leave(crew_now)


def assert_some_were_hit(study: Study) -> None:
    """On a busy machine a living worker may be late, too, and lose its lease."""
    kinds = {row.kind for row in failures(study)}
    assert {"lost_worker"} <= kinds <= {"lost_worker", "lease_lost"}


KILLS = [
    pytest.param(4, 8, 3, id="four kills"),
    pytest.param(50, 40, 4, id="fifty kills", marks=pytest.mark.soak),
]
LOOP, STACK = {"executor": "loop"}, {"executor": "stack", "slots": 3}


@pytest.mark.parametrize(
    ("storage_kind", "executor"),
    [
        pytest.param("sqlite", LOOP, id="sqlite-loop"),
        pytest.param("postgres", STACK, id="postgres-stack"),
        pytest.param("sqlite", STACK, id="sqlite-stack", marks=pytest.mark.soak),
        pytest.param("postgres", LOOP, id="postgres-loop", marks=pytest.mark.soak),
    ],
    indirect=["storage_kind"],
)
@pytest.mark.parametrize(("kills", "trials", "crew"), KILLS)
def test_workers_killed_at_random_instants_lose_no_trial_and_bend_no_curve(
    make_digits: MakeStudy,
    hire: Callable[[Study], WorkerProcesses],
    kills: int,
    trials: int,
    crew: int,
    executor: dict[str, Any],
) -> None:
    study = make_digits(trials, **executor)
    processes = hire(study)
    kill_at_random_instants(processes, kills, workers=crew, seed=0)
    assert_finished_once(study, processes, trials)
    assert {trial.state for trial in trials_of(study)} == {TrialState.COMPLETE}
    assert_some_were_hit(study)
    undisturbed = make_digits(trials, name="undisturbed", **executor)
    other = hire(undisturbed)
    assert other.leave([other.start()]) == [0]
    assert [trial.params for trial in trials_of(study)] == [trial.params for trial in trials_of(undisturbed)]
    assert curves(study) == curves(undisturbed)
    assert [trial.value for trial in trials_of(study)] == [trial.value for trial in trials_of(undisturbed)]


@pytest.mark.parametrize(("kills", "trials", "crew"), KILLS)
def test_with_tpe_and_hyperband_killed_trials_are_still_the_replay_of_their_configs(
    make_digits: MakeStudy, hire: Callable[[Study], WorkerProcesses], kills: int, trials: int, crew: int
) -> None:
    study = make_digits(trials, sampler={"name": "tpe", "n_startup_trials": 4}, pruner={"name": "hyperband"})
    processes = hire(study)
    kill_at_random_instants(processes, kills, workers=crew, seed=1)
    assert_finished_once(study, processes, trials)
    assert {trial.state for trial in trials_of(study)} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert_some_were_hit(study)
    for number, found in curves(study).items():
        assert found == alone(study, number), number


# --- one worker, one trial --------------------------------------------------------------------------------------------


def leases(study: Study) -> list[float | None]:
    return [row.lease_until for row in rows(study)]


SLOW = """
import os, pathlib, time
HERE = pathlib.Path(__file__).parent
def objective(trial):
    (HERE / f"begun-{trial.number}").open("a").write(f"{os.getpid()}\\n")
    step = 0
    while not (HERE / "go").exists():  # it cannot end before the test has done its harm
        trial.report(1.0, step)
        step += 1
        time.sleep(0.1)
    return float(trial.number)
"""


def begun(shell: Shell, number: int) -> list[int]:
    """Return the processes that began a trial, in their order."""
    file = shell.folder / f"begun-{number}"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_the_only_worker_is_killed_on_the_last_trial_and_the_run_finishes_it(shell: Shell, place: Storage) -> None:
    shell.write(SLOW, trials=1)
    run = shell.start("run", "own.toml", "--workers", "1")
    wait_for(lambda: bool(begun(shell, 0)))
    os.kill(begun(shell, 0)[0], signal.SIGKILL)
    (shell.folder / "go").touch()
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, said
    study = shell.study(place)
    assert [trial.value for trial in trials_of(study)] == [0.0]
    assert len(begun(shell, 0)) == 2
    assert [(row.kind, row.verdict, row.attempt) for row in failures(study)] == [("lost_worker", "retry", 1)]


def test_the_run_is_killed_and_its_workers_park_and_leave(shell: Shell, place: Storage) -> None:
    shell.write(SLOW, trials=100)
    run = shell.start("run", "own.toml", "--workers", "2")
    wait_for(lambda: bool(begun(shell, 0)) and bool(begun(shell, 1)))
    workers = begun(shell, 0) + begun(shell, 1)
    run.kill()
    wait_for(lambda: not any(map(descendants.is_alive, workers)))
    study = shell.study(place)
    assert leases(study) == [None] * len(trials_of(study))
    assert [trial.state for trial in trials_of(study)].count(TrialState.RUNNING) == 2
    assert failures(study) == []


def test_after_the_only_worker_was_killed_a_later_one_finishes_its_trial_though_the_budget_is_spent(
    shell: Shell, place: Storage
) -> None:
    shell.write(SLOW, trials=1, more='[recovery]\nlease = "2s"\n')
    shell.forked("run", "own.toml", "--workers", "0")
    worker = shell.start("worker", "own")
    wait_for(lambda: bool(begun(shell, 0)))
    worker.kill()
    (shell.folder / "go").touch()
    shell.forked("worker", "own")
    study = shell.study(place)
    assert [(trial.number, trial.state) for trial in trials_of(study)] == [(0, TrialState.COMPLETE)]
    assert len(begun(shell, 0)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak)])
def test_a_signal_amid_an_epoch_parks_the_trial_there_and_it_goes_on_bit_for_bit(
    make_digits: MakeStudy, hire: Callable[[Study], WorkerProcesses], number: signal.Signals
) -> None:
    study = make_digits(1, training={"epochs": 8, "batch_size": 4}, recovery={"checkpoint_every": "30s"})
    processes = hire(study)
    batches = 0
    while not batches:  # again, should the signal have come just between two epochs
        known = reported(study)
        worker = processes.start()
        wait_for(lambda known=known: reported(study) >= known + 2)
        assert worker.pid is not None
        os.kill(worker.pid, number)
        assert processes.leave([worker]) == [128 + number]
        (row,) = rows(study)
        assert (row.lease_until, row.settled, row.checkpoint_epoch) == (None, False, reported(study))
        batches = torch.load(row.checkpoint_path, weights_only=True)["batch"]
    assert processes.leave([processes.start()]) == [0]
    assert failures(study) == []
    assert curves(study)[0] == alone(study, 0)


DEAF = """
import pathlib, time
def objective(trial):
    pathlib.Path(__file__).with_name("begun").touch()
    time.sleep(600)
"""


def test_a_worker_whose_objective_never_looks_up_is_gone_within_the_grace_and_its_trial_is_parked(
    shell: Shell, place: Storage
) -> None:
    shell.write(DEAF, trials=1, more='[recovery]\ngrace = "1s"\n')
    shell.forked("run", "own.toml", "--workers", "0")
    worker = shell.start("worker", "own")
    wait_for((shell.folder / "begun").exists)
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 128 + signal.SIGTERM
    assert leases(shell.study(place)) == [None]


def freeze(process: int, study: Study) -> None:
    """Stop a process at a moment at which it is not writing: others wait for such a writer, on SQLite for as long as it
    is frozen, on Postgres until the server ends its transaction.
    """
    while True:
        os.kill(process, signal.SIGSTOP)
        if nobody_writes(study):
            return
        os.kill(process, signal.SIGCONT)
        time.sleep(0.05)


def nobody_writes(study: Study) -> bool:
    try:
        with sql.writing(study.storage.engine) as connection:
            if not study.storage.is_sqlite:
                connection.execute(sa.select(hpo_trials).with_for_update(nowait=True))
    except sa.exc.OperationalError:
        return False
    return True


def test_a_frozen_worker_comes_back_to_a_lost_lease_and_goes_on_with_the_next_trial(
    make_digits: MakeStudy, hire: Callable[[Study], WorkerProcesses]
) -> None:
    study = make_digits(
        12, training={"epochs": 16, "batch_size": 16}, recovery={"lease": "3s", "checkpoint_every": "0s"}
    )  # so many trials that one is left when the worker wakes
    processes = hire(study)
    frozen = processes.start()
    wait_for(lambda: reported(study) >= 2)
    assert frozen.pid is not None
    freeze(frozen.pid, study)
    other = processes.start()
    wait_for(lambda: any(row.attempt == 2 for row in rows(study)))
    os.kill(frozen.pid, signal.SIGCONT)
    assert processes.leave([frozen, other]) == [0, 0]
    assert_finished_once(study, processes, 12)
    found = [(row.number, row.kind, row.attempt) for row in failures(study)]
    assert found == [(0, "lost_worker", 1), (0, "lease_lost", 1)]
    assert {row.attempt for row in rows(study)[1:]} == {1}
    woken = (processes.folder / "worker-0.log").read_text()
    assert "trial 0: another process has claimed or ended it" in woken
    assert " settled" in woken  # it went on
    for number, curve in curves(study).items():
        assert curve == alone(study, number), number


def test_hpo_run_ends_a_frozen_worker_and_takes_its_trial(shell: Shell, place: Storage) -> None:
    """One that stands still for longer than its lease is killed, and another one goes on with its trial."""
    shell.write(SLOW, trials=1, more='[recovery]\nlease = "2s"\n')
    run = shell.start("run", "own.toml", "--workers", "1")
    wait_for(lambda: bool(begun(shell, 0)))
    (frozen,) = begun(shell, 0)
    study = shell.study(place)
    freeze(frozen, study)
    (shell.folder / "go").touch()
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, said
    first, second = begun(shell, 0)
    assert first == frozen != second
    assert [trial.value for trial in trials_of(study)] == [0.0]
    assert [(row.kind, row.attempt) for row in failures(study)] == [("lost_worker", 1)]


CONFIRMED = """
import random
import re
import time
from pathlib import Path

HERE = Path(__file__).parent


def objective(trial):
    x = trial.suggest_int("x", 1, 1000)
    if "hpo:run" in trial.user_attrs:
        (HERE / f"begun-{trial.number}").touch()
        while not (HERE / "go").exists():
            time.sleep(0.1)
            trial.should_prune()
    return x + random.random()
"""


def test_a_confirmation_that_is_killed_goes_on_where_it_was(shell: Shell, place: Storage) -> None:
    shell.write(CONFIRMED, trials=2)
    shell.forked("run", "own.toml", "--workers", "1")
    killed = shell.start("confirm", "own", "--seeds", "2", "--workers", "1")
    wait_for((shell.folder / "begun-0").exists)
    killed.kill()
    (shell.folder / "go").touch()
    said = shell.forked("confirm", "own", "--workers", "1")
    assert re.search(r"verdict  trial \d is best", said)
    sister = studies.join(place, "own/confirm")
    assert [trial.state for trial in trials_of(sister)] == [TrialState.COMPLETE] * 4
    assert [trial.user_attrs["hpo:run"]["run"] for trial in trials_of(sister)] == [0, 0, 1, 1]
    again = shell.forked("confirm", "own")  # nothing is left to do
    assert said.endswith(again)
