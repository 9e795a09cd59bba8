"""What a worker's threads do beside one another: no wait for a lock costs a lease, and no late answer leaves an unknown one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import MismatchError, Outage
from hpo.queue import claiming, reaper
from hpo.queue.claiming import Idle
from hpo.queue.finish import End
from hpo.queue.models import Checkpoint, Claim
from hpo.spec.failures import Failure, Kind
from hpo.storage import clock, engine, sql
from hpo.storage.connect import FAILURES, connect
from hpo.storage.retry import Retry, within
from hpo.storage.tables import hpo_failures, hpo_trials, metadata
from hpo.study.study import Study, join
from hpo.worker import client as clients
from hpo.worker import loop as worker_loop
from hpo.worker import restart, storage_calls
from hpo.worker.client import ClaimRequest, QueueClient
from hpo.worker.heartbeat import Heartbeat
from hpo.worker.lease import Lease
from hpo.worker.lease_upkeep import LeaseUpkeep
from hpo.worker.signals import StopSignal
from tests.support.trials import AN_OUTAGE, MakeStudy, client_of, held, make, said, taken
from tests.support.waiting import PATIENCE, wait_for

LOCK_SECONDS = 1.2  # lock_timeout, and how long another client holds a lock
LEASE_SECONDS = 3.0
ROUNDS = 3  # of locks, one after the other: longer than a lease in all


def leased(study: Study) -> list[tuple[int, bool]]:
    """Return of each of our rows the attempt, and whether somebody has it."""
    with study.storage.engine.connect() as connection:
        rows = connection.execute(sa.select(hpo_trials).order_by(hpo_trials.c.trial_id))
        return [(row.attempt, row.lease_until is not None) for row in rows]


def failures(study: Study) -> list[str]:
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_failures.c.kind)).scalars())


# --- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(other: sa.Engine, table: str) -> Iterator[None]:
    """Hold a table, or on SQLite the one lock there is, as another client."""
    with sql.writing(other) as connection:
        if other.dialect.name == "postgresql":
            connection.execute(sa.text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
        yield


@contextmanager
def beside(act: Callable[[], object]) -> Iterator[None]:
    """Do something over and over in a thread of its own; what a storage throws at it passes."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.02):
            with suppress(*FAILURES, Outage):
                act()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def train(client: QueueClient, kept: Sequence[Lease], steps: Iterator[int]) -> None:
    """Write all that a training thread writes: it waits for whatever is locked, and its threads that it gave up on do."""
    step = next(steps)
    client.report([said(lease, step) for lease in kept])
    client.record_checkpoint(kept[0], Checkpoint(epoch=step, path="/c.pt", digest="d"))
    client.flush()
    leases = client.claim(ClaimRequest(count=2), may_wait=False)
    if isinstance(leases, Idle):
        return
    failed, *others = leases
    client.fail(failed, Failure(kind=Kind.EXCEPTION, message="once"))
    ends = [End(claim=one.claim, state=TrialState.COMPLETE, value=1.0, outcome="complete") for one in others]
    assert client.finish(ends) == set()
    for lease in leases:
        client.held.remove(lease)


TABLES = sorted(metadata.tables.keys() - {"hpo_test_openings"})  # that one is only for `hpo train`


@pytest.mark.parametrize(
    ("storage_kind", "table"),
    [("sqlite", "all"), *(("postgres", table) for table in TABLES)],
    indirect=["storage_kind"],
)
@pytest.mark.usefixtures("fast_ticks")
def test_no_lock_of_another_client_costs_a_living_worker_its_leases(
    url: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine, sql):
        monkeypatch.setattr(module, "BUSY_SECONDS", LOCK_SECONDS)
    monkeypatch.setattr(storage_calls, "ANSWER_SECONDS", LOCK_SECONDS / 3)
    monkeypatch.setattr(clients, "METRICS_SECONDS", 0.0)
    with ExitStack() as stack:
        place, other, third = (stack.enter_context(connected(url)) for _ in range(3))
        study = make(place, tmp_path, budget={"trials": 1000})
        client = client_of(study.ledger("w", lease_seconds=LEASE_SECONDS), Retry(60.0))
        kept = client.claim(ClaimRequest(count=3))
        assert not isinstance(kept, Idle)
        elsewhere = join(other, study.name).ledger("reaper")

        def reap() -> None:
            with sql.writing(elsewhere.engine) as connection:
                reaper.reap(connection, elsewhere)

        steps = iter(range(1, 10_000))
        with Heartbeat(client), beside(lambda: train(client, kept, steps)), beside(reap):
            for _ in range(ROUNDS):
                with suppress(*FAILURES), locked(third.engine, table):
                    time.sleep(LOCK_SECONDS)
                time.sleep(0.05)
        assert next(steps) > 1  # it got through at least once
        assert [lease.is_lost for lease in kept] == [False] * 3
        assert client.ledger.renew_all([lease.claim for lease in kept]) == set()
        assert set(failures(study)) <= {Kind.EXCEPTION}


@contextmanager
def connected(url: str) -> Iterator[Any]:
    place = connect(url)
    try:
        yield place
    finally:
        place.close()


def test_leases_are_seen_to_between_two_duties_that_wait(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = make_study().ledger("w")
    client, _ = held(ledger, taken(ledger))
    done, later, now = [], [0.0], clock.awake_or_asleep()
    monkeypatch.setattr(clock, "awake_or_asleep", lambda: now + later[0])

    def wait(duty: str, seconds: float) -> Callable[[], None]:
        def act() -> None:
            done.append(duty)
            later[0] += seconds

        return act

    monkeypatch.setattr(client, "send_metrics", wait("send", client.ledger.lease_seconds / 2))
    monkeypatch.setattr(client.upkeep, "poll_commands", wait("poll", 1.0))
    monkeypatch.setattr(client.upkeep, "renew", lambda: (done.append("renew"), LeaseUpkeep.renew(client.upkeep)))
    Heartbeat(client)._keep()
    assert done == ["send", "renew", "poll"]


# --- late answers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let every claim hang until this is set; it is made then."""
    answer, under_way, real = threading.Event(), [0], claiming.claim_many

    def claim_many(*arguments: Any, **settings: Any) -> Any:
        under_way[0] += 1
        assert answer.wait(PATIENCE)
        try:
            return real(*arguments, **settings)
        finally:
            under_way[0] -= 1

    monkeypatch.setattr(claiming, "claim_many", claim_many)
    monkeypatch.setattr(storage_calls, "ANSWER_SECONDS", 0.2)
    yield answer
    answer.set()
    wait_for(lambda: under_way == [0])  # before the database goes


@pytest.mark.both
@pytest.mark.usefixtures("fast_ticks")
def test_a_claim_that_nobody_waited_for_is_given_back(make_study: MakeStudy, answer: threading.Event) -> None:
    study = make_study(trials=2)
    client = client_of(study.ledger("w"), Retry(60.0))
    assert client.claim(ClaimRequest(count=2), may_wait=False) is Idle.WAIT
    client.release_unheard()  # in vain: it is under way
    assert leased(study) == []
    with Heartbeat(client):
        answer.set()
        wait_for(lambda: leased(study) == [(1, False)] * 2)
    assert failures(study) == []
    leases = client.claim(ClaimRequest(count=2))
    assert [lease.claim.attempt for lease in leases if isinstance(leases, list)] == [2]
    assert not client.has_unheard_claims


@pytest.mark.both
def test_the_next_claim_waits_for_the_one_before_and_gives_that_back(
    make_study: MakeStudy, answer: threading.Event
) -> None:
    study = make_study(trials=2)
    client = client_of(study.ledger("w"), Retry(60.0))
    assert client.claim(ClaimRequest(count=1), may_wait=False) is Idle.WAIT
    threading.Timer(0.5, answer.set).start()
    leases = client.claim(ClaimRequest(count=1))
    assert not isinstance(leases, Idle)
    assert [(lease.claim.number, lease.claim.attempt) for lease in leases] == [(0, 2)]
    assert leased(study) == [(2, True)]


def test_a_claim_behind_another_is_not_begun_once_nobody_waits_for_it(
    make_study: MakeStudy, answer: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=5)
    client = client_of(study.ledger("w"), Retry(60.0))
    monkeypatch.setattr(storage_calls, "ANSWER_SECONDS", 30.0)  # for which the later ones wait for the first
    monkeypatch.setattr(storage_calls, "within", lambda _, action: within(0.1, action))
    for _ in range(3):
        client.calls._failing_since = None  # as if reports had got through meanwhile
        assert client.claim(ClaimRequest(count=1), may_wait=False) is Idle.WAIT
    answer.set()
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "storage"])
    assert leased(study) == [(1, True)]
    client.release_unheard()
    assert leased(study) == [(1, False)]


def test_what_was_just_claimed_is_not_given_back(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=3)
    client, hold = client_of(study.ledger("w")), QueueClient.hold

    def held_late(client: QueueClient, claim: Claim) -> Lease:
        client.release_unheard()  # as the heartbeat may at this very instant
        return hold(client, claim)

    monkeypatch.setattr(QueueClient, "hold", held_late)
    assert client.claim(ClaimRequest(count=3)) == client.held.leases
    assert leased(study) == [(1, True)] * 3


@pytest.mark.both
def test_a_claim_whose_answer_was_lost_is_made_once(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(trials=1)
    real, answers = claiming.claim_many, iter([False])

    def unheard(*arguments: Any, **settings: Any) -> Any:
        found = real(*arguments, **settings)
        if not next(answers, True):
            raise AN_OUTAGE
        return found

    monkeypatch.setattr(claiming, "claim_many", unheard)
    client = client_of(study.ledger("w"), Retry(60.0))
    leases = client.claim(ClaimRequest(count=1))
    assert not isinstance(leases, Idle)
    assert [lease.claim.attempt for lease in leases] == [2]
    assert (leased(study), failures(study)) == ([(2, True)], [])


@pytest.mark.parametrize(("error", "is_leased"), [(MismatchError("other code"), False), (MemoryError(), True)])
def test_a_worker_that_leaves_gives_back_what_it_had_not_begun(
    make_study: MakeStudy, error: Exception, is_leased: bool
) -> None:
    """Not after a crash: that is to count for its trials, or one that crashes every worker would be tried for ever."""
    study = make_study(trials=3)

    class Broken:
        """A training that ends its worker before it has begun with what was claimed."""

        is_busy = False

        def runner(self, *_: object) -> Any:
            return self

        def wants(self) -> ClaimRequest:
            return ClaimRequest(count=3)

        def take(self, _: Sequence[Lease]) -> None:
            raise error

        def leave(self, _: BaseException) -> None:
            pass

    with pytest.raises(type(error)):
        worker_loop.work(study, Broken(), study.ledger("w"), StopSignal())
    assert (leased(study), failures(study)) == ([(1, is_leased)] * 3, [])


def test_a_worker_that_started_afresh_knows_what_its_name_holds(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(trials=1)
    taken(study.ledger("w"))
    monkeypatch.setenv(restart.MARK, "1")
    assert worker_loop.work(study, lambda trial: 1.0, study.ledger("w"), StopSignal()) == 0
    assert [trial.value for trial in study.optuna.trials] == [1.0]
    assert (leased(study), failures(study)) == ([(2, False)], [])
