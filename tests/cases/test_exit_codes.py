"""A trial that ends its worker's process fails after its attempts, whatever exit code it leaves behind or signal it sends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.launch.local import Fleet
from hpo.launch.slots import AGAIN, last_word, last_words, say_last
from hpo.study.study import Study
from tests.integration.processes import failures
from tests.support.trials import MakeStudy

# optuna/optuna#4016 and its kind: an objective calls `sys.exit` or `os._exit`, and what runs it goes on from the exit code.
ENDING = """
import os, signal, subprocess, threading, time
WAYS = [
    lambda: os._exit(75), lambda: os._exit(143), lambda: os._exit(0), lambda: os._exit(2),
    lambda: os.kill(os.getpid(), signal.SIGTERM),
    lambda: subprocess.run(["sh", "-c", "kill -INT $PPID"]),
    lambda: threading.Thread(target=os._exit, args=(130,)).start(),
    lambda: os.execv("/bin/true", ["true"]),
]

def objective(trial):
    if trial.number < len(WAYS):
        WAYS[trial.number]()
        while True:
            trial.report(1.0, int(1e6 * time.monotonic()) % 2**30)
            time.sleep(0.01)
    return float(trial.number)
"""


def run_fleet(study: Study, text: str) -> Fleet:
    (study.code_folder / "mine.py").write_text(text)
    fleet = Fleet(study, 1, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    deadline = time.monotonic() + 120
    while fleet.tend():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.01)
    return fleet


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.launch.slots.RESTART_SECONDS", 0.01)


def test_whatever_way_a_trial_ends_its_worker_it_fails(make_study: MakeStudy) -> None:
    """Further attempts: tests/integration/test_kinds_of_failure.py."""
    study = make_study(trials=9, failures={"lost_worker": {"retries": 0}, "in_a_row": 100})
    fleet = run_fleet(study, ENDING)
    assert fleet.failed == [], last_words(fleet.failed)
    assert [trial.state for trial in study.optuna.trials] == [TrialState.FAIL] * 8 + [TrialState.COMPLETE]
    found = failures(study)
    assert [(row.number, row.attempt, row.kind) for row in found] == [(number, 1, "lost_worker") for number in range(8)]
    assert found[0].message.startswith("its worker died: exit code 75 (")
    assert "by a signal that `hpo run` did not send" in found[4].message
    assert [path.name for path in fleet.slots[0].log.parent.iterdir()] == [fleet.slots[0].log.name]


@pytest.mark.parametrize("code", [75, pytest.param(0, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak)])
def test_code_that_ends_the_process_as_it_is_imported(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A worker that ends before it has a trial is started so often and no more, and nobody says that all is well."""
    monkeypatch.setattr("hpo.launch.slots.CRASHES", 2)
    study = make_study(trials=1)
    fleet = run_fleet(study, f"import os\nos._exit({code})\n")
    assert fleet.slots[0].exit_codes == [code] * 2
    assert ([slot.index for slot in fleet.failed], fleet.refused, fleet.exit_code) == ([0], False, 1)
    assert study.optuna.trials == []


ENDING_LAST = """
import atexit, os, signal
atexit.register(END)
def objective(trial):
    return 1.0
"""


@pytest.mark.parametrize(
    ("end", "recycled_after", "codes"),
    [
        ("os._exit, 75", 100, [0]),
        ("os._exit, 0", 1, [0, 0, 0]),
        pytest.param("os._exit, 2", 100, [0], marks=pytest.mark.soak),
        pytest.param("os.kill, os.getpid(), signal.SIGSEGV", 100, [0], marks=pytest.mark.soak),
        pytest.param("os._exit, 75", 1, [75, 75, 0], marks=pytest.mark.soak),
        pytest.param("os._exit, 2", 1, [2, 2, 0], marks=pytest.mark.soak),
    ],
)
def test_code_that_ends_the_process_at_its_end(
    make_study: MakeStudy, end: str, recycled_after: int, codes: list[int]
) -> None:
    """A worker has said how it leaves before that, or that it starts afresh."""
    study = make_study(trials=2, recovery={"recycle_trials": recycled_after})
    fleet = run_fleet(study, ENDING_LAST.replace("END", end))
    assert fleet.slots[0].exit_codes == codes
    assert (fleet.failed, fleet.slots[0].crashes) == ([], 0)
    assert [trial.state for trial in study.optuna.trials] == [TrialState.COMPLETE] * 2
    assert failures(study) == []


def test_what_a_worker_has_said_last(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert last_word(mark) == ""
    for word in ("", AGAIN, "", 143, 0):
        say_last(mark, word)
        assert last_word(mark) == str(word)
    say_last(tmp_path / "none" / "mark", 0)  # who has deleted the folder keeps nobody


STOPPING = """
import os, signal
def objective(trial):
    if trial.number == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0
"""


def test_a_worker_that_its_trial_has_stopped(make_study: MakeStudy) -> None:
    """It cannot end by itself, and nothing would go on in its place."""
    study = make_study(trials=2, failures={"lost_worker": {"retries": 0}}, recovery={"lease": "1s"})
    fleet = run_fleet(study, STOPPING)
    assert fleet.slots[0].exit_codes == [-9, 0]
    assert [trial.state for trial in study.optuna.trials] == [TrialState.FAIL, TrialState.COMPLETE]


FORKING = """
import os, sys
def objective(trial):
    if os.fork() == 0:
        if trial.number == 0:
            sys.exit(3)
        if trial.number == 1:
            raise ValueError("in the child")
        return 2.0
    os.wait()
    return 1.0
"""


def test_a_child_that_an_objective_forks_is_no_second_worker(make_study: MakeStudy) -> None:
    study = make_study(trials=3)
    fleet = run_fleet(study, FORKING)
    assert fleet.slots[0].exit_codes == [0]
    assert [(trial.state, trial.value) for trial in study.optuna.trials] == [(TrialState.COMPLETE, 1.0)] * 3
    assert failures(study) == []
