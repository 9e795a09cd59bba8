"""Pruning among comparable trials, by hand: who may end whom, where trials are judged by what they cost too."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.queue.models import Claim
from hpo.spec.objectives import KnownCosts
from hpo.storage.connect import Storage
from hpo.storage.tables import COST_PREFIX
from hpo.strategy import array_pruners
from hpo.study.study import Study
from hpo.worker.trial import LeasedTrial
from tests.support import trials
from tests.support.trials import MakeStudy, claim_one, end_trial, opened

MEDIAN = {"name": "median", "n_startup_trials": 1, "n_min_trials": 1}
HALVING = {"name": "successive_halving", "reduction_factor": 2}
Costs = float | tuple[float, float] | None


@pytest.fixture
def make(lite: Storage, tmp_path: Path) -> MakeStudy:
    def make_one(pruner: dict[str, Any], **document: Any) -> Study:
        base = {"objectives": {"accuracy": "maximize", "size": "minimize"}, "direction": None, "budget": {"trials": 99}}
        return trials.make(lite, tmp_path, pruner=pruner, **{**base, **document})

    return make_one


def begin(study: Study, costs: Costs = None) -> LeasedTrial:
    """Begin a trial that tells what it costs, as an objective of the user's own may."""
    ledger = study.ledger("w")
    claimed = claim_one(ledger)
    assert isinstance(claimed, Claim)
    study.optuna.get_trials(deepcopy=False)
    trial = opened(study, ledger, claimed)
    told = () if costs is None else costs if isinstance(costs, tuple) else (costs,)
    for name, cost in zip(study.spec.goals.costs, told, strict=False):
        trial.set_user_attr(COST_PREFIX + name, cost)
    return trial


def end(study: Study, costs: float | tuple[float, float], *curve: float) -> None:
    """Run a trial to its end."""
    trial = begin(study, costs)
    for step, value in enumerate(curve, 1):
        trial.report(value, step)
    further = costs if isinstance(costs, tuple) else (costs,)
    trial.known = KnownCosts(values=further[: len(study.spec.goals.names) - 1], constraints={})
    end_trial(trial, TrialState.COMPLETE, curve[-1])


def is_ended(study: Study, costs: Costs, value: float) -> bool:
    trial = begin(study, costs)
    trial.report(value, 1)
    return trial.should_prune()


@pytest.mark.parametrize(
    ("size", "value", "expected"),
    [
        pytest.param(50.0, 0.6, True, id="its one comparable trial is smaller, and better"),
        pytest.param(50.0, 0.95, False, id="better than its one comparable trial"),
        pytest.param(5.0, 0.01, False, id="none is as small: whatever its curve, it may stand on the front"),
        pytest.param(10.0, 0.3, True, id="of equal size"),
        pytest.param(99.0, 0.6, True, id="as if the others were not there"),
        pytest.param(100.0, 0.6, True, id="below the median of all, 0.7"),
        pytest.param(100.0, 0.7, False, id="at the median"),
        pytest.param(None, 0.0, False, id="nobody knows what it costs"),
    ],
)
def test_a_median_is_that_of_comparable_trials(
    make: MakeStudy, size: float | None, value: float, expected: bool
) -> None:
    study = make(MEDIAN)
    end(study, 10.0, 0.9)
    end(study, 100.0, 0.5)
    end(study, 100.0, 0.7)
    assert is_ended(study, size, value) is expected


def test_the_trials_of_a_start_up_are_comparable_too(make: MakeStudy) -> None:
    study = make({**MEDIAN, "n_startup_trials": 2})
    end(study, 10.0, 0.9)
    end(study, 20.0, 0.9)
    assert not is_ended(study, 15.0, 0.1)  # one comparable trial is not enough to judge by
    assert is_ended(study, 20.0, 0.1)


def test_halving_is_among_comparable_trials(make: MakeStudy) -> None:
    study = make(HALVING)
    told = [
        (10.0, 0.5, False),  # alone
        (20.0, 0.4, True),  # of 0.5 and 0.4 one goes on
        (5.0, 0.1, False),  # none is as small
        (20.0, 0.45, False),  # two of 0.5, 0.45, 0.4, 0.1
        (7.0, 0.05, True),  # one of 0.1, 0.05
        (7.0, 0.2, False),  # one of 0.2, 0.1, 0.05
        (None, 0.0, False),  # has no comparable ones, and is none
        (9.0, 0.15, False),  # two of 0.2, 0.15, 0.1, 0.05
    ]
    assert [is_ended(study, size, value) for size, value, _ in told] == [expected for *_, expected in told]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_trials_decided_together_are_compared_in_any_order(make: MakeStudy, order: tuple[int, ...]) -> None:
    study = make(HALVING)
    sizes, values = [10.0, 3.0, 10.0], [0.5, 0.55, 0.52]
    held = [begin(study, size) for size in sizes]
    for trial, value in zip(held, values, strict=True):
        trial.report(value, 1)
    decided = array_pruners.decide(study.optuna, [held[index].frozen for index in order])
    found = dict(zip(order, decided, strict=True))
    assert found == {0: True, 1: False, 2: True}  # 0.55 is better than both, and smaller; of three one goes on


def test_hyperband_compares_within_one_bracket(make: MakeStudy) -> None:
    study = make({"name": "hyperband", "max_resource": 9, "reduction_factor": 3})
    ended = [is_ended(study, 10.0, 1.0 - number / 100) for number in range(24)]
    smaller = [is_ended(study, 5.0 - number / 10, 0.0) for number in range(24)]
    assert any(ended)
    assert not any(smaller)


def test_who_violates_less_is_comparable_and_who_violates_more_is_not(make: MakeStudy) -> None:
    study = make(MEDIAN, constraints={"size": "<= 50"})
    end(study, 60.0, 0.9)
    assert not is_ended(study, 50.0, 0.1)  # what is no result ends nobody that may be one
    assert not is_ended(study, 55.0, 0.1)
    assert is_ended(study, 60.0, 0.1)
    end(study, 50.0, 0.5)
    assert is_ended(study, 60.0, 0.4)  # 0.9 and 0.5
    assert is_ended(study, 55.0, 0.4)  # 0.5
    assert not is_ended(study, 55.0, 0.6)


def test_of_three_objectives_a_comparable_trial_is_no_worse_in_either_cost(make: MakeStudy) -> None:
    directions = {"accuracy": "maximize", "size": "minimize", "speed": "maximize"}
    study = make(MEDIAN, objectives=directions)
    end(study, (10.0, 100.0), 0.9)
    assert is_ended(study, (10.0, 100.0), 0.1)
    assert is_ended(study, (11.0, 99.0), 0.1)
    assert not is_ended(study, (9.0, 1.0), 0.1)
    assert not is_ended(study, (99.0, 101.0), 0.1)
    assert not is_ended(study, 99.0, 0.1)  # its speed is not told


def test_a_patient_pruner_asks_the_other_one_about_comparable_trials(make: MakeStudy) -> None:
    study = make({"name": "patient", "patience": 1, "wrapped": "median"})
    for _ in range(6):
        end(study, 10.0, 0.9, 0.9)

    def stands_still(size: float) -> bool:
        trial = begin(study, size)
        trial.report(0.5, 1)
        trial.report(0.5, 2)
        return trial.should_prune()

    assert [stands_still(10.0), stands_still(9.0)] == [True, False]
