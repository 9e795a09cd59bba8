"""Trials that end before their objective starts, or while their sampler still works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from hpo.queue import reaper
from hpo.queue.models import Checkpoint, Claim
from hpo.queue.report import Report
from hpo.strategy import samplers
from hpo.study import control
from hpo.study.study import Study
from hpo.worker import attempt
from hpo.worker.client import QueueClient
from hpo.worker.lease import Lease
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial
from tests.support.rows import outcomes, recorded_failures, rows, states
from tests.support.trials import MakeStudy, claim_one, finish_claim
from tests.support.user_loops import one, trials, work
from tests.support.waiting import wait_for

pytestmark = pytest.mark.usefixtures("fast_ticks")


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[LeasedTrial], object]], None]:
    """Do something with a trial that was opened, before its objective starts."""
    open_trial = attempt.open_trial

    def let(act: Callable[[LeasedTrial], object]) -> None:
        def opened(study: Study, client: QueueClient, lease: Lease) -> LeasedTrial:
            trial = open_trial(study, client, lease)
            act(trial)
            return trial

        monkeypatch.setattr(attempt, "open_trial", opened)

    return let


def test_a_trial_ended_before_its_objective_starts(make_study: MakeStudy, opening: Callable[..., None]) -> None:
    """A trial that a person ended before its objective started ends and the worker goes on."""
    study = make_study(trials=3)
    begun: list[int] = []

    def stop_the_second(trial: LeasedTrial) -> None:
        if trial.number == 1:
            assert not control.stop_trial(study, 1)
            wait_for(lambda: trial.client.must_end(trial.lease))

    def objective(trial: LeasedTrial) -> float:
        begun.append(trial.number)
        return 1.0

    opening(stop_the_second)
    assert work(study, objective) == 0
    assert begun == [0, 2]
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert outcomes(study) == ["complete", "stopped", "complete"]
    assert recorded_failures(study) == []


def test_a_trial_ended_while_its_sampler_works(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that a person ends while its sampler works ends at its next look."""
    study = make_study(trials=2)

    class Slow(optuna.samplers.RandomSampler):
        def sample_independent(self, of: optuna.Study, trial: FrozenTrial, *others: Any) -> Any:
            if trial.number == 0:
                assert not control.stop_trial(study, 0)
            return super().sample_independent(of, trial, *others)

    def objective(trial: LeasedTrial) -> float:
        trial.report(0.5, 1)
        x = trial.suggest_float("x", 0, 1)
        wait_for(lambda: trial.number > 0 or trial.client.must_end(trial.lease))
        trial.should_prune()
        return x

    monkeypatch.setitem(samplers.SAMPLERS, "random", lambda draw: Slow(seed=draw.trial_seed))
    assert work(study, objective) == 0
    assert states(study) == ["PRUNED", "COMPLETE"]
    assert (trials(study)[0].value, outcomes(study)[0]) == (0.5, "stopped")


def test_a_trial_ended_by_a_person_keeps_its_last_value(make_study: MakeStudy, opening: Callable[..., None]) -> None:
    """A trial that went on after it was ended by a person keeps its last value."""
    study = make_study(trials=1)
    ledger = study.ledger("w")
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    ledger.report([Report(claim=claim, step=1, value=0.5, metrics={"value": 0.5})])
    ledger.record_checkpoint(claim, Checkpoint(epoch=1, path="/c.pt", digest="d"))
    ledger.park(claim)

    def stop(trial: LeasedTrial) -> None:
        assert not control.stop_trial(study, 0)
        wait_for(lambda: trial.client.must_end(trial.lease))

    opening(stop)
    assert work(study, one) == 0
    assert (states(study), trials(study)[0].value) == (["PRUNED"], 0.5)


@pytest.mark.parametrize("then", ["prune", "fail"])
def test_a_trial_without_time_left_is_ended_first(then: str, make_study: MakeStudy) -> None:
    """A trial whose time was spent before is ended before its objective starts."""
    study = make_study(trials=2, budget={"trials": 2, "trial_timeout": "10s"}, failures={"time_limit": {"then": then}})
    ledger = study.ledger("w")
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    for step in (1, 2):
        metrics = {"value": 0.5, "seconds": 6.0}
        ledger.report([Report(claim=claim, step=step, value=0.5 / step, metrics=metrics)])
    ledger.record_checkpoint(claim, Checkpoint(epoch=2, path="/c.pt", digest="d"))
    ledger.park(claim)
    begun: list[int] = []

    def objective(trial: LeasedTrial) -> float:
        begun.append(trial.number)
        return 1.0

    assert work(study, objective) == 0
    assert begun == [1]
    assert states(study) == ["PRUNED" if then == "prune" else "FAIL", "COMPLETE"]
    assert trials(study)[0].value == (0.25 if then == "prune" else None)
    assert recorded_failures(study) == [(2, "time_limit", then)]


def test_a_trial_claimed_at_a_stop_keeps_its_place(make_study: MakeStudy, opening: Callable[..., None]) -> None:
    """A trial that was claimed as the worker was asked to stop keeps its place."""
    study = make_study(trials=1)
    stopping = StopSignal()
    opening(lambda trial: stopping.request())
    assert work(study, lambda trial: pytest.fail("it must not start"), stopping) == 143
    assert states(study) == ["RUNNING"]
    assert rows(study)[0].lease_until is None
    assert recorded_failures(study) == []


def test_a_trial_that_was_lost_before_its_objective_started_is_dropped(
    make_study: MakeStudy, opening: Callable[..., None]
) -> None:
    study = make_study(trials=2)
    thief = study.ledger("thief")
    stolen: list[Claim] = []

    def steal(trial: LeasedTrial) -> None:
        if stolen:
            return
        reaper.release_leases_of(thief, "w")
        taken = claim_one(thief)
        assert isinstance(taken, Claim)
        stolen.append(taken)
        wait_for(lambda: trial.client.must_end(trial.lease))

    def objective(trial: LeasedTrial) -> float:
        assert trial.number == 1
        finish_claim(thief, stolen[0], TrialState.COMPLETE, 8.0, outcome="complete")
        return 1.0

    opening(steal)
    assert work(study, objective) == 0
    assert [trial.value for trial in trials(study)] == [8.0, 1.0]
    assert recorded_failures(study) == [(1, "lease_lost", "drop")]
