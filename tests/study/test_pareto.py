"""The front of several objectives: what Optuna's `best_trials` says, on random studies."""

from __future__ import annotations

import random

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from hpo.spec.curve import Direction
from hpo.spec.objectives import Goals
from hpo.study.pareto import best_trials, is_non_dominated


@pytest.mark.parametrize("seed", range(30))
def test_the_front_is_optunas(seed: int) -> None:
    draw = random.Random(seed)
    directions: dict[str, Direction] = {
        f"o{i}": draw.choice(["maximize", "minimize"]) for i in range(draw.choice([2, 3, 4]))
    }
    study = optuna.create_study(directions=list(directions.values()))
    bounded = draw.random() < 0.5
    for _ in range(draw.choice([0, 1, 40])):
        scores = [float(draw.randrange(6)) for _ in directions]  # with ties, and equal trials
        constraints = {"a": draw.uniform(-1, 0.5), "b": draw.uniform(-1, 0.5)} if bounded else None
        study.add_trial(create_trial(values=scores, constraints=constraints))
    study.add_trial(
        create_trial(state=TrialState.PRUNED, values=[9.0 if d == "maximize" else -9.0 for d in directions.values()])
    )
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    numbers = np.array([trial.number for trial in complete], np.int64)
    values = np.array([trial.values for trial in complete]).reshape(len(complete), len(directions))
    violations = np.array([sum(max(0.0, v) for v in trial.constraints.values()) for trial in complete])
    found = numbers[best_trials(Goals(directions=directions), numbers, values, violations)].tolist()
    assert sorted(found) == sorted(trial.number for trial in study.best_trials)
    sign = -1 if directions["o0"] == "maximize" else 1
    assert found == sorted(found, key=lambda number: (sign * study.trials[number].values[0], number))


def test_of_one_objective_all_that_violate_nothing_stand_in_order() -> None:
    goals = Goals(directions={"loss": "minimize"})
    numbers = np.array([4, 2, 7, 9], np.int64)
    found = best_trials(goals, numbers, np.array([[0.5], [0.5], [0.1], [0.7]]), np.array([0.0, 0.0, 0.2, 0.0]))
    assert numbers[found].tolist() == [2, 4, 9]


def test_equal_ones_do_not_beat_each_other() -> None:
    assert is_non_dominated(np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [0.0, 9.0]])).tolist() == [
        True,
        True,
        False,
        True,
    ]
