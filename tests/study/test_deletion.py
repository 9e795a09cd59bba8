"""A study is deleted whole, and nothing else. Not while somebody works on it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from hpo.errors import StudyError
from hpo.queue import workers
from hpo.spec.failures import Failure, Kind
from hpo.storage import sql, study_rows, tables
from hpo.storage.connect import plain_url
from hpo.study import control, deletion
from hpo.study import study as studies
from hpo.study.checkpoint_store import PROBE_FILE
from hpo.study.study import Study
from tests.cli.test_commands import Hpo, hpo
from tests.support.trials import MakeStudy, begin, said

__all__ = ["hpo"]


def filled(make_study: MakeStudy, name: str) -> Study:
    """Return a study with rows in most tables, a checkpoint and a log."""
    made = make_study(name=name)
    _, claim, trial = begin(made)
    trial.suggest_float("x", 0, 1)
    trial.client.ledger.report([said(trial.lease, 1)])
    trial.client.ledger.fail(claim, Failure(kind=Kind.EXCEPTION, message="m"))
    study_rows.announce_opening(made.storage.engine, made.study_id, study_uid=made.uid, trial_number=0, folder="runs")
    for file in (made.trial_folder(0) / "attempt-1-epoch-1-1.pt", made.logs / "worker-a-1-0.log"):
        file.parent.mkdir(parents=True)
        file.write_text("x")
    return made


def rows(study: Study) -> dict[str, int]:
    with study.storage.engine.connect() as connection:
        found = [*tables.optunas.tables.values(), *tables.metadata.tables.values()]
        return {
            table.name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in found
        }


@pytest.mark.both
def test_all_of_a_study_is_deleted_and_nothing_of_another(make_study: MakeStudy) -> None:
    other = filled(make_study, "other")
    before = rows(other)
    study = filled(make_study, "own")
    assert all(
        count > before[table] for table, count in rows(study).items() if before[table] and table != "alembic_version"
    )
    found = deletion.holdings(study)
    assert found.text.startswith(
        f"1 trial, 1 record of an opened test split; 1 checkpoint and 1 log in {study.checkpoints} ("
    )
    deletion.delete(study)
    assert rows(other) == before
    assert (study.checkpoints.exists(), (other.trial_folder(0) / "attempt-1-epoch-1-1.pt").exists()) == (False, True)
    assert studies.names(other.storage) == ["other"]
    with pytest.raises(StudyError, match="was deleted"):
        deletion.delete(study)


def test_a_study_with_living_workers_is_not_deleted(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study()
    ledger = study.ledger("w")
    workers.register(ledger)
    for refuses in (deletion.refuse_if_at_work, deletion.delete):
        with pytest.raises(StudyError, match="1 of its workers are alive, such as w;"):
            refuses(study)
    assert studies.names(study.storage) == ["own"]
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid != os.getpid())  # it was killed
    deletion.delete(study)
    assert studies.names(study.storage) == []


def test_a_study_with_a_trial_on_another_machine_is_not_deleted(make_study: MakeStudy) -> None:
    """Two containers may share a SQLite file. The one cannot see whether the other's worker lives."""
    study = make_study()
    ledger, _, _ = begin(study)
    workers.register(ledger)
    with sql.writing(study.storage.engine) as connection:
        connection.execute(tables.hpo_trials.update().values(lease_clock="boot@another-host"))
        connection.execute(tables.hpo_workers.update().values(clock="boot@another-host", host="another-host"))
    for refuses in (deletion.refuse_if_at_work, deletion.delete):
        with pytest.raises(StudyError, match="trial 0 is held by w on another machine; end that worker"):
            refuses(study)
    control.release(study, 0)
    deletion.delete(study)
    assert studies.names(study.storage) == []


def test_a_folder_of_another_study_stays(make_study: MakeStudy) -> None:
    study = make_study()
    (study.checkpoints / PROBE_FILE).write_text("another")
    assert (
        deletion.holdings(study).text
        == f"0 trials; its checkpoints are not seen in {study.checkpoints}, so what is there stays"
    )
    deletion.delete(study)
    assert study.checkpoints.exists()


def test_the_command_asks(make_study: MakeStudy, hpo: Hpo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = make_study()
    monkeypatch.setenv("HPO_STORAGE", plain_url(study.storage.url))
    for answer, told in (
        ("n", "nothing was deleted\n"),
        ("y", f"deleted study 'own': {deletion.holdings(study).text}\n"),
    ):
        answers = tmp_path / answer
        answers.write_text(f"{answer}\n")
        with answers.open() as given:
            monkeypatch.setattr("sys.stdin", given)
            code, out, _ = hpo("delete", "own")
        assert (code, out.endswith(told)) == (int(answer == "n"), True)
    assert hpo("delete", "own", "--yes")[0] == 2
