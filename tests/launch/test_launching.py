"""Launches: what is rendered, what the database records of them, and which workers leave when there are to be fewer."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa

from hpo.cli.run import enlist
from hpo.errors import LaunchError, Outage, StorageAway, StudyError
from hpo.launch import exit_codes, launching, releases, slots, supervisor
from hpo.launch.launching import Wanted
from hpo.launch.slots import Dead
from hpo.queue import launches, workers
from hpo.queue.launches import Launch, Seen
from hpo.queue.models import Post
from hpo.spec.launch import Launch as LaunchSection
from hpo.storage import sql
from hpo.storage.connect import connect
from hpo.storage.tables import hpo_failures
from hpo.study.fleet import read_fleet
from hpo.study.study import Study
from hpo.worker import loop as worker_loop
from hpo.worker.signals import StopSignal
from tests.cli.test_commands import OWN, Hpo, hpo, make_study
from tests.support.postgres import free_port
from tests.support.trials import MakeStudy

__all__ = ["hpo"]
SLURM = ["--on", "slurm", "--workers", "4"]


def test_the_script_of_slurm_holds_no_password(hpo: Hpo, tmp_path: Path) -> None:
    make_study(tmp_path)
    settings = ["slurm.partition=gpu", "slurm.time=30", "slurm.setup=['module load cuda']"]
    sets = [word for setting in settings for word in ("--set", setting)]
    url = "postgresql://me:s3cret@db.example/hpo"
    code, said, err = hpo("launch", "own.toml", *SLURM, "--gpus-per-worker", "2", *sets, "--storage", url, "--print")
    assert (code, err) == (0, "")
    assert "s3cret" not in said
    assert [line.removeprefix("#SBATCH ") for line in said.splitlines() if line.startswith("#SBATCH ")] == [
        "--job-name=hpo-own",
        "--array=0-3",
        "--ntasks=1",
        "--cpus-per-task=1",
        "--gres=gpu:2",
        "--partition=gpu",
        "--time=30",
        "--requeue",
        "--signal=USR2@90",
        "--open-mode=append",
        f"--chdir={tmp_path}",
        "--output=hpo-%A_%a.log",
    ]
    assert "\nmodule load cuda\nsrun --unbuffered " in said
    assert f" -m hpo worker --supervised --code {tmp_path} --fleet 4 --grace 30 -- own\n" in said
    assert "75|138|140|143) scontrol requeue" in said
    assert said.endswith("\nexit $code\n")  # if Slurm does not queue it again, it has not ended well


def test_each_kind_of_gpu_has_an_array(hpo: Hpo, tmp_path: Path) -> None:
    make_study(tmp_path)
    code, said, _ = hpo("launch", "own.toml", "--on", "slurm", "--set", "slurm.gpu_types={a100=3,h100=1}", "--print")
    assert code == 0
    told = [line.removeprefix("#SBATCH --") for line in said.splitlines()]
    assert [line for line in told if line.startswith(("array", "gres"))] == [
        *("array=0-2", "gres=gpu:a100:1"),
        *("array=3-3", "gres=gpu:h100:1"),
    ]


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (None, "launch.gpus_per_worker: not given; with processes_per_trial = 2 use 2, or 0 on the CPU"),
        ("1", "launch.gpus_per_worker = 1: too few; with processes_per_trial = 2 use 2, or 0 on the CPU"),
        ("0", ""),
        ("2", ""),
    ],
)
def test_a_worker_has_a_gpu_for_each_process_of_a_trial(
    hpo: Hpo, tmp_path: Path, gpus: str | None, message: str
) -> None:
    make_study(tmp_path, OWN + "processes_per_trial = 2\n")
    code, _, err = hpo("launch", "own.toml", *SLURM, *(["--gpus-per-worker", gpus] if gpus else []), "--print")
    assert (code, err) == ((2, f"error: {message}\n") if message else (0, ""))


WRONG = {
    "no engine": (["--workers", "2"], "engine: not given; use --on slurm, ray"),
    "no number": (["--on", "slurm"], "workers: not given; use --workers N"),
    "another engine": (["--on", "lsf", "--workers", "2"], "launch.on = 'lsf': input should be 'slurm', 'ray'"),
    "a key of no engine": ([*SLURM, "--set", "slurm.partion=x"], "launch.slurm takes no 'partion' (did you mean"),
    "no key": ([*SLURM, "--set", "gpu"], "--set gpu: is not a key and its value"),
    "trials of a page": (
        [*SLURM, "--trials", "9", "--print"],
        "--trials 9: --print changes no study; leave --trials out",
    ),
    "part of a GPU": ([*SLURM, "--gpus-per-worker", "0.5", "--print"], "Slurm gives whole GPUs"),
    "too late a notice": (
        [*SLURM, "--set", "slurm.time=60", "--set", "slurm.notice=30", "--print"],
        "launch.slurm.notice = 30: a worker parks within recovery.grace = 30 s; use more than 30",
    ),
    "a file of one host": (SLURM, "workers on other hosts cannot use a SQLite file; use Postgres: `hpo copy "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_launch_is_refused_and_not_recorded(hpo: Hpo, tmp_path: Path, case: str) -> None:
    study = make_study(tmp_path)
    arguments, message = WRONG[case]
    code, said, err = hpo("launch", "own.toml", *arguments)
    assert (code, said) == (2, "")
    assert message in err
    assert launches.of_study(study.storage.engine, study.uid) == []


def test_without_sbatch_the_message_names_print(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = make_study()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launching, "_check_storage", lambda *_: None)  # SQLite, which Slurm's hosts could not use
    wanted = Wanted.of(LaunchSection(), on="slurm", workers=2, gpus=None)
    with pytest.raises(LaunchError, match="sbatch: not found on this machine; install Slurm"):
        launching.launch(study, wanted, code_folder=tmp_path)
    assert launches.of_study(study.storage.engine, study.uid) == []


def record(study: Study, slots: int) -> Launch:
    """Record a launch without submitting it."""
    where = study.storage.engine, study.study_id, study.uid
    return launches.begin(*where, on="slurm", slots=slots, asked=json.dumps({}), launched_by="me@here")


@pytest.mark.both
def test_exactly_as_many_slots_are_retired_as_are_too_many(make_study: MakeStudy) -> None:
    study = make_study()
    where = study.storage.engine, study.study_id, study.uid
    record(study, 4)
    record(study, 3)
    states = {
        1: Seen(submitted=range(4), states={0: "running", 1: "pending", 2: "running"}),  # 3 has ended
        2: Seen(submitted=range(3), states={0: "running", 1: "pending", 2: "running"}),
    }
    change = launches.resize(*where, 2, states)
    assert (change.before, change.retired, change.added) == (6, {2: [0, 1, 2], 1: [1]}, {})
    assert launches.resize(*where, 2, states).retired == {}  # another person, who saw the same, wants the same
    change = launches.resize(*where, 5, states)
    assert (change.before, change.added) == (2, {2: range(3, 6)})
    assert launches.resize(*where, 5, states).added == {}
    assert [one.wanted for one in launches.of_study(study.storage.engine, study.uid)] == [{0, 2, 3}, {3, 4, 5}]
    assert [one.number for one in launches.recall(study.storage.engine, study.study_id, study.uid)] == [1, 2]
    with pytest.raises(StudyError, match="no launch of this study is open"):
        launches.resize(*where, 1, {})


def test_slots_that_another_person_is_about_to_submit_count(make_study: MakeStudy) -> None:
    """One has launched four workers and scaled to six. sbatch has not answered yet, so no engine knows slots 4 and 5."""
    study = make_study()
    where = study.storage.engine, study.study_id, study.uid
    launch = record(study, 4)
    launches.add_handles(*where, launch.number, [{"job": "7", "first": 0, "last": 3}])
    launches.resize(*where, 6, {1: Seen(submitted=range(4), states=dict.fromkeys(range(4), "running"))})
    (found,) = launches.of_study(study.storage.engine, study.uid)
    assert (found.wanted, found.submitted) == (frozenset(range(6)), frozenset(range(4)))
    seen = Seen(submitted=found.submitted, states=dict.fromkeys(range(3), "running"))  # 3 has ended
    assert seen.alive(found) == [5, 4, 2, 1, 0]
    assert launches.resize(*where, 6, {1: seen}).added == {1: range(6, 7)}


def test_a_refused_launch_is_hidden_and_its_number_is_not_used_again(make_study: MakeStudy) -> None:
    """A job that began all the same, for example since sbatch was interrupted, has a worker that leaves."""
    study = make_study()
    launch = record(study, 2)
    launches.forget(study.storage.engine, study.uid, launch.number)
    assert launches.of_study(study.storage.engine, study.uid) == []
    assert record(study, 2).number == 2
    assert launches.is_retired(study.storage.engine, study.uid, Post(launch=1, slot=0))


@pytest.mark.parametrize("how", ["retired", "recalled"])
def test_a_worker_whose_slot_is_retired_leaves_for_good_before_it_claims(make_study: MakeStudy, how: str) -> None:
    study = make_study()
    where = study.storage.engine, study.study_id, study.uid
    launch = record(study, 2)
    if how == "retired":
        launches.retire(*where, launch.number, [1])
    else:
        launches.recall(study.storage.engine, study.study_id, study.uid)
    begun: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        begun.append(trial.number)
        return 1.0

    stopping = StopSignal()
    ledger = study.ledger("w", post=Post(launch=launch.number, slot=1))
    assert worker_loop.work(study, objective, ledger, stopping) == 0
    assert begun == []


@pytest.mark.parametrize(
    ("word", "asked_by", "code"),
    [
        ("0", None, 0),
        ("0", signal.SIGTERM, 0),
        ("2", None, 2),
        ("75", None, 75),
        ("143", signal.SIGUSR2, 140),  # the supervisor has passed it on as another signal
        ("143", signal.SIGTERM, 143),
        ("138", None, 138),
        ("130", None, 1),
        ("1", None, 1),
        ("again", None, 1),
        ("again", signal.SIGUSR2, 140),
        ("", None, 1),
        ("", signal.SIGTERM, 143),  # it had to be killed
    ],
)
def test_the_exit_code_of_a_worker(word: str, asked_by: int | None, code: int) -> None:
    assert exit_codes.of(word, asked_by) == code


class Supervised:
    """Supervises workers of the study in a folder."""

    def __init__(self, folder: Path) -> None:
        self.study = make_study(folder, OWN + "[budget]\ntrials = 1\n")
        self.code = folder / "mine.py"
        self.dead: list[Dead] = []

    def run(self, *, grace: float = 30.0) -> int:
        return supervisor.supervise(["--allow-code-change", "--", "own"], grace=grace, release=self._release)

    def _release(self, dead: Dead) -> bool:
        self.dead.append(dead)
        return releases.release_once(lambda: ("own", connect(str(self.study.storage.url))), dead)

    @property
    def failures(self) -> list[tuple[str, str]]:
        with sql.reading(self.study.storage.engine) as connection:
            rows = connection.execute(sa.select(hpo_failures.c.kind, hpo_failures.c.message))
            return [(kind, message) for kind, message in rows]


@pytest.fixture
def supervised(
    hpo: Hpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Supervised]:  # in the study's folder
    del hpo
    monkeypatch.setattr(supervisor, "CRASHES", 1)
    found = Supervised(tmp_path)
    yield found
    found.study.storage.close()


def test_a_worker_that_dies_before_it_has_a_trial_is_given_up(supervised: Supervised) -> None:
    """User code exits with a code of ours, so nothing may believe that it has parked."""
    supervised.code.write_text("import os\nos._exit(143)\n")
    assert supervised.run() == 1
    assert [(one.code, one.in_order) for one in supervised.dead] == [(143, False)]


def test_a_crash_that_costs_a_trial_is_counted_by_the_trial(supervised: Supervised, tmp_path: Path) -> None:
    supervised.code.write_text(
        "import os, pathlib\n"
        "def objective(trial):\n"
        f"    died = pathlib.Path({str(tmp_path / 'died')!r})\n"
        "    if not died.exists():\n"
        "        died.touch()\n"
        "        os._exit(143)\n"
        "    return 1.0\n"
    )
    assert supervised.run() == 0
    name = supervised.dead[0].worker
    assert supervised.failures == [("lost_worker", f"its worker died: exit code 143 ({name})")]


def ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal arrive when the supervisor is about to start a worker."""

    def asked(mark: Path | None, word: int | str) -> None:
        slots.say_last(mark, word)
        signal.raise_signal(signal.SIGUSR2)

    monkeypatch.setattr(supervisor, "say_last", asked)


def test_a_worker_that_is_asked_while_it_starts_leaves_in_order(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_at_once(monkeypatch)
    assert supervised.run() == 140
    assert supervised.dead == []


def test_a_worker_that_had_to_be_killed_after_a_preemption_is_run_again(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_at_once(monkeypatch)
    monkeypatch.setattr(supervisor, "KILL_SECONDS", 0.0)
    assert supervised.run(grace=0.0) == 140
    assert [(one.code, one.in_order) for one in supervised.dead] == [(-signal.SIGKILL, True)]
    assert supervised.failures == []


@pytest.mark.parametrize("is_launched", [True, False])
def test_a_launched_worker_waits_for_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch, is_launched: bool) -> None:
    monkeypatch.setattr("hpo.storage.retry.STOPPING_SECONDS", 0.0)
    stopping = StopSignal()
    stopping.request()
    url = f"postgresql://127.0.0.1:{free_port()}/hpo"
    with pytest.raises(Outage if is_launched else StorageAway):
        enlist(url, "own", None, None, stopping, allow_code_change=False, is_launched=is_launched)


def test_what_other_hosts_may_not_reach_is_told(make_study: MakeStudy) -> None:
    study = make_study()
    launch = record(study, 1)
    place = dataclasses.replace(study.storage, url=sa.make_url("postgresql://me:s3cret@localhost/hpo"))
    said = [
        doubt for doubt in launching.doubts(dataclasses.replace(study, storage=place), launch) if "storage" in doubt
    ]
    assert [doubt.partition(";")[0] for doubt in said] == [
        "storage postgresql://me:***@localhost/hpo: localhost is another machine on each host. "
        "Workers elsewhere do not reach it"
    ]


def test_the_section_is_no_part_of_a_studys_identity(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    assert "launch" not in study.spec.document
    changed = make_study(tmp_path, OWN + '[launch]\non = "slurm"\n[launch.slurm]\npartition = "gpu"\n')
    assert changed.spec.fingerprint == study.spec.fingerprint
    assert changed.spec.launch.document == {"on": "slurm", "slurm": {"partition": "gpu"}}


def test_the_fleet_of_a_database_without_launches_can_be_read(make_study: MakeStudy) -> None:
    study = make_study()
    ledger = study.ledger("w")
    workers.register(ledger)
    with sql.writing(study.storage.engine) as connection:
        for name in ("launch", "slot", "gpus"):
            connection.exec_driver_sql(f"ALTER TABLE hpo_workers DROP COLUMN {name}")
        connection.exec_driver_sql("DROP TABLE hpo_launches")
    found = read_fleet(study)
    assert [(one.name, one.launch, one.gpus) for one in found.workers] == [("w", None, None)]
    assert found.launches == []
    workers.register(dataclasses.replace(ledger, post=Post(launch=1, slot=0)))  # if nobody may add the columns
