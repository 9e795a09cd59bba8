"""What the live view shows beyond a study's summary."""

from __future__ import annotations

from pathlib import Path

from optuna.trial import TrialState

from hpo.queue.models import Claim
from hpo.spec.failures import Failure, Kind
from hpo.storage.connect import Storage
from hpo.study import details
from hpo.study.details import BestTrial, RunningDetails
from hpo.study.status import read
from hpo.study.study import Study
from tests.support.trials import begin, end_trial, make, run


def test_the_five_best_trials_come_with_their_parameters(place: Storage, tmp_path: Path) -> None:
    """Of equals the first leads; what is read anew and what goes on agree."""
    demo = make(place, tmp_path, budget={"trials": 100})
    past = read(demo).past
    for value in (0.1, 0.9, 0.5, 0.9, 0.3, 0.2, 0.4):
        _, _, trial = begin(demo)
        trial.suggest_float("x", value, value)
        end_trial(trial, TrialState.COMPLETE, value)
    run(demo, 1.0, state=TrialState.PRUNED)
    best = [(1, 0.9), (3, 0.9), (2, 0.5), (6, 0.4), (4, 0.3)]
    wanted = [BestTrial(number=number, value=value, params={"x": value}) for number, value in best]
    assert details.read(demo, read(demo)).best == details.read(demo, read(demo, past)).best == wanted


def test_a_running_trial_of_an_own_objective_has_parameters_alone(demo: Study) -> None:
    _, _, trial = begin(demo)
    trial.suggest_int("width", 8, 8)
    trial.report(0.5, 1)
    assert details.read(demo, read(demo)).running == [RunningDetails(number=0, params={"width": 8})]


def test_a_declared_trial_comes_with_its_raw_curve_and_its_epochs(place: Storage, tmp_path: Path) -> None:
    demo = make(
        place,
        tmp_path,
        objective=None,
        direction=None,
        value="best",
        data={"name": "digits"},
        model={"name": "mlp", "widths": [8]},
        training={"epochs": {"low": 2, "high": 9}},
        optimizer={"name": "sgd", "lr": 0.1},
    )
    _, _, trial = begin(demo)
    trial.suggest_int("training.epochs", 7, 7)
    for step, value in enumerate([0.5, 0.25], start=1):
        trial.write(trial.reporting(step, 0.5, {"validation_accuracy": value, "seconds": 1.0}))
    trial.client.flush()
    (found,) = details.read(demo, read(demo)).running
    assert found == RunningDetails(number=0, params={"training.epochs": 7}, raw=[0.5, 0.25], epochs=7)


def test_only_failed_attempts_are_counted_as_such(demo: Study) -> None:
    """A trial that was parked twice and failed once is at its fourth attempt, and has failed once."""
    for ends in ("parked", "failed", "parked"):
        ledger, claim, _ = begin(demo)
        assert isinstance(claim, Claim)
        if ends == "failed":
            ledger.fail(claim, Failure(kind=Kind.LOST_WORKER, message="killed"))
        else:
            ledger.park(claim)
    begin(demo)
    (running,) = read(demo).summary.running
    assert (running.attempt, running.failed) == (4, 1)
