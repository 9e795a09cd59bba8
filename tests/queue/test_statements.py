"""How many SQL statements a trial costs: exact, whatever the machine. Optuna's RDBStorage spends 243 on the first one here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.queue import claiming
from hpo.queue.finish import End
from hpo.queue.models import Claim
from hpo.queue.report import Report
from hpo.storage import clock
from hpo.storage.connect import Storage
from hpo.storage.optuna_private import as_in_optimize
from hpo.storage.retry import Retry
from hpo.study.study import Study
from hpo.worker import loop as worker_loop
from hpo.worker import runner
from hpo.worker.attempt import Attempt, ending, open_trial
from hpo.worker.client import QueueClient
from hpo.worker.heartbeat import Heartbeat
from hpo.worker.lease import Lease
from hpo.worker.trial import LeasedTrial
from tests.support.trials import claim_one, client_of, finish_claim, held, make, suggested

pytestmark = pytest.mark.both

EPOCHS = 20
FLOOR, AIM = 50, 12  # statements a trial: one by one, and 16 at once


@contextmanager
def statements(place: Storage) -> Iterator[list[str]]:
    """Collect the statements that the storage's engine is given."""
    seen: list[str] = []

    def note(_: object, __: object, text: str, *others: object) -> None:
        seen.append(text)

    sa.event.listen(place.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(place.engine, "before_cursor_execute", note)


def suggest(trial: LeasedTrial) -> None:
    for name in "abcde":
        trial.suggest_float(name, 0.0, 1.0)


def objective(trial: LeasedTrial) -> float:
    suggest(trial)
    return trained(trial)


def declared(trial: LeasedTrial) -> float:
    """Suggest as our own objective does."""
    suggested(trial, suggest)
    return trained(trial)


def trained(trial: LeasedTrial) -> float:
    for epoch in range(1, EPOCHS + 1):
        trial.report(1.0, epoch)
        assert not trial.should_prune()
    return 1.0


def run_one(study: Study, objective: Callable[[LeasedTrial], float]) -> None:
    retry = Retry(60.0)
    ledger = study.ledger("w")
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    runner.run_trial(Attempt(study, *held(ledger, claim, retry)), objective)


@pytest.mark.parametrize(("objective", "wanted"), [(objective, 37), (declared, 34)])
def test_a_trial_of_20_epochs_with_5_parameters_and_the_median_pruner(
    place: Storage, tmp_path: Path, objective: Callable[[LeasedTrial], float], wanted: int
) -> None:
    study = worker_loop.with_retry(
        make(place, tmp_path, sampler={"name": "random"}, budget={"trials": 20}), Retry(60.0)
    )
    for _ in range(8):  # past the pruner's start
        run_one(study, objective)
    with statements(place) as seen:
        run_one(study, objective)
    assert len(seen) == wanted <= FLOOR


def test_trials_that_report_together(place: Storage, tmp_path: Path) -> None:
    study = worker_loop.with_retry(
        make(place, tmp_path, sampler={"name": "random"}, budget={"trials": 100}), Retry(60.0)
    )
    for _ in range(8):
        run_one(study, declared)
    ledger = study.ledger("w")
    with statements(place) as seen, as_in_optimize(study.optuna):
        claims = claiming.claim_many(ledger, 16)
        assert not isinstance(claims, claiming.Idle)
        trials = [open_trial(study, *held(ledger, claim)) for claim in claims]
        assert ledger.write_suggested([trial.suggested(suggest)[1] for trial in trials]) == set()
        for epoch in range(1, EPOCHS + 1):
            reports = [
                Report(claim=trial.lease.claim, step=epoch, value=1.0, metrics={"value": 1.0}) for trial in trials
            ]
            answer = ledger.report(reports, renew=False)
            study.storage.optuna.set_known_finished(study.study_id, answer.finished)
            for trial in trials:
                assert not trial.pruner_says_stop()
        assert ledger.finish_all([ending(trial, TrialState.COMPLETE, 1.0) for trial in trials]) == set()
    assert len(seen) == 50 <= 16 * AIM


def stack_of(study: Study, count: int) -> tuple[QueueClient, list[Lease]]:
    """Return a worker's client and the leases of so many new trials, claimed at once."""
    client = client_of(study.ledger("w"), Retry(60.0))
    claims = claiming.claim_many(client.ledger, count)
    assert not isinstance(claims, claiming.Idle)
    assert len(claims) == count
    return client, [client.hold(claim) for claim in claims]


@pytest.mark.parametrize("count", [1, 16, 64])
def test_keeping_many_leases_takes_the_statements_of_keeping_one(
    place: Storage, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = stack_of(make(place, tmp_path, budget={"trials": 100}), count)
    keeping = Heartbeat(client)
    with statements(place) as of_a_tick:
        keeping._keep()
    assert len(of_a_tick) == 1  # what others want
    later = clock.awake_or_asleep() + client.ledger.lease_seconds / 2
    monkeypatch.setattr(clock, "awake_or_asleep", lambda: later)
    with statements(place) as of_a_third_of_a_lease:
        keeping._keep()
        keeping._keep()
    assert len(of_a_third_of_a_lease) == 2 + 1


@pytest.mark.parametrize("count", [1, 16, 64])
def test_an_epoch_of_many_trials_takes_one_statement_and_so_on(place: Storage, tmp_path: Path, count: int) -> None:
    study = make(place, tmp_path, budget={"trials": 100})
    with statements(place) as of_claims:
        client, leases = stack_of(study, count)
    assert len(of_claims) == 4  # the lock, how the study stands, the trials, their leases
    with statements(place) as of_an_epoch:
        client.report([Report(claim=lease.claim, step=1, value=1.0, metrics={"a": 1.0, "b": 2.0}) for lease in leases])
    assert len(of_an_epoch) == 1
    with statements(place) as of_metrics:
        for lease in leases:
            client.flush(lease)
    assert len(of_metrics) == 2  # the leases, the metrics
    ends = [End(claim=lease.claim, state=TrialState.COMPLETE, value=1.0, outcome="complete") for lease in leases]
    with statements(place) as of_ends:
        assert client.ledger.finish_all(ends) == set()
    assert len(of_ends) == 4  # our rows, Optuna's, the values, the streak of failures


def test_parked_trials_are_taken_up_in_few_statements(place: Storage, tmp_path: Path) -> None:
    """Parked trials are taken up in as many statements however many they are."""
    study = make(place, tmp_path, budget={"trials": 100})
    for count in (1, 16):
        client, leases = stack_of(study, count)
        for lease in leases:
            client.ledger.park(lease.claim, stack_key="a")
        with statements(place) as seen:
            assert len(list(claiming.claim_many(client.ledger, count, stack_key="a"))) == count
        assert len(seen) == 7  # the lock, how the study stands, the trials, their leases, and three cut them back
        for lease in leases:
            finish_claim(client.ledger, replace(lease.claim, attempt=2), TrialState.COMPLETE, 1.0, outcome="complete")
