"""What user code leaves running ends with its run: children, and grandchildren that nobody is the parent of any more."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from hpo.launch import fork_server
from hpo.launch.local import Fleet
from hpo.launch.slots import last_words
from hpo.storage.connect import Storage
from hpo.worker import descendants
from hpo.worker import loop as worker_loop
from hpo.worker.descendants import is_alive
from hpo.worker.signals import SAME_SECONDS, StopSignal
from hpo.worker.trial import LeasedTrial
from tests.cases.test_exit_codes import run_fleet
from tests.integration.processes import failures, trials_of
from tests.integration.shell import Shell
from tests.support.trials import MakeStudy
from tests.support.waiting import PATIENCE, wait_for

LEAVING = """
import os, pathlib, signal, subprocess, time
HERE = pathlib.Path(__file__).parent

def objective(trial):
    note = "echo $$ >> PIDS; exec sleep 600".replace("PIDS", str(HERE / "pids"))
    subprocess.Popen(["sh", "-c", note])
    subprocess.Popen(["sh", "-c", f"trap '' TERM HUP; setsid sh -c '{note}'"])
    subprocess.Popen(["sh", "-c", f"(setsid sh -c '{note}' &) &"]).wait()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(HERE / "pids", "a") as file:
                print(os.getpid(), file=file)
            time.sleep(600)
        os._exit(0)
    os.wait()
    while len((HERE / "pids").read_text().split() if (HERE / "pids").exists() else []) < 4 * (1 + trial.number):
        time.sleep(0.01)
    END
    return 1.0
"""


@pytest.fixture
def shell(tmp_path: Path, url: str) -> Iterator[Shell]:
    found = Shell(tmp_path, url)
    yield found
    for process in found.running:
        process.kill()
        process.communicate()


def left(folder: Path) -> tuple[int, list[int]]:
    """Return how many processes there were, and those that still are."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    return len(pids), [pid for pid in pids if is_alive(pid)]


@pytest.mark.parametrize("recycled_after", [100, pytest.param(1, marks=pytest.mark.soak)])
def test_children_end_with_their_worker(make_study: MakeStudy, recycled_after: int) -> None:
    study = make_study(trials=2, recovery={"recycle_trials": recycled_after})
    fleet = run_fleet(study, LEAVING.replace("END", "pass"))
    assert fleet.slots[0].exit_codes == [0]
    assert left(study.code_folder) == (8, [])


def test_children_of_a_killed_worker_end_while_the_process_that_started_it_goes_on(make_study: MakeStudy) -> None:
    """Such as a script that calls `hpo.search`. It adopts nothing itself. Two attempts of the trial are killed."""
    study = make_study(trials=1, failures={"lost_worker": {"retries": 1}})
    run_fleet(study, LEAVING.replace("END", "os.kill(os.getpid(), signal.SIGKILL)"))
    assert [trial.state.name for trial in study.optuna.trials] == ["FAIL"]
    assert left(study.code_folder) == (8, [])


def test_a_pool_of_joblib_does_not_hold_its_worker_up(make_study: MakeStudy) -> None:
    """scikit-learn's `n_jobs` makes one, whose idle processes wait for minutes and are not quite multiprocessing's."""
    code = "from joblib import Parallel, delayed\ndef objective(trial): return sum(Parallel(2)([delayed(abs)(-3.0)] * 2))\n"
    study = make_study(trials=1)
    fleet = run_fleet(study, code)
    assert fleet.failed == [], last_words(fleet.failed)
    assert study.optuna.best_value == 6.0
    assert "Traceback" not in fleet.slots[0].log.read_text()


def test_children_of_a_killed_worker_and_the_server_end_with_the_run(shell: Shell, place: Storage) -> None:
    (tmp := shell.folder / "tmp").mkdir()
    shell.environment["TMPDIR"] = str(tmp)
    shell.write(LEAVING.replace("END", "os.kill(os.getpid(), signal.SIGKILL)"), trials=1)
    run = shell.start("run", "own.toml", "--workers", "1")
    wait_for(lambda: (shell.folder / "pids").exists())
    beneath = psutil.Process(run.pid).children(recursive=True)
    said, _ = run.communicate(timeout=PATIENCE)
    assert (run.returncode, [trial.state.name for trial in trials_of(shell.study(place))]) == (1, ["FAIL"]), said
    assert left(shell.folder)[1] == []
    # The server that workers are forked from, and multiprocessing's own helper, which ends after all others.
    wait_for(lambda: not any(is_alive(process.pid) for process in beneath))
    assert list(tmp.iterdir()) == []


SLEEPING = """
import pathlib, time
def objective(trial):
    pathlib.Path(__file__).with_name("begun").touch()
    for step in range(1, 6000):
        trial.report(1.0, step)
        time.sleep(0.1)
"""


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param([signal.SIGKILL], id="killed"),
        pytest.param([signal.SIGINT] * 3, id="interrupted thrice", marks=pytest.mark.soak),
    ],
)
def test_a_launcher_that_is_ended_leaves_nothing(shell: Shell, numbers: list[signal.Signals]) -> None:
    (tmp := shell.folder / "tmp").mkdir()
    shell.environment["TMPDIR"] = str(tmp)
    shell.write(SLEEPING, trials=1)
    run = shell.start("run", "own.toml", "--workers", "1")
    wait_for(lambda: (shell.folder / "begun").exists())
    beneath = psutil.Process(run.pid).children(recursive=True)
    assert len(beneath) >= 3  # a worker, the server, multiprocessing's own helper
    for number in numbers:
        os.kill(run.pid, number)
        time.sleep(2 * SAME_SECONDS)
    run.communicate(timeout=PATIENCE)
    wait_for(lambda: not any(is_alive(process.pid) for process in beneath))
    assert list(tmp.iterdir()) == []


PARKING = """
import pathlib, time
def objective(trial):
    begun = pathlib.Path(__file__).with_name(f"begun-{trial.number}")
    if begun.exists():
        return 1.0
    begun.touch()
    for step in range(6000):
        trial.report(1.0, step)
        time.sleep(0.01)
"""


@pytest.mark.usefixtures("adopting")
def test_workers_whose_server_is_killed_park(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are `hpo run`'s children then, and no orphans that it is to end."""
    monkeypatch.setattr("hpo.launch.slots.RESTART_SECONDS", 0.01)
    study = make_study(trials=2)
    (study.code_folder / "mine.py").write_text(PARKING)
    fleet = Fleet(study, 2, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    wait_for(lambda: len(list(study.code_folder.glob("begun-*"))) == 2)
    (server,) = fork_server.ids()
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not fleet.tend())
    assert [slot.exit_codes for slot in fleet.slots] == [[143, 0]] * 2, last_words(fleet.slots)
    assert [trial.state.name for trial in study.optuna.trials] == ["COMPLETE"] * 2
    assert failures(study) == []


def test_dead_children_that_nobody_asks_for(make_study: MakeStudy) -> None:
    """Each trial may ask for those of the trial before. What `subprocess` started keeps its exit code for ever."""
    study, mine = make_study(trials=5), set(descendants.children())
    dead, kept = [], []

    def objective(trial: LeasedTrial) -> float:
        dead.append(sum(not is_alive(child) for child in descendants.children() - mine))
        if trial.number == 0:
            kept.append(subprocess.Popen(["sh", "-c", "exit 3"]))
            wait_for(lambda: not is_alive(kept[0].pid))
        if not (child := os.fork()):
            os._exit(0)
        wait_for(lambda: not is_alive(child))
        return 1.0

    assert worker_loop.work(study, objective, study.ledger("w"), StopSignal()) == 0
    assert dead == [0, 2, 2, 2, 2]
    assert kept[0].wait() == 3
    os.wait()
