"""PED-ANOVA for many sets of best trials at once, against Optuna's own evaluator."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from hpo.analysis.importance import cells, divergences

SPACE = {
    "linear": FloatDistribution(0.0, 1.0),
    "log": FloatDistribution(1e-4, 1e-1, log=True),
    "stepped": FloatDistribution(0.0, 1.0, step=0.1),
    "whole": IntDistribution(1, 7),
    "whole_log": IntDistribution(1, 512, log=True),
    "choice": CategoricalDistribution(("x", "y", "z")),
}


def test_importances_are_those_of_optunas_evaluator() -> None:
    source = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trials = []
    for _ in range(120):
        params = source.ask(SPACE).params
        value = (params["linear"] - 0.3) ** 2 + 0.1 * math.log10(params["log"]) + 0.3 * (params["choice"] == "x")
        trials.append(create_trial(params=params, distributions=dict(SPACE), value=value))
    values = np.array([trial.value for trial in trials])
    ordered = np.sort(values)
    tenth = math.ceil(0.1 * len(values))
    sets = np.stack([values <= ordered[tenth - 1], values >= ordered[-tenth]])
    for place, direction in enumerate(["minimize", "maximize"]):
        study = optuna.create_study(direction=direction)
        study.add_trials(trials)
        for name, expected in PedAnovaImportanceEvaluator().evaluate(study).items():
            stored = np.array([SPACE[name].to_internal_repr(trial.params[name]) for trial in trials])
            at, count = cells(SPACE[name], stored)
            found = divergences(at, count, sets, is_choice=name == "choice") * sets.mean(axis=1) ** 2
            assert found[place] == pytest.approx(expected, rel=1e-9)
