"""How many SQL statements a trial costs: exact, whatever the machine. Optuna's RDBStorage spends 243 on the first one here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import claiming, worker
from hpo.claim import Claim
from hpo.lease import Lease
from hpo.outage import Patience
from hpo.reports import Report
from hpo.storage import Storage
from hpo.study import Study, as_in_optimize
from hpo.trial import LeasedTrial
from tests.trials import make

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
    with trial.suggesting():
        suggest(trial)
    return trained(trial)


def trained(trial: LeasedTrial) -> float:
    for epoch in range(1, EPOCHS + 1):
        trial.report(1.0, epoch)
        assert not trial.should_prune()
    return 1.0


def run_one(study: Study, objective: Callable[[LeasedTrial], float]) -> None:
    patience = Patience(60.0)
    ledger = study.ledger("w")
    claim = worker.next_claim(ledger, patience)
    assert isinstance(claim, Claim)
    worker.run_trial(study, objective, Lease(ledger, claim, patience=patience))


@pytest.mark.parametrize(("objective", "wanted"), [(objective, 37), (declared, 33)])
def test_a_trial_of_20_epochs_with_5_parameters_and_the_median_pruner(
    place: Storage, tmp_path: Path, objective: Callable[[LeasedTrial], float], wanted: int
) -> None:
    study = worker.bearing(make(place, tmp_path, sampler={"name": "random"}, budget={"trials": 20}), Patience(60.0))
    for _ in range(8):  # past the pruner's start
        run_one(study, objective)
    with statements(place) as seen:
        run_one(study, objective)
    assert len(seen) == wanted <= FLOOR


def test_trials_that_report_together(place: Storage, tmp_path: Path) -> None:
    study = worker.bearing(make(place, tmp_path, sampler={"name": "random"}, budget={"trials": 100}), Patience(60.0))
    for _ in range(8):
        run_one(study, declared)
    ledger = study.ledger("w")
    with statements(place) as seen, as_in_optimize(study.optuna):
        trials = []
        for _ in range(16):
            claim = claiming.claim(ledger)
            assert isinstance(claim, Claim)
            trial = worker.open_trial(study, Lease(ledger, claim))
            with trial.suggesting():
                suggest(trial)
            trials.append(trial)
        for epoch in range(1, EPOCHS + 1):
            reports = [
                Report(claim=trial.lease.claim, step=epoch, value=1.0, metrics={"value": 1.0}) for trial in trials
            ]
            answer = ledger.report(reports, renew=False, since=study.storage.optuna.low(study.study_id))
            study.storage.optuna.hear(study.study_id, answer.finished)
            for trial in trials:
                assert not trial.pruner_says_stop()
        for trial in trials:
            ledger.finish(trial.lease.claim, TrialState.COMPLETE, 1.0, outcome="complete")
    assert len(seen) == 184 <= 16 * AIM
