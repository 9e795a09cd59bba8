"""A study on a Postgres behind a real pgbouncer in transaction mode: nothing is lost, and frozen processes hold nobody up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StorageBusy
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.queue.report import Report
from hpo.storage import engine, sql
from hpo.storage.connect import Storage, check_connections, connect
from hpo.storage.tables import hpo_trials
from hpo.study import doctor
from hpo.study.study import Study
from tests.engines.pooler import Pooler, pooler
from tests.support.postgres import ROLE, PostgresServer
from tests.support.trials import claim_one, finish_claim, make
from tests.support.waiting import ended, heard

pytestmark = pytest.mark.engines

WORKERS, TRIALS, EPOCHS = 6, 48, 8  # more than the five executions after which psycopg prepares a statement


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="hpo-pg-", dir="/tmp"))
    folder.chmod(0o755)
    with PostgresServer(folder, max_connections=20) as running:
        yield running


@pytest.fixture(scope="module")
def front(server: PostgresServer) -> Iterator[Pooler]:
    """A pgbouncer with fewer server connections than there are workers."""
    with pooler(server, server_connections=3, clients=40) as running:
        yield running


@pytest.fixture
def place(front: Pooler) -> Iterator[Storage]:
    opened = connect(front.url, create=True)
    yield opened
    opened.close()


def run_worker(url: str, study: Study, name: str) -> list[int]:
    """Train trials over connections of its own, as a worker process does, until nothing is left. Return their numbers."""
    own = connect(url)
    ledger = Ledger(engine=own.engine, study_id=study.study_id, uid=study.uid, worker=name)
    done = []
    while isinstance(claim := claim_one(ledger), Claim):
        for epoch in range(1, EPOCHS + 1):
            report = Report(claim=claim, step=epoch, value=0.5, metrics={"loss": 1.0})
            assert ledger.report([report]).lost == []
            assert ledger.renew_all([claim]) == set()
            assert not ledger.commands_of([claim])[claim].lost
        finish_claim(ledger, claim, TrialState.COMPLETE, 0.5, outcome="complete")
        done.append(claim.number)
    own.close()
    return done


@pytest.mark.parametrize("limits", ["of each transaction", "of the role"])
def test_no_trial_is_lost_behind_a_pooler(limits: str, server: PostgresServer, tmp_path: Path) -> None:
    """Each trial runs once and completes, whichever server connection a transaction gets."""
    if limits == "of the role":
        for name, value in engine.LIMITS.items():
            administer(server, f"ALTER ROLE {ROLE} SET {name} = {value}")
    try:
        with pooler(server, server_connections=3) as front:
            place = connect(front.url, create=True)
            study = make(place, tmp_path, name=f"study {limits}", budget={"trials": TRIALS})
            with place.engine.connect() as connection:
                assert connection.info[engine.IS_POOLED]
                assert connection.info[engine.LACKS_LIMITS] == (limits == "of each transaction")
            with ThreadPoolExecutor(WORKERS) as pool:
                done = list(pool.map(lambda name: run_worker(front.url, study, name), map(str, range(WORKERS))))
            trials = study.optuna.get_trials()
            assert Counter(trial.state.name for trial in trials) == {"COMPLETE": TRIALS}
            assert sorted(number for numbers in done for number in numbers) == list(range(TRIALS))
            assert {len(trial.intermediate_values) for trial in trials} == {EPOCHS}
            with sql.reading(place.engine) as connection:
                attempts = sa.select(hpo_trials.c.attempt).where(hpo_trials.c.study_uid == study.uid)
                assert Counter(connection.execute(attempts).scalars()) == {1: TRIALS}
                assert connection.execute(sa.text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0
            place.close()
    finally:
        administer(server, f"ALTER ROLE {ROLE} RESET ALL")


def administer(server: PostgresServer, statement: str) -> None:
    with psycopg.connect(f"postgresql://postgres@127.0.0.1:{server.port}/postgres", autocommit=True) as connection:
        connection.execute(statement.encode())


def test_time_limits_hold_in_each_transaction_and_are_left_to_nobody(place: Storage, front: Pooler) -> None:
    """What we set is gone when another program gets the same server connection."""
    shown = sa.text("SELECT current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout')")
    for transaction in (sql.writing, sql.writing_once):
        with transaction(place.engine) as connection:
            assert connection.execute(shown).one() == ("10s", "30s")
    with psycopg.connect(front.url.replace("+psycopg", "")) as other:
        assert other.execute(shown.text.encode()).fetchone() == ("0", "0")


FROZEN = """
import sys, time
from hpo.storage import engine, sql, study_rows
from hpo.storage.connect import connect
engine.LIMITS["idle_in_transaction_session_timeout"] = 1000
place = connect(sys.argv[1])
with sql.writing(place.engine) as connection:
    study_rows.lock(connection, int(sys.argv[2]))
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_process_frozen_in_a_claim_holds_nobody_up(place: Storage, front: Pooler, tmp_path: Path) -> None:
    """Postgres ends the transaction of a process that has stopped under the study's lock, behind a pooler, too."""
    study = make(place, tmp_path, name="frozen")
    command = [sys.executable, "-c", FROZEN, front.url, str(study.study_id)]
    frozen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert heard(frozen) == "locked"
        os.kill(frozen.pid, signal.SIGSTOP)
        assert isinstance(claim_one(study.ledger("w")), Claim)
    finally:
        frozen.kill()
        ended(frozen)


def test_connections_of_a_pooler_are_told_and_not_refused(
    place: Storage, front: Pooler, server: PostgresServer
) -> None:
    """Far more workers than Postgres has connections are accepted, and `hpo doctor` says what to compare."""
    check_connections(place, 200)
    (found,) = doctor.examine_storage(place, 200)
    assert not found.is_ill
    assert "200 workers and this process are up to 402 clients of it; Postgres has " in found.what
    assert "max_connections 23, 3 reserved" in found.what
    assert "max_client_conn of pgbouncer is 402 or more" in found.mend
    direct = connect(server.url)
    assert len(list(doctor.examine_storage(direct, 200))) == 1
    direct.close()


def test_a_pooler_that_takes_no_more_clients_is_busy(server: PostgresServer) -> None:
    with pooler(server, clients=1) as front:
        address = front.url.replace("+psycopg", "")
        with psycopg.connect(address), pytest.raises(StorageBusy, match=r"no more connections allowed"):
            connect(front.url, create=True)
