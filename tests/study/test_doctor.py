"""Each ailment is found and told with its mend; what can be mended without a person's decision is, and then is gone."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StudyError
from hpo.queue import workers
from hpo.queue.models import Claim
from hpo.spec import usercode
from hpo.spec.failures import Failure, Kind
from hpo.spec.study_file import StudySpec
from hpo.storage import sql
from hpo.storage.connect import Storage, connect
from hpo.storage.tables import Hold, hpo_failures, hpo_studies, hpo_trials, hpo_workers
from hpo.study import control, doctor, resolve
from hpo.study import study as studies
from hpo.study.checkpoint_store import PROBE_FILE
from hpo.study.doctor import Finding
from hpo.study.study import Study
from tests.conftest import OWN_OBJECTIVE
from tests.support.trials import begin, claim_one, finish_claim

MakeWhole = Callable[..., Study]
CODE = "def objective(trial): return trial.suggest_float('x', 0.0, 1.0)\n"


@pytest.fixture
def make_whole(place: Storage, tmp_path: Path) -> MakeWhole:
    """Make a study whose code is there, with the digest that workers will find."""

    def make(**document: Any) -> Study:
        (tmp_path / "mine.py").write_text(CODE)
        spec = StudySpec.from_document(
            {**OWN_OBJECTIVE, "checkpoints": str(tmp_path / "checkpoints"), "budget": {"trials": 10}, **document}
        )
        digest = resolve.load_and_digest(spec, tmp_path)
        return studies.create_or_join(place, spec, code_folder=tmp_path, code_digest=digest)

    return make


@pytest.fixture
def whole(make_whole: MakeWhole) -> Study:
    return make_whole()


def examine(study: Study, *, repair: bool = False) -> list[Finding]:
    found = doctor.examine(study.storage, study.name, repair=repair)
    for finding in found:
        assert finding.where == study.name
        assert "\n" not in finding.what
        assert not (finding.is_ill and finding.is_repaired)
    return found


def the_ill(study: Study, *, repair: bool = False) -> Finding:
    """Return the one thing that is to mend."""
    (found,) = [finding for finding in examine(study, repair=repair) if finding.is_ill]
    return found


def mended(study: Study, what: str) -> None:
    """Find this and only this, repair it, and find it no more."""
    assert the_ill(study).what == what
    assert the_ill(study).what == what  # looking mends nothing
    assert [finding.what for finding in examine(study, repair=True) if finding.is_repaired] == [what]
    again = examine(study, repair=True)
    assert [finding.what for finding in again if finding.is_ill or finding.is_repaired] == []


def finish(study: Study, value: float = 0.5) -> None:
    ledger, claim, _ = begin(study)
    finish_claim(ledger, claim, TrialState.COMPLETE, value, outcome="complete")


def change(study: Study, table: sa.Table, **values: object) -> None:
    with sql.writing(study.storage.engine) as connection:
        connection.execute(table.update().values(**values))


# --- a study that is well ---------------------------------------------------------------------------------------------


def test_a_new_study_has_nothing_to_mend(whole: Study) -> None:
    assert examine(whole) == []


def test_a_study_at_work_has_nothing_to_mend(whole: Study) -> None:
    workers.register(whole.ledger("w"))
    finish(whole)
    whole.trial_folder(0).mkdir()  # the best one's checkpoint is kept
    _, _, trial = begin(whole)
    whole.trial_folder(1).mkdir()
    trial.report(0.5, 1)
    whole.optuna.enqueue_trial({"x": 0.5})
    assert examine(whole) == []
    assert examine(whole, repair=True) == []
    assert whole.trial_folder(0).is_dir()
    assert whole.trial_folder(1).is_dir()


def test_a_parked_trial_is_good_to_know_and_nothing_to_mend(whole: Study) -> None:
    ledger, claim, _ = begin(whole)
    ledger.park(claim)
    (found,) = examine(whole)
    assert (found.what, found.is_ill) == ("trial 0 is parked", False)
    assert found.text == ("note    own: trial 0 is parked\n        hpo run, or hpo worker, goes on with it")


def test_a_pause_is_good_to_know(whole: Study) -> None:
    control.pause(whole)
    (found,) = examine(whole)
    assert (found.what, found.mend, found.is_ill) == ("paused: by `hpo pause`", "hpo resume own", False)


def test_a_broken_study_is_ill_until_a_person_resumes_it(make_whole: MakeWhole) -> None:
    study = make_whole(failures={"in_a_row": 1})
    ledger, claim, _ = begin(study)
    ledger.fail(claim, Failure(kind=Kind.EXCEPTION, message="ValueError: no"))
    found = the_ill(study, repair=True)
    assert found.what == "broken: 1 trials in a row ended by exception, the last: ValueError: no"
    assert found.mend == "hpo resume own"
    control.resume(study)
    assert examine(study) == []


def test_a_fork_that_was_cut_off_is_not_sent_to_resume_which_refuses_it(whole: Study) -> None:
    change(whole, hpo_studies, hold=Hold.FORKING, stop_reason="a fork into it was cut off; delete it")
    (found,) = examine(whole)
    assert found.what == "forking: a fork into it was cut off; delete it"
    assert "hpo resume" not in found.mend


def test_a_study_that_is_not_there_is_no_finding(whole: Study) -> None:
    with pytest.raises(StudyError, match=r"there is no study 'owl' in .* \(did you mean 'own'\?\)"):
        doctor.examine(whole.storage, "owl", repair=True)


# --- trials -----------------------------------------------------------------------------------------------------------


def test_a_trial_whose_lease_ran_out_is_parked(whole: Study) -> None:
    claim = claim_one(whole.ledger("dead", lease_seconds=-1.0))
    assert isinstance(claim, Claim)
    mended(whole, "trial 0 is RUNNING without a live lease; its worker was dead")
    with whole.storage.engine.connect() as connection:
        assert connection.execute(sa.select(hpo_trials.c.lease_until)).scalar_one() is None
        failure = connection.execute(sa.select(hpo_failures)).one()
    assert (failure.kind, failure.verdict, failure.worker) == ("lost_worker", "retry", "dead")
    assert begin(whole)[1].attempt == 2


def test_a_trial_that_something_else_ended_is_closed(whole: Study) -> None:
    ledger, claim, _ = begin(whole)
    whole.optuna.tell(0, state=TrialState.FAIL)
    mended(whole, "trial 0 was ended by another program; our row of it is still open")
    with whole.storage.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_trials)).one()
    assert (row.settled, row.lease_until, row.outcome) == (True, None, "ended elsewhere")
    assert ledger.commands_of([claim])[claim].lost
    assert whole.optuna.trials[0].state == TrialState.FAIL


def test_a_parked_trial_ended_elsewhere_keeps_its_value(whole: Study) -> None:
    """A parked trial that something else ended is closed and keeps its value."""
    ledger, claim, _ = begin(whole)
    ledger.park(claim)
    whole.optuna.tell(0, 0.25)
    mended(whole, "trial 0 was ended by another program; our row of it is still open")
    assert (whole.optuna.trials[0].state, whole.optuna.trials[0].value) == (TrialState.COMPLETE, 0.25)


@pytest.mark.both
def test_a_foreign_trial_is_only_told(whole: Study) -> None:
    """A trial of another program is only told and a person may fail it."""
    whole.optuna.ask()
    started = whole.optuna.trials[0].datetime_start
    found = the_ill(whole, repair=True)
    assert found.what == f"trial 0 was started by another program at {started:%Y-%m-%d %H:%M:%S} UTC"
    assert found.mend == "if that is dead: hpo doctor own --fail 0"
    assert whole.optuna.trials[0].state == TrialState.RUNNING
    control.fail_foreign(whole, 0)
    assert examine(whole) == []
    assert whole.optuna.trials[0].state == TrialState.FAIL


def test_the_findings_of_one_study_are_not_told_of_another(whole: Study, make_whole: MakeWhole) -> None:
    other = make_whole(name="other")
    claim_one(whole.ledger("dead", lease_seconds=-1.0))
    begin(whole)
    whole.optuna.tell(1, state=TrialState.FAIL)
    whole.optuna.ask()
    assert len([finding for finding in examine(whole) if finding.is_ill]) == 3
    assert examine(other, repair=True) == []
    assert len([finding for finding in examine(whole) if finding.is_ill]) == 3


@pytest.mark.both
def test_one_repair_mends_all_that_can_be_mended(whole: Study) -> None:
    finish(whole)
    begin(whole)
    whole.optuna.tell(1, state=TrialState.FAIL)
    claim_one(whole.ledger("dead", lease_seconds=-1.0))
    whole.trial_folder(1).mkdir()
    examine(whole, repair=True)
    assert [finding.what for finding in examine(whole)] == ["trial 2 is parked"]


# --- the spec and the code --------------------------------------------------------------------------------------------

SPECS = {
    "not JSON": "garbage",
    "cut off": '{"name": "own", "obj',
    "no table": "null",
    "empty": "{}",
    "a later version's": json.dumps({**OWN_OBJECTIVE, "federated": True}),
    "a sampler of a later version": json.dumps({**OWN_OBJECTIVE, "sampler": {"name": "oracle"}}),
    "a pruner of a later version": json.dumps({**OWN_OBJECTIVE, "pruner": {"name": "oracle"}}),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_spec_that_no_version_here_can_load_is_told(case: str, whole: Study) -> None:
    change(whole, hpo_studies, spec=SPECS[case])
    found = the_ill(whole, repair=True)
    assert found.what.startswith(("no worker can load its spec: ", "no worker here can load it: "))
    assert found.mend.endswith("use the version of hpo that made it")


def test_code_that_is_not_there_is_told(whole: Study, tmp_path: Path) -> None:
    begin(whole)
    (tmp_path / "mine.py").unlink()
    found = the_ill(whole, repair=True)
    assert found.what == (
        f"no worker here can load it: code: no file {tmp_path}/mine.py; paths are relative to the study file"
    )
    assert found.mend == "mend that, give --code FOLDER, or use the version of hpo that made it"


def test_code_that_cannot_be_imported_is_told(place: Storage, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_package\n")
    spec = StudySpec.from_document({**OWN_OBJECTIVE, "checkpoints": str(tmp_path / "checkpoints")})
    study = studies.create_or_join(place, spec, code_folder=tmp_path, code_digest="made elsewhere")
    begin(study)
    found = the_ill(study)
    assert found.what.startswith(
        "no worker here can load it: code: importing mine.py failed: ModuleNotFoundError: No module named "
        "'no_such_package'"
    )


def test_studies_that_cannot_share_a_process_are_not_ill(place: Storage, whole: Study, tmp_path: Path) -> None:
    """Each is loaded in a process of its own, as by its workers, and is told if it fails there."""
    assert examine(whole) == []
    document = {**OWN_OBJECTIVE, "name": "other", "checkpoints": str(tmp_path / "checkpoints")}
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text(CODE)  # this process has another module `mine`
    digest = usercode.digest(["mine.py:objective"], tmp_path / "sub")
    other = studies.create_or_join(
        place, StudySpec.from_document(document), code_folder=tmp_path / "sub", code_digest=digest
    )
    assert examine(other) == []
    (tmp_path / "sub" / "mine.py").write_text("import os\nos._exit(3)\n")
    assert the_ill(other).what == "no worker here can load it: it ends the process that imports it"


def test_code_that_changed_is_told_unless_the_study_let_it_in(whole: Study, tmp_path: Path) -> None:
    begin(whole)
    (tmp_path / "mine.py").write_text(CODE + "changed = True\n")
    found = the_ill(whole, repair=True)
    assert found.what == f"your own code in {tmp_path} changed since the study was made"
    assert found.mend == "undo the change, or run with --allow-code-change"
    digest = resolve.load_and_digest(whole.spec, tmp_path)
    studies.check_worker(whole, mine=None, code_digest=digest, allow_code_change=True)
    assert examine(whole) == []


def test_code_that_no_trial_has_run_may_still_change(whole: Study, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE + "changed = True\n")
    assert examine(whole) == []  # as a worker that joins would see it
    digest = resolve.load_and_digest(whole.spec, tmp_path)
    studies.check_worker(whole, mine=None, code_digest=digest, allow_code_change=False)


# --- workers ----------------------------------------------------------------------------------------------------------


def enter(study: Study, worker: str, **values: object) -> None:
    """Let a worker enter, with these values in its row."""
    workers.register(study.ledger(worker))
    with sql.writing(study.storage.engine) as connection:
        named = {"worker": worker, **values}
        connection.execute(hpo_workers.update().where(hpo_workers.c.worker == worker).values(**named))


@pytest.mark.both
@pytest.mark.parametrize("skew", [2.5, -7200.0])
def test_a_worker_whose_clock_is_off_is_told(skew: float, whole: Study) -> None:
    enter(whole, "right")
    enter(whole, "wrong", clock_skew=skew, host="far")
    if whole.storage.is_sqlite:  # which has no clock of its own: what a worker tells is how its clock was set
        found, *_ = examine(whole)
        assert found.what == f"the clock of this machine was set by {skew:+.1f} s after worker wrong had begun"
        assert not found.is_ill
        return
    found = the_ill(whole, repair=True)
    assert found.what == f"the clock of far is {skew:+.1f} s off the database's (worker wrong)"


def test_a_worker_with_other_versions_than_the_most_is_told(whole: Study) -> None:
    for worker in ("one", "other"):
        enter(whole, worker, versions=json.dumps({"python": "3.11.7", "torch": "2.15.0"}))
    enter(whole, "odd", versions=json.dumps({"python": "3.11.7", "torch": "2.14.0", "numpy": "2.0"}))
    found = the_ill(whole, repair=True)
    assert found.what == "worker odd has other versions than most workers: numpy 2.0 for none, torch 2.14.0 for 2.15.0"


@pytest.mark.parametrize("gone", [{"left_at": 1.0}, {"seen_at": 1.0}], ids=["left", "silent"])
def test_workers_that_are_gone_are_not_told_of(gone: dict[str, float], whole: Study) -> None:
    enter(whole, "living")
    enter(whole, "gone", clock_skew=100.0, versions="{}", **gone)
    assert examine(whole) == []


def test_local_checkpoints_are_worth_a_word(whole: Study) -> None:
    """Checkpoints on a local disk are worth a word to workers of two machines."""
    enter(whole, "here")
    assert examine(whole) == []
    enter(whole, "there", host="far")
    (found,) = examine(whole)
    assert found.what.startswith(f"workers of 2 machines share {whole.checkpoints}, which is on a local disk here (")
    assert not found.is_ill
    change(whole, hpo_workers, left_at=1.0)
    assert examine(whole) == []


def test_checkpoints_that_a_network_serves_are_not(
    whole: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(whole, "here")
    enter(whole, "there", host="far")
    one = psutil.disk_partitions(all=True)[0]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [one._replace(mountpoint=str(tmp_path), fstype="nfs4")])
    assert examine(whole) == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_of_finished_trials_are_removed(whole: Study) -> None:
    """Checkpoints of finished trials are removed but for the best one's."""
    for value in (0.5, 0.25, 0.75):
        finish(whole, value)
    ledger, claim, _ = begin(whole)
    for number in range(4):
        whole.trial_folder(number).mkdir()
        (whole.trial_folder(number) / "attempt-1-epoch-1-0.pt").write_bytes(b"weights")
    ledger.park(claim)
    mended(whole, f"checkpoints of 2 finished trials are left in {whole.checkpoints}")
    left = {folder.name for folder in whole.checkpoints.glob("trial-*")}
    assert left == {"trial-000001", "trial-000003"}  # study minimizes; number 3 will be gone on with


@pytest.mark.both
@pytest.mark.parametrize("text", [None, "another study's"])
def test_a_machine_that_does_not_see_the_study_s_own_checkpoints_is_told(text: str | None, whole: Study) -> None:
    finish(whole)
    finish(whole)
    for number in range(2):
        whole.trial_folder(number).mkdir()
    probe = whole.checkpoints / PROBE_FILE
    probe.unlink() if text is None else probe.write_text(text)
    found = the_ill(whole, repair=True)
    assert found.what == f"checkpoints {whole.checkpoints}: this machine does not see the study's own folder there"
    assert found.mend.startswith("mount it, or ")
    assert found.mend.endswith("; until then workers here refuse to join")
    assert whole.trial_folder(1).is_dir()  # nothing is removed from a folder that may be another's


def test_a_folder_of_checkpoints_that_is_gone_is_told(whole: Study) -> None:
    shutil.rmtree(whole.checkpoints)
    assert the_ill(whole, repair=True).what.startswith(f"checkpoints {whole.checkpoints}: this machine does not see ")


def test_a_folder_that_is_no_trial_s_is_left_alone(whole: Study) -> None:
    finish(whole)
    for name in ("trial-000000.bak", "trial-0-copy", "notes"):
        (whole.checkpoints / name).mkdir()
    assert examine(whole, repair=True) == []
    assert (whole.checkpoints / "trial-0-copy").is_dir()


def test_a_disk_that_is_nearly_full_is_told(whole: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20 * 100, 2**20 * 100))
    found = the_ill(whole, repair=True)
    assert found.what == f"the disk of {whole.checkpoints} has 100 MiB left"


# --- the storage itself -----------------------------------------------------------------------------------------------


@pytest.mark.both
def test_a_storage_that_is_well_is_not_told_of(place: Storage) -> None:
    assert list(doctor.examine_storage(place, None)) == []
    assert list(doctor.examine_storage(place, 8)) == []


def test_a_postgres_with_too_few_connections_is_told(postgres_url: str) -> None:
    """A Postgres with too few connections for the workers planned is told."""
    place = connect(postgres_url, create=True)
    (found,) = doctor.examine_storage(place, 1000)
    assert found.is_ill
    assert found.where == place.shown
    assert "1000 workers and this process take up to 2002 connections" in found.what
    place.close()


def damaged(folder: Path, where: str) -> Storage:
    """Return a SQLite storage, damaged at a place that nothing of Optuna's or ours is in."""
    url, file = f"sqlite:///{folder}/studies.db", folder / "studies.db"
    connect(url, create=True).close()
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE filler (text TEXT)")
    connection.executemany("INSERT INTO filler VALUES (?)", [("x" * 1000,)] * 200)
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size, pages = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count"))
    connection.close()
    content = bytearray(file.read_bytes())
    if where == "page":
        content[(pages - 2) * size : (pages - 1) * size] = b"\xff" * size
    else:
        content[36:40] = b"\0\0\0\7"  # the number of free pages
    file.write_bytes(content)
    return connect(url)


@pytest.mark.parametrize("where", ["page", "header"])
def test_a_damaged_sqlite_file_is_told_in_a_line(where: str, tmp_path: Path) -> None:
    place = damaged(tmp_path, where)
    (found,) = doctor.examine_storage(place, None)
    assert found.what.startswith("the file is damaged: ")
    assert (found.where, found.mend, found.is_ill) == (place.shown, "restore a copy of it", True)
    assert "\n" not in found.what
    place.close()


def test_a_deleted_study_s_leftovers_are_nobody_s(whole: Study, make_whole: MakeWhole) -> None:
    claim_one(whole.ledger("dead", lease_seconds=-1.0))
    enter(whole, "dead", clock_skew=100.0)
    optuna.delete_study(study_name=whole.name, storage=whole.storage.optuna)
    assert examine(make_whole()) == []
