"""Workers on a real Slurm of three nodes: they park before a time limit and a preemption, and no trial is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from hpo.launch import launching, search
from hpo.launch.launching import Wanted
from hpo.spec.study_file import StudySpec
from hpo.storage.tables import hpo_failures, hpo_trials
from hpo.study.fleet import read_fleet
from hpo.study.status import read
from hpo.study.study import Study
from hpo.view.live import LiveView
from tests.engines.slurm import Slurm
from tests.support.postgres import PostgresServer
from tests.support.waiting import wait_for

pytestmark = pytest.mark.engines
TRIALS = 48
#: A trial goes on until the file is there, so whatever happens to a worker happens amid a trial.
OBJECTIVE = """
import time
from pathlib import Path


def objective(trial):
    x = trial.suggest_float("x", -1, 1)
    epoch = 0
    while epoch < 3 or not Path("FOLDER/open").exists():
        trial.report(x * x, epoch)
        epoch += 1
        time.sleep(0.05)
    return x * x
"""
FILE = """
name = "held"
objective = "held.py:objective"
direction = "minimize"
checkpoints = "FOLDER/checkpoints"
[sampler]
name = "random"
[pruner]
name = "none"
[budget]
trials = 48
[recovery]
lease = "20s"
grace = "20s"
[launch]
on = "slurm"
workers = 3
gpus_per_worker = 1
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with pytest.MonkeyPatch.context() as patch, Slurm() as running:
        patch.setenv("SLURM_CONF", str(running.conf))
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    folder = Path("/tmp") / f"hpo-pg-{tmp_path_factory.getbasetemp().name}-slurm"
    with PostgresServer(folder) as running:
        yield running


@pytest.fixture
def study(slurm: Slurm, server: PostgresServer, tmp_path: Path) -> Iterator[Study]:
    """A study whose trials do not end before `let_end`. Nothing of it is in Slurm's queue afterwards."""
    (tmp_path / "held.py").write_text(OBJECTIVE.replace("FOLDER", str(tmp_path)))
    file = tmp_path / "held.toml"
    file.write_text(FILE.replace("FOLDER", str(tmp_path)))
    view = LiveView(is_quiet=True)
    found = search.complete(StudySpec.load(file), file, view, code=None, workers=0)
    url = server.database(tmp_path.name)
    opened = search.open_study(found, view, url=url, trials=None, allow_code_change=False).study
    yield opened
    slurm.cancel_all()
    opened.storage.close()


def launch(study: Study, *settings: str) -> None:
    """Launch three workers and wait until each has a trial in training."""
    wanted = Wanted.of(study.spec.launch.with_settings(settings), on=None, workers=None, gpus=None)
    launching.launch(study, wanted, code_folder=study.code_folder)
    wait_for(lambda: busy(study) == 3)


def busy(study: Study) -> int:
    """Return how many living workers train."""
    return sum(bool(worker.trials and worker.epochs_per_second) for worker in read_fleet(study).workers)


def let_end(study: Study, slurm: Slurm) -> None:
    """Let trials end, jobs begin again at once, and wait until Slurm has no job any more."""
    (study.code_folder / "open").touch()
    wait_for(lambda: not requeued(slurm))


def requeued(slurm: Slurm) -> list[str]:
    slurm.requeue_now()
    return slurm.jobs()


def complete(study: Study) -> int:
    return read(study).summary.counts["complete"]


def attempts(study: Study) -> int:
    with study.storage.engine.connect() as connection:
        return int(connection.execute(sa.select(sa.func.sum(hpo_trials.c.attempt))).scalar_one())


def failures(study: Study) -> list[str]:
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_failures.c.kind)).scalars())


def ends(study: Study, slurm: Slurm) -> list[str]:
    """Return how the jobs of a study have ended: state, exit code, times queued again."""
    found = []
    arrays = [handle["job"] for one in read_fleet(study).launches for handle in one.handles]
    for job in slurm.ask("scontrol", "show", "job", "--oneliner").splitlines():
        fields = dict(word.split("=", 1) for word in job.split() if "=" in word)
        if fields.get("ArrayJobId") in arrays:
            found.append(f"{fields['JobState']} {fields['ExitCode']} {fields['Restarts']}")
    return sorted(found)


def parked(study: Study) -> bool:
    """Return whether all three trials are parked."""
    counts = read(study).summary.counts
    return counts["running"] == 0 and counts["parked"] == 3


def test_workers_park_before_the_time_limit_and_go_on(study: Study, slurm: Slurm) -> None:
    launch(study, "slurm.time=2:00:00", "slurm.notice=3000")
    slurm.limit(minutes=50)  # so the notice is due
    wait_for(lambda: len(slurm.jobs("PENDING")) == 3)
    assert parked(study)
    slurm.limit(minutes=120)
    let_end(study, slurm)
    assert complete(study) == TRIALS
    assert (attempts(study), failures(study)) == (TRIALS + 3, [])
    assert ends(study, slurm) == ["COMPLETED 0:0 1"] * 3


def test_preempted_workers_go_on_and_cancelled_ones_stay_away(study: Study, slurm: Slurm) -> None:
    launch(study)
    slurm.preempt_all()  # by SIGTERM alone
    assert parked(study)
    slurm.requeue_now()
    wait_for(lambda: busy(study) == 3)
    slurm.ask("scancel", *slurm.jobs())
    wait_for(lambda: not slurm.jobs())
    assert parked(study)
    assert launching.scale(study, 3).before == 0
    let_end(study, slurm)
    assert complete(study) == TRIALS
    assert (attempts(study), failures(study)) == (TRIALS + 6, [])
    assert ends(study, slurm) == [*["CANCELLED 0:15 1"] * 3, *["COMPLETED 0:0 0"] * 3]


def test_a_fleet_is_scaled_and_called_back(study: Study, slurm: Slurm) -> None:
    """Exactly as many workers leave as are too many, for good. Two launches of a study add up."""
    launch(study)
    assert {one: len(slots) for one, slots in launching.scale(study, 1).retired.items()} == {1: 2}
    wait_for(lambda: len(slurm.jobs()) == 1)
    assert (busy(study), read(study).summary.counts["parked"]) == (1, 2)
    assert ends(study, slurm) == ["COMPLETED 0:0 0"] * 2 + ["RUNNING 0:0 0"]
    launching.launch(study, Wanted.of(study.spec.launch, on=None, workers=1, gpus=None), code_folder=study.code_folder)
    assert launching.scale(study, 3).added == {2: range(1, 2)}
    wait_for(lambda: busy(study) == 3)
    living = read_fleet(study)
    assert [(one.launch, one.slot) for one in living.workers] == [(1, 0), (2, 0), (2, 1)]
    assert {one.gpus for one in living.workers} <= {"0", "1"}
    assert launching.recall(study) == {1: "", 2: ""}
    wait_for(lambda: not slurm.jobs())
    assert parked(study)
    assert read_fleet(study).workers == []
    launching.launch(study, Wanted.of(study.spec.launch, on=None, workers=3, gpus=None), code_folder=study.code_folder)
    let_end(study, slurm)
    assert (complete(study), failures(study)) == (TRIALS, [])


def test_a_killed_node_costs_the_attempt_of_its_worker(study: Study, slurm: Slurm) -> None:
    launch(study)
    try:
        slurm.kill("n2")
        wait_for(lambda: "n2" in slurm.ask("sinfo", "--noheader", "--states=down", "--format=%N"))
        let_end(study, slurm)
    finally:
        slurm.start("n2")
    assert complete(study) == TRIALS
    assert (attempts(study), failures(study)) == (TRIALS + 1, ["lost_worker"])
    assert ends(study, slurm) == ["COMPLETED 0:0 0", "COMPLETED 0:0 0", "COMPLETED 0:0 1"]
