"""The thread that keeps a lease while an epoch lasts, reaps the dead, and brings orders."""

from __future__ import annotations

import os
from collections.abc import Collection

import pytest
import sqlalchemy as sa

from hpo.errors import Parked, Stopped
from hpo.queue import reaper, workers
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim, Commands
from hpo.storage import sql
from hpo.storage.tables import hpo_trials, hpo_workers
from hpo.study import control
from hpo.study.study import Study
from hpo.worker import heartbeat
from hpo.worker.heartbeat import Heartbeat
from hpo.worker.signals import StopSignal
from tests.support.trials import MakeStudy, claim_one, client_of, held, said, taken
from tests.support.waiting import wait_for

pytestmark = pytest.mark.usefixtures("fast_ticks")


def never() -> None:
    pytest.fail("nobody's parent died")


def until(study: Study) -> float | None:
    with study.storage.engine.connect() as connection:
        return connection.execute(sa.select(hpo_trials.c.lease_until)).scalar_one()


def reaped(study: Study) -> int:
    with sql.writing(study.storage.engine) as connection:
        return reaper.reap(connection, study.ledger("other"))


def worked_for_hours(ledger: Ledger) -> None:
    workers.register(ledger)
    with sql.writing(ledger.engine) as connection:
        connection.execute(hpo_workers.update().values(started_at=hpo_workers.c.started_at - 7200))


@pytest.mark.both
def test_a_silent_trial_keeps_its_lease_while_it_is_held_and_no_longer(make_study: MakeStudy) -> None:
    study = make_study()
    ledger = study.ledger("w", lease_seconds=2.0)
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    first = until(study)
    client, lease = held(ledger, claim)
    with Heartbeat(client, leave=never):
        wait_for(lambda: (until(study) or 0) > (first or 0) + 2.0)  # renewed past its first end
        client.held.remove(lease)
    wait_for(lambda: reaped(study) == 1)


def test_an_error_of_the_storage_does_not_end_the_renewing(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = make_study()
    ledger = study.ledger("w", lease_seconds=3.0)
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    renew, failures = Ledger.renew_all, iter(range(100))

    def failing_at_first(self: Ledger, claims: Collection[Claim]) -> set[Claim]:
        if next(failures) < 2:
            raise sa.exc.OperationalError("UPDATE", {}, Exception("database is locked"))
        return renew(self, claims)

    monkeypatch.setattr(Ledger, "renew_all", failing_at_first)
    first = until(study)
    with Heartbeat(held(ledger, claim)[0], leave=never):
        wait_for(lambda: (until(study) or 0) > (first or 0))
    assert "renew failed, trying again: " in caplog.text
    assert caplog.text.count("renew failed") == 1  # told once, not at every tick


def test_a_renewal_that_failed_is_tried_again_at_the_next_tick_only(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    ledger = study.ledger("w", lease_seconds=3.0)
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    duties: list[str] = []

    def failing(self: Ledger, claims: Collection[Claim]) -> set[Claim]:
        duties.append("renew")
        raise sa.exc.OperationalError("UPDATE", {}, Exception("database is locked"))

    def commands_of(self: Ledger, claims: Collection[Claim]) -> dict[Claim, Commands]:
        duties.append("commands")
        return {}

    monkeypatch.setattr(Ledger, "renew_all", failing)
    monkeypatch.setattr(Ledger, "commands_of", commands_of)
    with Heartbeat(held(ledger, claim)[0], leave=never):
        wait_for(lambda: duties.count("renew") >= 3)
    began = duties.index("renew")
    assert duties[began : began + 4] == ["renew", "commands"] * 2


def test_a_dead_parent_is_noticed_once(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed: list[bool] = []
    parent = os.getppid()
    with Heartbeat(client_of(make_study().ledger("w")), parent=parent, leave=lambda: noticed.append(True)):
        assert noticed == []
        monkeypatch.setattr(os, "getppid", lambda: 1)
        wait_for(lambda: bool(noticed))
    assert noticed == [True]


def test_a_parent_that_died_before_the_heartbeat_began_is_noticed_at_once(make_study: MakeStudy) -> None:
    noticed: list[bool] = []
    with Heartbeat(client_of(make_study().ledger("w")), parent=-1, leave=lambda: noticed.append(True)):
        assert noticed == [True]


def test_a_heartbeat_parks_what_another_worker_lost(
    make_study: MakeStudy,
) -> None:
    """A trial that another worker has lost is parked without anybody asking for a trial."""
    study = make_study(trials=1)
    dead = taken(study.ledger("dead", lease_seconds=0.1))
    with Heartbeat(client_of(study.ledger("living", lease_seconds=0.3))):
        wait_for(lambda: until(study) is None)
    again = taken(study.ledger("next"))
    assert (again.trial_id, again.attempt) == (dead.trial_id, 2)


@pytest.mark.both
def test_a_heartbeat_takes_what_is_expired_before_its_first_tick(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 60.0)
    study = make_study(trials=1)
    taken(study.ledger("dead", lease_seconds=-1.0))
    worked_for_hours(study.ledger("another"))
    with Heartbeat(client_of(study.ledger("living"))):
        assert until(study) is None


def test_a_heartbeat_takes_nothing_after_an_outage_yet(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that comes as the storage may have come back takes nothing yet."""
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 60.0)
    study = make_study(trials=1)
    taken(study.ledger("away", lease_seconds=-1.0))
    workers.register(study.ledger("as new"))  # says nothing of the time before
    with Heartbeat(client_of(study.ledger("living"))):
        assert until(study) is not None


def test_orders_of_people_reach_the_trial_at_hand(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    ledger = study.ledger("w")
    client, lease = held(ledger, taken(ledger))
    with Heartbeat(client):
        control.pause(study)
        wait_for(lambda: client.must_end(lease))
        with pytest.raises(Parked):
            client.let_go(lease)
        control.resume(study)
        wait_for(lambda: not client.must_end(lease))
        assert not control.stop_trial(study, 0)
        wait_for(lambda: client.must_end(lease))
        with pytest.raises(Stopped):
            client.let_go(lease)


def test_reports_of_an_outage_are_sent_in_order(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was reported while the storage was away is sent in order once it is back."""
    study = make_study()
    ledger = study.ledger("w")
    client, lease = held(ledger, taken(ledger))

    def refused(*arguments: object, **settings: object) -> list[Claim]:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))

    with Heartbeat(client):
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "report", refused)
            patched.setattr(Ledger, "renew_all", refused)
            for step in (1, 2, 3):
                client.report([said(lease, step)])
            assert client.calls.is_cut_off
        wait_for(lambda: not client.calls.is_cut_off)
    assert study.optuna.trials[0].intermediate_values == {1: 1.0, 2: 2.0, 3: 3.0}
    client.flush()  # the raw metrics wait for more of them
    assert ledger.curve(lease.claim, "value") == [1.0, 2.0, 3.0]


def test_an_orphan_s_heartbeat_asks_as_a_first_signal_does(make_study: MakeStudy) -> None:
    stopping = StopSignal()
    with Heartbeat(client_of(make_study().ledger("w")), parent=-1, leave=stopping.request):
        assert stopping.exit_code == 143
