"""Many worker processes on one study, on SQLite and on Postgres; beside plain Optuna; killed and interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.queue import reaper
from hpo.storage.connect import Storage, plain_url
from hpo.storage.tables import hpo_trials
from hpo.study import resolve
from hpo.study import study as studies
from hpo.study.study import Study
from tests.integration.processes import WorkerProcesses, trials_of
from tests.support.trials import MakeStudy, claim_one
from tests.support.waiting import PATIENCE, wait_for

Hire = Callable[[Study], WorkerProcesses]  # what the fixture hire is
OBJECTIVE = """
import os
import time

def objective(trial):
    x = trial.suggest_float("x", 0.0, 1.0)
    with open(os.path.join(os.path.dirname(__file__), "executions.txt"), "a") as done:
        done.write(f"{trial.number} {x!r}\\n")
    for step in range(3):
        trial.report(x + 1 / (step + 1), step)
        time.sleep(SLEEP)
        if trial.should_prune():
            pass
    return x
"""

STUDY = """
name = "many"
objective = "mine.py:objective"
direction = "minimize"
[budget]
trials = {trials}
[sampler]
name = "{sampler}"
[pruner]
name = "none"
"""


@pytest.fixture
def make_many(place: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStudy:
    """Make the study of this file's objective, as `hpo run --workers 0` does."""

    def make(trials: int, *, sampler: str = "random", sleep: float | str = 0.0) -> Study:
        (tmp_path / "mine.py").write_text(OBJECTIVE.replace("SLEEP", str(sleep)))
        file = tmp_path / "many.toml"
        file.write_text(STUDY.format(trials=trials, sampler=sampler))
        monkeypatch.setenv("HPO_CHECKPOINTS", str(tmp_path / "checkpoints"))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", list(sys.path))  # forks find `tests` by it, and user code takes its first place
            found = resolve.read(file)
        return studies.create_or_join(place, found.spec, code_folder=found.code_folder, code_digest=found.code_digest)

    return make


def work(processes: WorkerProcesses, count: int) -> None:
    """Let so many workers at once do what there is to do."""
    assert processes.leave([processes.start() for _ in range(count)]) == [0] * count, processes.said[-3000:]


def start_worker(study: Study, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HPO_STORAGE": plain_url(study.storage.url)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "hpo", "worker", study.name, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def leave(workers: list[subprocess.Popen[str]]) -> list[int]:
    """Wait for the workers; show what one said that did not end well."""
    codes = []
    for worker in workers:
        said, _ = worker.communicate(timeout=PATIENCE)
        codes.append(worker.returncode)
        if worker.returncode:
            print(said)
    return codes


def executions(study: Study) -> list[int]:
    lines = (study.code_folder / "executions.txt").read_text().splitlines()
    return sorted(int(line.split()[0]) for line in lines)


@pytest.mark.both
def test_eight_workers_with_a_budget_of_fifty_make_exactly_fifty_trials(make_many: MakeStudy, hire: Hire) -> None:
    study = make_many(50)
    work(hire(study), 8)
    made = trials_of(study)
    assert [trial.number for trial in made] == list(range(50))
    assert {trial.state for trial in made} == {TrialState.COMPLETE}
    assert executions(study) == list(range(50))
    # Start-up points are drawn from (study seed, trial number): none comes twice, whichever worker drew it.
    assert len({trial.params["x"] for trial in made}) == 50


def test_two_hundred_queued_trials_run_once_each_and_nobody_exits(make_many: MakeStudy, hire: Hire) -> None:
    study = make_many(200)
    for number in range(200):
        study.optuna.enqueue_trial({"x": number / 200})
    work(hire(study), 8)
    assert executions(study) == list(range(200))
    assert [trial.params["x"] for trial in trials_of(study)] == [number / 200 for number in range(200)]


PLAIN = """
import sys
import optuna
optuna.logging.set_verbosity(optuna.logging.ERROR)
study = optuna.load_study(study_name="many", storage=sys.argv[1])
def objective(trial):
    x = trial.suggest_float("x", 0.0, 1.0)
    for step in range(3):
        trial.report(x, step)
    return x
study.optimize(objective, n_trials=12)
"""


def test_plain_optuna_beside_our_workers(make_many: MakeStudy, hire: Hire) -> None:
    """Plain Optuna beside our workers gets its own numbers and keeps its trials."""
    study = make_many(60, sleep=0.02)
    url = plain_url(study.storage.url)
    plain = [
        subprocess.Popen(
            [sys.executable, "-c", PLAIN, url], text=True, stderr=subprocess.STDOUT, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    work(hire(study), 2)
    assert leave(plain) == [0, 0]
    made = trials_of(study)
    assert [trial.number for trial in made] == list(range(len(made)))
    assert {trial.state for trial in made} == {TrialState.COMPLETE}
    with study.storage.engine.connect() as connection:
        rows = connection.execute(sa.select(hpo_trials).where(hpo_trials.c.study_uid == study.uid)).all()
    ours_by_number = sorted(trial.number for trial in made if trial._trial_id in {row.trial_id for row in rows})
    theirs = optuna.storages.RDBStorage(url)
    assert [trial.number for trial in optuna.load_study(study_name="many", storage=theirs).trials] == [
        t.number for t in made
    ]
    theirs.engine.dispose()
    assert len(made) - len(rows) == 24  # the foreign ones: not adopted, and all there
    assert {row.attempt for row in rows} == {1}
    assert executions(study) == ours_by_number
    assert max(ours_by_number) < 60  # no trial of ours was begun once the study, foreign trials included, held sixty


def test_a_killed_worker_s_trial_is_taken_up_by_another_one(make_many: MakeStudy, hire: Hire) -> None:
    study = make_many(3, sleep=0.4)
    first = start_worker(study, "--as", "first")
    wait_for(lambda: any(trial.intermediate_values for trial in trials_of(study)))
    first.kill()
    leave([first])
    reaper.release_leases_of(study.ledger("launcher"), "first")
    work(hire(study), 1)
    assert [trial.state for trial in trials_of(study)] == [TrialState.COMPLETE] * 3
    assert len(trials_of(study)) == 3


SOAK = pytest.mark.soak  # which of these a process hears: tests/worker/test_signals.py and tests/worker/test_restart.py


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SOAK), pytest.param(signal.SIGUSR1, marks=SOAK)]
)
def test_a_signal_parks_the_trial_and_the_exit_code_names_it(
    make_many: MakeStudy, hire: Hire, number: signal.Signals
) -> None:
    study = make_many(2, sleep="0.0 if os.path.exists(os.path.join(os.path.dirname(__file__), 'go')) else 2.0")
    worker = start_worker(study)
    wait_for(lambda: any(trial.intermediate_values for trial in trials_of(study)))
    worker.send_signal(number)
    assert leave([worker]) == [128 + number]
    with study.storage.engine.connect() as connection:
        leases = connection.execute(sa.select(hpo_trials.c.lease_until, hpo_trials.c.settled)).all()
    assert [tuple(lease) for lease in leases] == [(None, False)]
    (study.code_folder / "go").touch()
    work(hire(study), 1)
    assert [trial.state for trial in trials_of(study)] == [TrialState.COMPLETE] * 2


def test_tpe_s_start_up_points_never_repeat_across_workers(make_many: MakeStudy, hire: Hire) -> None:
    study = make_many(10, sampler="tpe")
    work(hire(study), 4)
    assert len({trial.params["x"] for trial in trials_of(study)}) == 10


def test_a_late_worker_with_a_changed_objective_is_refused(make_many: MakeStudy) -> None:
    study = make_many(2)
    claim_one(study.ledger("first"))
    (study.code_folder / "mine.py").write_text("def objective(trial):\n    return 0.0\n")
    worker = start_worker(study)
    said, _ = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 2
    assert "your own code, or a file of weights, changed" in said
    assert "Traceback" not in said
    assert len(trials_of(study)) == 1


def test_a_worker_whose_parent_died_while_it_started_claims_nothing(make_many: MakeStudy) -> None:
    study = make_many(3)
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    assert leave([start_worker(study, "--parent", str(gone.pid))]) == [128 + signal.SIGTERM]
    assert trials_of(study) == []
