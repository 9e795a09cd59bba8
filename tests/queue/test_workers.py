"""Every process that works on a study has a row, stamped while it lives."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.queue import lease_clock, workers
from hpo.queue.ledger import Ledger
from hpo.receipt import versions
from hpo.storage import sql
from hpo.storage.tables import hpo_workers
from hpo.study.study import Study
from tests.support.trials import MakeStudy

pytestmark = pytest.mark.both


def rows(study: Study) -> list[Any]:
    with study.storage.engine.connect() as connection:
        return list(
            connection.execute(
                sa.select(hpo_workers).where(hpo_workers.c.study_uid == study.uid).order_by(hpo_workers.c.worker)
            )
        )


def now(study: Study) -> float:
    """Return the time by the clock of leases."""
    with study.storage.engine.connect() as connection:
        return float(connection.execute(sa.select(lease_clock.now(connection.dialect.name))).scalar_one())


def tick() -> None:
    """Let SQLite's clock go on, which counts milliseconds."""
    time.sleep(0.01)


def stamp(ledger: Ledger) -> None:
    with sql.writing(ledger.engine) as connection:
        workers.stamp(connection, ledger)


def test_a_process_that_enters_says_who_and_where_it_is_and_what_it_runs(make_study: MakeStudy) -> None:
    study = make_study()
    before = now(study)
    workers.register(study.ledger("w"))
    (row,) = rows(study)
    assert (row.worker, row.study_id) == ("w", study.study_id)
    assert (row.host, row.pid) == (platform.node(), os.getpid())
    assert before <= row.started_at == row.seen_at <= now(study)
    assert row.left_at is None
    assert row.clock == lease_clock.name(study.storage.engine.dialect.name)
    assert json.loads(row.versions) == {**versions(), "schema": "2"}
    assert {"python", "torch", "optuna", "hpo"} <= json.loads(row.versions).keys()


def test_a_clock_that_is_right_is_not_ahead(make_study: MakeStudy) -> None:
    study = make_study()
    workers.register(study.ledger("w"))  # the database is on this machine
    assert abs(rows(study)[0].clock_skew) < 0.5


@pytest.mark.parametrize("ahead", [100.0, -3600.0])
def test_a_clock_that_is_wrong_is_told_by_how_much(
    ahead: float, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    right = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: right() + ahead)
        workers.register(study.ledger("w"))
    (row,) = rows(study)
    assert row.clock_skew == pytest.approx(ahead, abs=0.5)
    assert row.started_at == pytest.approx(now(study), abs=60)  # by a clock that is not its own


def test_a_wait_for_the_lock_is_no_skew(make_study: MakeStudy) -> None:
    study = make_study()
    with sql.writing(study.storage.engine) as connection:
        connection.execute(hpo_workers.update().values(pid=1))
        entering = threading.Thread(target=workers.register, args=[study.ledger("w")])
        entering.start()
        time.sleep(1.0)
    entering.join()
    assert abs(rows(study)[0].clock_skew) < 0.5


def test_a_stamp_tells_the_time_of_its_own_row_alone(make_study: MakeStudy) -> None:
    study = make_study()
    for worker in ("one", "other"):
        workers.register(study.ledger(worker))
    one, other = rows(study)
    tick()
    stamp(study.ledger("one"))
    stamped, untouched = rows(study)
    assert one.seen_at < stamped.seen_at <= now(study)
    assert stamped.started_at == one.started_at
    assert untouched == other


def test_a_stamp_of_a_process_that_never_entered_writes_nothing(make_study: MakeStudy) -> None:
    study = make_study()
    stamp(study.ledger("w"))
    assert rows(study) == []


def test_a_process_that_leaves_was_seen_for_the_last_time(make_study: MakeStudy) -> None:
    study = make_study()
    for worker in ("one", "other"):
        workers.register(study.ledger(worker))
    tick()
    workers.unregister(study.ledger("one"))
    left, stays = rows(study)
    assert left.started_at < left.seen_at
    assert left.left_at == pytest.approx(left.seen_at, abs=0.5)
    assert stays.left_at is None


def test_a_process_that_was_recycled_enters_again_under_its_name(make_study: MakeStudy) -> None:
    study = make_study()
    ledger = study.ledger("w")
    workers.register(ledger)
    workers.unregister(ledger)
    (before,) = rows(study)
    tick()
    workers.register(ledger)
    (after,) = rows(study)
    assert after.left_at is None
    assert before.started_at == after.started_at < before.left_at < after.seen_at  # the time before counts, too


def test_one_name_may_work_on_two_studies(make_study: MakeStudy) -> None:
    one, other = make_study(name="one"), make_study(name="other")
    for study in (one, other):
        workers.register(study.ledger("w"))
    workers.unregister(one.ledger("w"))
    assert [row.left_at is None for row in (*rows(one), *rows(other))] == [False, True]


def test_no_two_names_are_alike_and_each_says_where_it_is() -> None:
    names = {workers.new_name() for _ in range(100)}
    assert len(names) == 100
    assert {name.rpartition(":")[0] for name in names} == {f"{platform.node()}:{os.getpid()}"}
