"""The importance of parameters, on trials whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from hpo.analysis import columns, effects
from hpo.analysis.columns import Columns
from hpo.storage.connect import Storage
from hpo.study import plain

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1.0, log=True),
    "idle": FloatDistribution(0.0, 1.0),
    "kind": CategoricalDistribution(["a", "b", "c"]),
}


def made(place: Storage, count: int, *, prunes: bool = False, name: str = "theirs") -> optuna.Study:
    """Make a study of Optuna's own in which the value is |log10(lr) + 2|, plus 1 for kind c."""
    study = optuna.create_study(storage=place.optuna, study_name=name)
    source = np.random.default_rng(1)
    trials = []
    for _ in range(count):
        lr, kind = 10 ** source.uniform(-4, 0), "abc"[source.integers(3)]
        params = {"lr": lr, "idle": source.uniform(), "kind": kind}
        value = abs(math.log10(lr) + 2) + (kind == "c")
        is_pruned = prunes and value > 0.6
        trials.append(
            create_trial(
                params=params,
                distributions=SPACE,
                value=None if is_pruned else value,
                state=TrialState.PRUNED if is_pruned else TrialState.COMPLETE,
                intermediate_values={0: value + 1.0},
            )
        )
    study.add_trials(trials)
    return study


def columns_of(place: Storage, name: str = "theirs") -> Columns:
    return columns.read(plain.open_any(place, name))


def test_importances_are_shares_of_optunas_own(lite: Storage) -> None:
    theirs = PedAnovaImportanceEvaluator().evaluate(made(lite, 200))
    (found,) = effects.of_study(columns_of(lite))
    whole = sum(theirs.values())
    assert {one.name: one.share for one in found.found} == pytest.approx(
        {name: value / whole for name, value in theirs.items()}, rel=1e-9
    )


@pytest.mark.parametrize("prunes", [False, True])
def test_a_parameter_without_effect_is_within_chance(lite: Storage, prunes: bool) -> None:
    made(lite, 200, prunes=prunes)
    (found,) = effects.of_study(columns_of(lite))
    assert found.why_none == ""
    assert found.found[0].name == "lr"
    assert found.without_effect == ["idle"]
    assert all(one.low <= one.share <= one.high for one in found.found)
    assert found == effects.of_study(columns_of(lite))[0], "the samples are drawn by a fixed seed"


def test_nothing_is_said_of_too_few_trials_or_of_equal_ones(lite: Storage) -> None:
    made(lite, effects.FEWEST - 1)
    (few,) = effects.of_study(columns_of(lite))
    assert (few.found, few.why_none) == ((), "19 complete and pruned trials are too few; 20 are needed")
    study = optuna.create_study(storage=lite.optuna, study_name="equal")
    study.add_trials(
        [
            create_trial(params={"x": 0.1 * n}, distributions={"x": FloatDistribution(0, 9)}, value=1.0)
            for n in range(20)
        ]
    )
    (equal,) = effects.of_study(columns_of(lite, "equal"))
    assert equal.why_none == "no complete trial is better than another"
