"""The thread that keeps a lease while an epoch lasts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from hpo import lease
from hpo.ledger import Claim, Ledger
from hpo.study import Study
from hpo.tables import hpo_trials

MakeStudy = Callable[..., Study]


@pytest.fixture(autouse=True)
def fast_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TICK_SECONDS", 0.02)


def never() -> None:
    pytest.fail("nobody's parent died")


def until(study: Study) -> float | None:
    with study.storage.engine.connect() as connection:
        return connection.execute(sa.select(hpo_trials.c.lease_until)).scalar_one()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def test_a_silent_trial_keeps_its_lease_while_it_is_held_and_no_longer(make_study: MakeStudy) -> None:
    study = make_study()
    ledger = study.ledger("w", lease_seconds=0.3)
    claim = ledger.claim()
    assert isinstance(claim, Claim)
    first = until(study)
    with lease.Keeper(ledger, parent=None, orphaned=never) as keeper:
        keeper.hold(claim)
        wait_for(lambda: (until(study) or 0) > (first or 0) + 0.6)  # renewed past its first end
        keeper.hold(None)
    again = study.ledger("other")
    wait_for(lambda: isinstance(taken := again.claim(), Claim) and taken.number == 0)


def test_an_error_of_the_storage_does_not_end_the_renewing(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = make_study()
    ledger = study.ledger("w", lease_seconds=0.3)
    claim = ledger.claim()
    assert isinstance(claim, Claim)
    renew, failures = Ledger.renew, iter(range(100))

    def failing_at_first(self: Ledger, claim: Claim) -> bool:
        if next(failures) < 2:
            raise sa.exc.OperationalError("UPDATE", {}, Exception("database is locked"))
        return renew(self, claim)

    monkeypatch.setattr(Ledger, "renew", failing_at_first)
    first = until(study)
    with lease.Keeper(ledger, parent=None, orphaned=never) as keeper:
        keeper.hold(claim)
        wait_for(lambda: (until(study) or 0) > (first or 0))
    assert "could not be renewed" in caplog.text


def test_a_dead_parent_is_noticed_once(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    noticed: list[bool] = []
    parent = os.getppid()
    with lease.Keeper(make_study().ledger("w"), parent=parent, orphaned=lambda: noticed.append(True)):
        assert noticed == []
        monkeypatch.setattr(os, "getppid", lambda: 1)
        wait_for(lambda: bool(noticed))
    assert noticed == [True]


def test_a_parent_that_died_before_the_keeper_began_is_noticed_at_once(make_study: MakeStudy) -> None:
    noticed: list[bool] = []
    with lease.Keeper(make_study().ledger("w"), parent=-1, orphaned=lambda: noticed.append(True)):
        assert noticed == [True]
