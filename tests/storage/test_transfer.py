"""Rows of a study are found in every table, and an id of a trial is changed wherever it stands."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from hpo.storage import sql, tables, transfer
from hpo.storage.connect import connect
from hpo.storage.tables import optunas
from hpo.storage.transfer import Changes
from tests.support.trials import MakeStudy, begin


def test_every_table_says_which_rows_are_of_a_study() -> None:
    every = {*optunas.tables.values(), *tables.metadata.tables.values()}
    assert {*transfer.study_tables(), *transfer.NOT_OF_A_STUDY} == every
    for table in transfer.study_tables():
        transfer.of_study(table, 1, "uid")
    with pytest.raises(TypeError, match="table alembic_version: no column says which study a row belongs to"):
        transfer.of_study(tables.alembic_version, 1, "uid")


def test_ids_of_trials_in_attributes_of_the_study_change(make_study: MakeStudy, tmp_path: Path) -> None:
    target = connect(f"sqlite:///{tmp_path}/target.db", create=True)
    filler = target.optuna.create_new_study([optuna.study.StudyDirection.MINIMIZE], "filler")
    target.optuna.create_new_trial(filler)
    study = make_study()
    first = begin(study)[1].trial_id
    second = begin(study)[1].trial_id
    system = {
        "NSGAIISampler:parent:3": [second, first],
        f"dashboard:{second}:note_ver": 4,
        f"dashboard:artifacts:{first}:ab": "null",
        f"preference:skip_trial:{second}": True,
        "dashboard:note_ver": 2,
        "dashboard:999:note_ver": 1,  # of a trial that is gone
    }
    for key, value in system.items():
        study.storage.optuna.set_study_system_attr(study.study_id, key, value)
    with sql.snapshot(study.storage.engine) as read, sql.writing(target.engine) as write:
        transfer.copy_rows(read, write, study.study_id, study.uid, Changes())
    copied = target.optuna.get_study_id_from_name(study.name)
    new = [trial._trial_id for trial in target.optuna.get_all_trials(copied)]
    assert new == [2, 3]
    assert target.optuna.get_study_system_attrs(copied) == {
        "NSGAIISampler:parent:3": [3, 2],
        "dashboard:3:note_ver": 4,
        "dashboard:artifacts:2:ab": "null",
        "preference:skip_trial:3": True,
        "dashboard:note_ver": 2,
        "dashboard:999:note_ver": 1,
    }
    target.close()
