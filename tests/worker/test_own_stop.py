"""An objective that calls `study.stop()`."""

from __future__ import annotations

import threading

import optuna
import pytest
from optuna.trial import TrialState

from hpo.queue.models import Claim
from hpo.study import control
from hpo.study.study import join as join_study
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial
from tests.support.rows import states
from tests.support.trials import MakeStudy, claim_one, finish_claim
from tests.support.user_loops import one, trials, work
from tests.support.waiting import wait_for

pytestmark = pytest.mark.usefixtures("fast_ticks")


def test_a_resumed_study_is_not_stopped_again(make_study: MakeStudy) -> None:
    """A stop by an objective is not passed on again after a person resumed the study."""
    study = make_study(trials=4)
    other = study.ledger("other")
    held = claim_one(other)  # trial 0: while it is open, our worker waits instead of leaving
    assert isinstance(held, Claim)

    def resume_when_stopped() -> None:
        wait_for(lambda: join_study(study.storage, study.name).stop_reason is not None)
        wait_for(lambda: states(study)[1:] == ["COMPLETE"])
        control.resume(study)
        finish_claim(other, held, TrialState.COMPLETE, 1.0, outcome="complete")

    def objective(trial: LeasedTrial) -> float:
        if trial.number == 1:
            trial.study.stop()
        return 1.0

    person = threading.Thread(target=resume_when_stopped)
    person.start()
    assert work(study, objective) == 0
    person.join()
    assert states(study) == ["COMPLETE"] * 4
    assert join_study(study.storage, study.name).stop_reason is None


@pytest.mark.parametrize("end", ["complete", "pruned", "fail", "retry"])
def test_a_stop_by_an_objective_stands_however_its_trial_ends(end: str, make_study: MakeStudy) -> None:
    study = make_study(trials=4, failures={"exception": {"retries": 1 if end == "retry" else 0}})

    def objective(trial: LeasedTrial) -> float:
        if trial.lease.claim.attempt == 1:
            trial.study.stop()
            if end == "pruned":
                raise optuna.TrialPruned
            if end in ("fail", "retry"):
                raise ValueError(end)
        return 1.0

    assert work(study, objective) == 0
    assert len(trials(study)) == 1
    assert "study.stop()" in (join_study(study.storage, study.name).stop_reason or "")


def test_a_stop_by_an_objective_that_parks_stands(make_study: MakeStudy) -> None:
    study = make_study(trials=4)
    stopping = StopSignal()

    def objective(trial: LeasedTrial) -> float:
        trial.study.stop()
        stopping.request()
        trial.should_prune()
        return 1.0

    assert work(study, objective, stopping) == 143
    assert work(study, one) == 0
    assert states(study) == ["COMPLETE"]
