"""Our tables beside Optuna's: what a database of an earlier version lacks is added, with all rows kept."""

from __future__ import annotations

import math
import threading

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StorageError
from hpo.queue.models import Checkpoint
from hpo.storage import tables
from hpo.storage.connect import Storage, connect
from hpo.storage.tables import hpo_failures, hpo_studies, hpo_trials, hpo_workers
from hpo.study import study as studies
from hpo.study.study import Study
from tests.support.trials import MakeStudy, begin, finish_claim

pytestmark = pytest.mark.both

#: What has come to our tables since they were first made.
NEW = [
    hpo_studies.c.hold,
    hpo_studies.c.streak_kind,
    hpo_studies.c.streak,
    hpo_trials.c.stop_requested,
    hpo_trials.c.accumulation,
    hpo_trials.c.stack_key,
    hpo_trials.c.costs,
    hpo_studies.c.schema,
    hpo_trials.c.lease_clock,
]


@pytest.fixture
def url(bare_url: str) -> str:
    """The URL of a database of the test's own, with all tables: these tests change them."""
    connect(bare_url, create=True).close()
    return bare_url


def drop(place: Storage, *columns: sa.Column[object]) -> None:
    with place.engine.begin() as connection:
        for column in columns:
            connection.exec_driver_sql(f"ALTER TABLE {column.table.name} DROP COLUMN {column.name}")


def as_an_earlier_version(study: Study) -> None:
    """Take from a study's database what the first version did not have."""
    drop(study.storage, *NEW)
    with study.storage.engine.begin() as connection:
        for table in (hpo_failures, hpo_workers):
            connection.execute(sa.schema.DropTable(table))


def content(place: Storage, *names: str) -> dict[str, list[dict[str, object]]]:
    """Return every row of these tables, as they are in the database."""
    with place.engine.connect() as connection:
        return {
            name: [dict(row) for row in connection.execute(sa.text(f"SELECT * FROM {name}")).mappings()]
            for name in names
        }


@pytest.mark.parametrize("value", [0.0, -1.5, 1e300, math.inf, -math.inf, math.nan])
def test_any_float_comes_back_from_the_form_that_it_is_stored_in(value: float) -> None:
    assert repr(tables.restored(*tables.stored(value))) == repr(value)
    assert tables.stored(value)[0] is None or math.isfinite(value)


def test_a_new_database_lacks_nothing(place: Storage) -> None:
    assert tables.missing(place.engine) == []


def test_settled_trials_are_left_out_of_the_index_of_open_ones(place: Storage) -> None:
    """Else a look for expired leases reads all trials of a study. The condition is given for the dialect in use."""
    (index,) = [
        one for one in sa.inspect(place.engine).get_indexes("hpo_trials") if one["name"] == "ix_hpo_trials_open"
    ]
    condition = str(index["dialect_options"][f"{place.engine.dialect.name}_where"]).lower()
    assert condition.strip("()") in ("settled is 0", "settled is false")


def test_making_the_tables_again_changes_nothing(make_study: MakeStudy, place: Storage) -> None:
    make_study()
    before = content(place, "hpo_studies")
    tables.create(place.engine)
    assert content(place, "hpo_studies") == before


def test_a_database_of_plain_optuna_is_not_an_old_one(url: str) -> None:
    plain = optuna.storages.RDBStorage(url)
    optuna.create_study(storage=plain, study_name="plain")
    plain.engine.dispose()
    place = connect(url)
    assert studies.names(place) == []
    place.close()


def test_what_an_old_database_lacks_is_added_by_any_command(make_study: MakeStudy, place: Storage, url: str) -> None:
    as_an_earlier_version(make_study())
    assert {column.name for column in tables.missing(place.engine)} == {column.name for column in NEW}
    again = connect(url)
    assert tables.missing(again.engine) == []
    assert content(again, "hpo_failures", "hpo_workers") == {"hpo_failures": [], "hpo_workers": []}
    again.close()


@pytest.mark.parametrize("column", [hpo_studies.c.hold, hpo_trials.c.costs], ids=str)
def test_what_cannot_be_added_is_told_by_name(
    column: sa.Column[object], make_study: MakeStudy, place: Storage, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: sa.Engine) -> None:
        raise sa.exc.DatabaseError("ALTER TABLE", {}, Exception("must be owner of table"))

    make_study()
    drop(place, column)
    monkeypatch.setattr(tables, "create", refused)
    with pytest.raises(StorageError) as caught:
        connect(url)
    told = (
        f"was made by an earlier hpo; it lacks {column.table.name}.{column.name}, which cannot be added: must be owner"
    )
    assert told in str(caught.value)


def test_an_old_database_is_mended_with_every_row_kept(make_study: MakeStudy, place: Storage, url: str) -> None:
    study = make_study(trials=3)
    parked, done, running = (begin(study, worker) for worker in ("one", "other", "third"))
    finish_claim(done[0], done[1], TrialState.COMPLETE, 1.0, outcome="complete")
    running[2].report(0.5, 1)
    checkpoint = Checkpoint(epoch=1, path="/c.pt", digest="abc")
    parked[0].record_checkpoint(parked[1], checkpoint)
    parked[0].park(parked[1])
    as_an_earlier_version(study)
    names = ["hpo_studies", "hpo_trials", "hpo_curves", "trials", "studies", "trial_intermediate_values"]
    before = content(place, *names)
    mended = connect(url, create=True)
    assert tables.missing(mended.engine) == []
    after = content(mended, *names)
    added = {column.name for column in NEW}
    kept = {name: [{k: v for k, v in row.items() if k not in added} for row in rows] for name, rows in after.items()}
    assert kept == before
    with mended.engine.connect() as connection:
        (of_study,) = connection.execute(sa.select(hpo_studies)).all()
        of_trials = connection.execute(sa.select(hpo_trials)).all()
    assert (of_study.hold, of_study.streak_kind, of_study.streak) == (None, None, 0)
    assert {(row.stop_requested, row.accumulation) for row in of_trials} == {(False, 1)}
    ledger, claim, trial = begin(studies.join(mended, study.name), "after")
    assert (claim.number, claim.attempt, claim.checkpoint, claim.accumulation) == (0, 2, checkpoint, 1)
    trial.report(0.25, 2)
    finish_claim(ledger, claim, TrialState.COMPLETE, 0.25, outcome="complete")
    mended.close()
    connect(url).close()


def test_two_processes_may_mend_an_old_database_at_one_instant(make_study: MakeStudy, place: Storage, url: str) -> None:
    as_an_earlier_version(make_study())
    ready, mended = threading.Barrier(3), []

    def mend() -> None:
        ready.wait()
        opened = connect(url, create=True)
        mended.append(tables.missing(opened.engine))
        opened.close()

    threads = [threading.Thread(target=mend) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mended == [[], [], []]


def test_optuna_opens_a_mended_database_as_before(make_study: MakeStudy, url: str) -> None:
    study = make_study(trials=3)
    begin(study)
    as_an_earlier_version(study)
    connect(url, create=True).close()
    plain = optuna.storages.RDBStorage(url)
    assert len(optuna.load_study(study_name=study.name, storage=plain).trials) == 1
    plain.engine.dispose()
