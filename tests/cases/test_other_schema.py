"""Workers of two versions that read our rows in different ways do not work on one study side by side."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.errors import MismatchError, StudyError
from hpo.queue import workers
from hpo.storage import sql
from hpo.storage.connect import Storage, connect
from hpo.storage.tables import SCHEMA, hpo_studies, hpo_trials, hpo_workers
from hpo.study import study as studies
from hpo.study.study import Study
from tests.support.trials import claim_one, make

pytestmark = pytest.mark.both


def set_rows(place: Storage, table: sa.Table, **values: Any) -> None:
    with sql.writing(place.engine) as connection:
        connection.execute(table.update().values(**values))


def join(study: Study) -> None:
    studies.check_worker(study, mine=None, code_digest="", allow_code_change=False)


def stored(place: Storage) -> tuple[int | None, dict[str, Any]]:
    with place.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_studies)).one()
    return row.schema, json.loads(row.spec)


def as_before(study: Study, *, seen: float = 0.0, left: float | None = None, **versions: str) -> None:
    """Let the study be one of before, on which such a process works."""
    workers.register(study.ledger("host:1:old"))
    at = time.time() - seen
    told = {"clock": None, "booted_at": None, "started_at": at - 999, "seen_at": at, "left_at": left}
    set_rows(study.storage, hpo_workers, **told, versions=json.dumps(versions))
    _, spec = stored(study.storage)
    set_rows(study.storage, hpo_studies, schema=None, spec=json.dumps({**spec, "format": 1}))
    _, spec = stored(study.storage)
    del spec["format"]
    set_rows(study.storage, hpo_studies, spec=json.dumps(spec))


@pytest.mark.parametrize("versions", [{"hpo": "0.1.0"}, {"schema": "1"}, {"schema": "3"}])
def test_nobody_joins_beside_a_living_worker_of_another_schema(
    versions: dict[str, str], place: Storage, demo: Study, tmp_path: Path
) -> None:
    as_before(demo, **versions)
    refused = r"study 'demo': host:1:old of another version of hpo work on it, .*silent for 60s \(recovery.lease\)"
    with pytest.raises(MismatchError, match=refused):
        join(demo)
    with pytest.raises(MismatchError, match=refused):
        make(place, tmp_path)  # as `hpo run` does
    assert stored(place)[0] is None  # nothing was changed under its hands
    assert "format" not in stored(place)[1]


@pytest.mark.parametrize("gone", [{"seen": 61.0}, {"left": 1.0}], ids=["silent", "left"])
def test_once_it_is_gone_the_study_is_taken_over_and_kept_from_it(
    gone: dict[str, float], place: Storage, demo: Study
) -> None:
    """The format that now stands in the spec is a key that an hpo of schema 1 refuses to read."""
    as_before(demo, **gone)
    join(demo)
    schema, spec = stored(place)
    assert (schema, spec["format"]) == (SCHEMA, 1)
    assert studies.join(place, "demo").spec.format == 1
    join(demo)
    assert stored(place) == (schema, spec)


def test_workers_of_one_schema_join_beside_one_another(demo: Study) -> None:
    workers.register(demo.ledger("one"))
    join(demo)


def test_a_study_of_a_later_hpo_is_refused(place: Storage, demo: Study) -> None:
    set_rows(place, hpo_studies, schema=SCHEMA + 1)
    with pytest.raises(StudyError, match=f"was worked on by a later hpo: its schema is {SCHEMA + 1}, here {SCHEMA}"):
        studies.join(place, "demo")
    with pytest.raises(
        StudyError, match="another version of hpo has taken over the study"
    ):  # though it had joined before
        claim_one(demo.ledger("w"))


def test_tables_of_before_get_their_columns_by_any_command(bare_url: str) -> None:
    place = connect(bare_url, create=True)
    with place.engine.begin() as connection:
        for column in ("hpo_trials.lease_clock", "hpo_workers.clock", "hpo_workers.booted_at", "hpo_studies.schema"):
            table, name = column.split(".")
            connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {name}")
    place.close()
    again = connect(bare_url)
    assert studies.names(again) == []
    with again.engine.connect() as connection:
        for ours in (hpo_studies, hpo_trials, hpo_workers):
            assert connection.execute(ours.select()).all() == []
    again.close()
