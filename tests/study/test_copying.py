"""A study is copied into another database, whole or not at all, and goes on there."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa

from hpo.errors import StorageError, StudyError
from hpo.final import openings
from hpo.queue import claiming, workers
from hpo.queue.models import Checkpoint, Claim
from hpo.spec.failures import Failure, Kind
from hpo.storage import sql, study_rows, transfer
from hpo.storage.connect import Storage, connect, plain_url
from hpo.storage.tables import Hold, hpo_launches
from hpo.study import control, copying
from hpo.study import study as studies
from hpo.study.checkpoint_store import PROBE_FILE
from hpo.study.status import summarize
from hpo.study.study import Study
from tests.cli.test_commands import Hpo, hpo
from tests.support import emptied
from tests.support.trials import MakeStudy, begin, claim_one, end_trial, said
from tests.support.waiting import PATIENCE

__all__ = ["hpo"]


@pytest.fixture
def target(storage_kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An open storage of the other kind than the test's own, without a row in it."""
    if storage_kind == "sqlite":
        url = str(request.getfixturevalue("one_database"))
        emptied.empty(url)
    else:
        url = f"sqlite:///{tmp_path}/target.db"
    opened = connect(url, create=True)
    yield opened
    opened.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Storage]:
    """An open SQLite storage without a row in it."""
    opened = connect(f"sqlite:///{tmp_path}/other.db", create=True)
    yield opened
    opened.close()


def filled(make_study: MakeStudy) -> Study:
    """Return a study with rows in most tables: a complete trial, one parked with a checkpoint, one that failed, one queued."""
    study = make_study(start=[{"x": 0.25}])
    _, _, trial = begin(study)
    trial.suggest_float("x", 0, 1)
    ledger = trial.client.ledger
    workers.register(ledger)
    for step, value in enumerate((0.5, math.nan, -math.inf), 1):
        report = said(trial.lease, step)
        ledger.report(
            [type(report)(claim=report.claim, step=step, value=value, metrics={"value": value, "zero": -0.0})]
        )
    end_trial(trial, optuna.trial.TrialState.COMPLETE, 0.5)
    _, failed, trial = begin(study)
    trial.client.ledger.fail(failed, Failure(kind=Kind.EXCEPTION, message="m"))
    again = claim_one(ledger)
    assert isinstance(again, Claim)
    file = study.trial_folder(again.number) / "attempt-1-epoch-3-1.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"state")
    digest = hashlib.sha256(b"state").hexdigest()
    ledger.record_checkpoint(again, Checkpoint(epoch=3, path=str(file), digest=digest))
    left = {"checkpoint": {"epoch": 3, "path": str(file), "digest": digest}}
    (file.parent / "attempt-1-handover.json").write_text(json.dumps(left))
    study_rows.announce_opening(
        study.storage.engine, study.study_id, study_uid=study.uid, trial_number=0, folder="runs"
    )
    study.optuna.enqueue_trial({"x": 0.75})
    workers.unregister(ledger)
    return study


def rows(place: Storage, study: Study) -> dict[str, list[Any]]:
    """Return what plain statements find of a study, by trial numbers, without what a copy changes."""
    with place.engine.connect() as connection:
        found = connection.execute(
            sa.text(
                "SELECT t.number, h.attempt, h.worker, h.lease_until, h.checkpoint_epoch, h.checkpoint_digest, h.outcome "
                "FROM hpo_trials h JOIN trials t ON t.trial_id = h.trial_id WHERE h.study_uid = :uid ORDER BY t.number"
            ),
            {"uid": study.uid},
        ).all()
        curves = connection.execute(
            sa.text(
                "SELECT t.number, c.metric, c.epoch, c.value FROM hpo_curves c JOIN trials t ON t.trial_id = c.trial_id "
                "WHERE c.study_uid = :uid ORDER BY t.number, c.metric, c.epoch"
            ),
            {"uid": study.uid},
        ).all()
    return {"trials": [tuple(row) for row in found], "curves": [tuple(row) for row in curves]}


def frozen(place: Storage, name: str) -> list[Any]:
    """Return all that Optuna knows of a study's trials, without their ids."""
    loaded = optuna.load_study(study_name=name, storage=place.optuna)
    return [
        (
            loaded.directions,
            one.number,
            one.state,
            one.values,
            one.params,
            one.distributions,
            repr(one.intermediate_values),
            one.user_attrs,
            one.system_attrs,
            one.datetime_start,
            one.datetime_complete,
        )
        for one in loaded.get_trials(deepcopy=False)
    ]


@pytest.mark.both
def test_a_copy_has_all_rows_and_goes_on(make_study: MakeStudy, target: Storage, tmp_path: Path) -> None:
    study = filled(make_study)
    optuna.create_study(storage=target.optuna, study_name="filler").ask()  # so that ids differ
    before = rows(study.storage, study)
    trials = frozen(study.storage, study.name)
    copied = copying.copy_study(study.storage, target, study.name, to=str(tmp_path / "shared"))
    assert {one.name: one.rows for one in copied.tables if one.rows} == {
        "studies": 1, "study_directions": 1, "study_user_attributes": 2, "trials": 4, "trial_params": 1,
        "trial_values": 1, "trial_intermediate_values": 3, "trial_system_attributes": 2, "hpo_studies": 1,
        "hpo_trials": 3, "hpo_failures": 1, "hpo_workers": 1, "hpo_curves": 6, "hpo_test_openings": 1,
    }  # fmt: skip
    assert (copied.open, copied.foreign, copied.is_held) == (1, 0, True)
    assert frozen(target, study.name) == trials
    parked = [(*row[:3], None, *row[4:]) for row in before["trials"]]
    assert rows(target, study) == {"trials": parked, "curves": before["curves"]}

    new = studies.join(target, study.name)
    assert (new.uid, new.checkpoints, new.sees_checkpoints) == (study.uid, tmp_path / "shared" / study.uid, True)
    claim = claim_one(new.ledger("w2"))
    assert isinstance(claim, Claim)
    path = new.trial_folder(2) / "attempt-1-epoch-3-1.pt"
    assert claim.checkpoint is not None
    assert (claim.number, claim.attempt, claim.checkpoint.path, path.read_bytes()) == (2, 2, str(path), b"state")
    note = json.loads((path.parent / "attempt-1-handover.json").read_text())
    assert note["checkpoint"]["path"] == str(path)
    assert [claim_one(new.ledger("w2")).number for _ in range(3)] == [3, 4, 5]
    assert summarize(new).spent == 6

    assert claiming.claim_many(study.ledger("w"), 1) is claiming.Idle.DONE
    held = studies.join(study.storage, study.name)
    assert held.stop_reason == f"copied to {target.shown}"
    control.resume(held)
    assert isinstance(claim_one(study.ledger("w")), Claim)


@pytest.mark.both
def test_an_export_names_the_study_in_both_storages(make_study: MakeStudy, target: Storage, tmp_path: Path) -> None:
    study = filled(make_study)
    copying.copy_study(study.storage, target, study.name, to=str(tmp_path / "shared"))
    receipt = {"study": study.name, "study_uid": study.uid, "trial": 0}
    spec = study.spec.model_copy(update={"receipt": receipt})
    for place in (study.storage, target):
        assert openings.announce(spec, tmp_path / "run", plain_url(place.url)) is None
        with place.engine.connect() as connection:
            assert [one.trial_number for one in study_rows.openings(connection, study.uid)] == [0, 0]


@pytest.mark.both
def test_a_study_of_optuna_s_is_copied_into_a_database_without_tables(
    place: Storage, storage_kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made = optuna.create_study(storage=place.optuna, study_name="notebook", directions=["minimize", "maximize"])
    made.enqueue_trial({"x": 0.5})
    made.ask()
    made.set_user_attr("who", "me")
    made.add_trial(
        optuna.trial.create_trial(
            values=[1.5, -2.0],
            params={"x": 0.25, "kind": "b"},
            distributions={
                "x": optuna.distributions.FloatDistribution(0, 1),
                "kind": optuna.distributions.CategoricalDistribution(["a", "b"]),
            },
            user_attrs={"note": "é\n"},
            intermediate_values={0: math.nan, 1: math.inf, 2: -math.inf, 3: 0.1},
        )
    )
    url = f"sqlite:///{tmp_path}/bare.db"
    if storage_kind == "sqlite":
        url = str(request.getfixturevalue("postgres_url"))
    target = connect(url, create=True)
    copied = copying.copy_study(place, target, "notebook")
    assert (copied.files, copied.open, copied.foreign, copied.is_held) == (None, 0, 1, False)
    assert frozen(target, "notebook") == frozen(place, "notebook")
    assert optuna.load_study(study_name="notebook", storage=target.optuna).user_attrs == {"who": "me"}
    target.close()


def test_nothing_is_overwritten_and_no_storage_is_copied_onto_itself(
    make_study: MakeStudy, other: Storage, tmp_path: Path
) -> None:
    study = filled(make_study)
    optuna.create_study(storage=other.optuna, study_name="own")
    with pytest.raises(StudyError, match=r"study 'own' is in sqlite.*other.db already, and nothing is overwritten"):
        copying.copy_study(study.storage, other, "own")
    with pytest.raises(StudyError, match=r"not there yet: second"):
        copying.refuse_clash(study.storage, other, ["own", "second"])
    (tmp_path / "link.db").symlink_to(study.storage.url.database or "")
    same = connect(f"sqlite:///{tmp_path}/link.db")
    with pytest.raises(StorageError, match="is where the studies are already"):
        copying.copy_study(study.storage, same, "own")
    same.close()
    with pytest.raises(StudyError, match="there is no study 'owm'"):
        copying.copy_study(study.storage, other, "owm")
    assert summarize(studies.join(study.storage, "own")).hold is None


def test_a_study_at_work_or_unmade_is_not_copied(make_study: MakeStudy, other: Storage) -> None:
    study = make_study()
    ledger = study.ledger("w")
    workers.register(ledger)
    with pytest.raises(StudyError, match="1 of its workers are alive, such as w;"):
        copying.copy_study(study.storage, other, "own")
    workers.unregister(ledger)
    with sql.writing(study.storage.engine) as connection:
        study_rows.update(connection, study.uid, hold=Hold.FORKING, stop_reason="a fork was cut off")
    with pytest.raises(StudyError, match="study 'own' is not whole yet: a fork was cut off"):
        copying.copy_study(study.storage, other, "own")
    assert studies.all_names(other) == []


def test_a_study_that_is_worked_on_during_the_copy_is_not_copied(
    make_study: MakeStudy, other: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = filled(make_study)
    copy_rows = transfer.copy_rows

    def meanwhile(*given: Any) -> list[transfer.TableCopy]:
        copied = copy_rows(*given)
        workers.register(study.ledger("late"))
        workers.unregister(study.ledger("late"))
        return copied

    monkeypatch.setattr(transfer, "copy_rows", meanwhile)
    with pytest.raises(StudyError, match="a worker was at work on it during the copy; nothing was copied"):
        copying.copy_study(study.storage, other, "own")
    assert (studies.all_names(other), summarize(study).hold) == ([], None)


def test_a_copy_that_arrived_keeps_its_files_when_the_answer_is_lost(
    make_study: MakeStudy, other: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = filled(make_study)

    @contextmanager
    def unheard(engine: sa.Engine) -> Iterator[sa.Connection]:
        with writing(engine) as connection:
            yield connection
        raise sa.exc.OperationalError("COMMIT", None, Exception("the connection is lost"))

    writing = sql.writing
    monkeypatch.setattr(sql, "writing", unheard)
    with pytest.raises(StorageError, match=r"look whether it arrived in .*the connection is lost"):
        copying.copy_study(study.storage, other, "own")
    monkeypatch.setattr(sql, "writing", writing)
    claim = claim_one(studies.join(other, "own").ledger("w"))
    assert isinstance(claim, Claim)
    assert claim.checkpoint is not None
    assert Path(claim.checkpoint.path).read_bytes() == b"state"


def test_launches_are_recalled_in_the_copy(make_study: MakeStudy, other: Storage) -> None:
    study = make_study()
    launch = {"study_id": study.study_id, "launch": 1, "engine": "slurm", "slots": 4, "retired": "[]", "handles": "[]"}
    with study.storage.engine.begin() as connection:
        told = {"asked": "{}", "launched_by": "me@here", "launched_at": 5.0}
        connection.execute(hpo_launches.insert().values(study_uid=study.uid, **launch, **told))
    copying.copy_study(study.storage, other, "own")
    with other.engine.connect() as connection:
        assert connection.execute(sa.select(hpo_launches.c.recalled_at)).scalars().all() == [5.0]


def test_leases_of_killed_workers_are_given_back_in_the_copy(make_study: MakeStudy, other: Storage) -> None:
    study = make_study()
    begin(study, "dead")  # never registered, and its lease stands
    copying.copy_study(study.storage, other, "own", hold=False)
    new = studies.join(other, "own")
    claim = claim_one(new.ledger("w"))
    assert isinstance(claim, Claim)
    assert (claim.number, claim.attempt) == (0, 2)
    assert summarize(study).hold is None


def test_checkpoints_that_are_missing_or_damaged_are_not_passed_over(
    make_study: MakeStudy, other: Storage, tmp_path: Path
) -> None:
    study = filled(make_study)
    file = study.trial_folder(2) / "attempt-1-epoch-3-1.pt"
    file.write_bytes(b"cut")
    to = tmp_path / "to"
    with pytest.raises(StudyError, match=r"trial 2 of study 'own': its checkpoint .* is damaged; nothing was copied"):
        copying.copy_study(study.storage, other, "own", to=str(to))
    (study.checkpoints / PROBE_FILE).unlink()
    with pytest.raises(StudyError, match="are not seen from here; copy on a machine that sees them"):
        copying.copy_study(study.storage, other, "own", to=str(to))
    assert (studies.all_names(other), list(to.iterdir())) == ([], [])
    copying.copy_study(study.storage, other, "own", to=str(to), checkpoints=False)
    claim = claim_one(studies.join(other, "own").ledger("w"))
    assert isinstance(claim, Claim)
    assert (claim.number, claim.attempt, claim.checkpoint) == (2, 2, None)


def test_copies_beside_the_old_study_share_no_folder_and_can_be_copied_back(
    make_study: MakeStudy, other: Storage
) -> None:
    study = filled(make_study)
    copying.copy_study(study.storage, other, "own")
    there = studies.join(other, "own")
    assert there.checkpoints.parent == study.checkpoints.parent
    assert there.checkpoints.name.startswith(f"{study.uid}-")
    optuna.delete_study(study_name="own", storage=study.storage.optuna)  # which leaves our rows behind, dead
    copying.copy_study(other, study.storage, "own")
    back = studies.join(study.storage, "own")
    assert (back.uid, back.stop_reason, summarize(back).hold) == (study.uid, None, None)
    assert isinstance(claim_one(back.ledger("w")), Claim)


def test_a_row_that_arrives_changed_gives_the_copy_up(make_study: MakeStudy, other: Storage, tmp_path: Path) -> None:
    study = filled(make_study)
    with other.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER worse AFTER INSERT ON hpo_curves BEGIN UPDATE hpo_curves SET value = 0.1; END"
        )
    with pytest.raises(StorageError, match=r"nothing was copied .* 6 rows were read and 6 other ones arrived"):
        copying.copy_study(study.storage, other, "own", to=str(tmp_path / "to"))
    assert (studies.all_names(other), list((tmp_path / "to").iterdir())) == ([], [])
    assert summarize(study).hold is None


KILLED = """
import os, signal, sys
from hpo.storage import transfer
from hpo.storage.connect import connect
from hpo.study import copying
write = transfer._write
def dying(connection, table, columns, rows):
    write(connection, table, columns, rows)
    if table.name == "hpo_curves":
        os.kill(os.getpid(), signal.SIGKILL)
transfer._write = dying
copying.copy_study(connect(sys.argv[1]), connect(sys.argv[2]), "own")
"""


@pytest.mark.parametrize("storage_kind", ["sqlite"], indirect=True)
def test_a_killed_copy_leaves_nothing_in_the_database(make_study: MakeStudy, target: Storage, tmp_path: Path) -> None:
    study = filled(make_study)
    urls = [plain_url(place.url) for place in (study.storage, target)]
    ended = subprocess.run([sys.executable, "-c", KILLED, *urls], timeout=PATIENCE, capture_output=True, cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with target.engine.connect() as connection:
        for table in transfer.study_tables():
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 0
    copying.copy_study(study.storage, target, "own")
    assert summarize(studies.join(target, "own")).spent == 3


def test_the_command_copies_all_studies_and_says_what_to_do(make_study: MakeStudy, hpo: Hpo, tmp_path: Path) -> None:
    study = filled(make_study)
    optuna.create_study(storage=study.storage.optuna, study_name="notebook").ask()
    old, new = f"sqlite:///{study.storage.url.database}", f"sqlite:///{tmp_path}/new.db"
    code, told, wrong = hpo("copy", old, new, "--checkpoints", "x", "--no-checkpoints")
    assert (code, told) == (2, "")
    code, told, wrong = hpo("copy", old, new)
    assert (code, wrong) == (0, "")
    assert "copied 'own': 4 trials; " in told
    assert "  1 trial parked, which the next worker goes on with\n" in told
    assert f"hpo resume own --storage {old}\n" in told
    assert "copied 'notebook': 1 trial; " in told
    assert "  1 trial RUNNING in another program, with which nobody goes on there\n" in told
    code, told, wrong = hpo("copy", old, new)
    assert (code, told) == (2, "")
    assert "nothing is overwritten" in wrong
    code, told, wrong = hpo("copy", old, f"sqlite:///{tmp_path}/third.db", "own", "--keep-source", "--json")
    (found,) = json.loads(told)
    assert (code, found["study"], found["tables"]["trials"]["rows"], found["held"]) == (0, "own", 4, False)
    assert summarize(studies.join(study.storage, "own")).hold == Hold.COPIED  # as it was
    optuna.create_study(storage=study.storage.optuna, study_name="own/confirm")
    code, told, wrong = hpo("copy", old, f"sqlite:///{tmp_path}/fourth.db", "own", "--keep-source")
    assert "not copied: own/confirm, the confirmation; it is a study of its own: name it, too\n" in told
    code, told, wrong = hpo("copy", f"sqlite:///{tmp_path}/none.db", new)
    assert (code, told) == (2, "")
    assert "none.db: no such file" in wrong
