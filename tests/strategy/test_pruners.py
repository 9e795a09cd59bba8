"""Pruners by name, on real studies in memory: whom each ends, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
import pytest

from hpo.errors import SpecError
from hpo.spec.study_file import StudySpec
from hpo.strategy import pruners

TREE: dict[str, Any] = {
    "data": {"name": "d"},
    "model": {"name": "m"},
    "optimizer": {"name": "o", "lr": {"low": 0.1, "high": 1.0}},
}
GOOD, BAD = [0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9], [0.1] * 9


def spec(pruner: dict[str, Any], **changes: Any) -> StudySpec:
    return pruners.resolve(StudySpec.from_document({"name": "s", "pruner": pruner, **TREE, **changes}))


def study_of(pruner: dict[str, Any], history: Sequence[Sequence[float]] = (), **changes: Any) -> optuna.Study:
    found = spec(pruner, **changes)
    study = optuna.create_study(direction=found.direction, pruner=pruners.build(found), study_name="fixed")
    for curve in history:
        trial = study.ask()
        for epoch, reported in enumerate(curve, start=1):
            trial.report(reported, epoch)
            trial.should_prune()
        study.tell(trial, curve[-1])
    return study


def pruned_at(study: optuna.Study, curve: Sequence[float]) -> int | None:
    """Return the epoch at which a trial with this curve is pruned, None if it never is."""
    trial = study.ask()
    for epoch, reported in enumerate(curve, start=1):
        trial.report(reported, epoch)
        if trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return epoch
    study.tell(trial, curve[-1])
    return None


MEDIAN = {"name": "median", "n_startup_trials": 3, "n_min_trials": 1}
RUNGS = {"name": "successive_halving", "min_resource": 2, "reduction_factor": 2}


@pytest.mark.parametrize(
    ("pruner", "history", "curve", "epoch"),
    [
        ({"name": "none"}, [GOOD] * 9, BAD, None),
        (MEDIAN, [GOOD] * 3, BAD, 1),
        (MEDIAN, [GOOD] * 2, BAD, None),  # still starting up
        (MEDIAN, [BAD] * 3, GOOD, None),
        (MEDIAN, [BAD, BAD, GOOD], BAD, None),  # equal to the median is not below it
        (MEDIAN, [BAD, BAD, GOOD], [0.05] * 9, 1),
        (MEDIAN | {"n_warmup_steps": 4}, [GOOD] * 3, BAD, 5),
        (MEDIAN | {"n_warmup_steps": 9}, [GOOD] * 3, BAD, None),
        (MEDIAN | {"interval_steps": 3, "n_warmup_steps": 1}, [GOOD] * 3, [0.55, 0.65, *BAD[2:]], 5),
        (MEDIAN | {"n_min_trials": 4}, [GOOD] * 3, BAD, None),
        ({**MEDIAN, "name": "percentile", "percentile": 25.0}, [GOOD, BAD, BAD, BAD], [0.3] * 9, 5),
        ({**MEDIAN, "name": "percentile", "percentile": 75.0}, [GOOD, GOOD, BAD, BAD], [0.3] * 9, None),
        ({**MEDIAN, "name": "percentile", "percentile": 25}, [GOOD] * 3, BAD, 1),
        (RUNGS, [GOOD] * 4, BAD, 2),
        (RUNGS, [BAD] * 4, GOOD, None),
        (RUNGS | {"min_resource": 3}, [GOOD] * 4, BAD, 3),
        (RUNGS | {"min_early_stopping_rate": 1}, [GOOD] * 4, BAD, 4),
        (RUNGS | {"min_resource": 50}, [GOOD] * 4, BAD, None),
        ({"name": "threshold", "lower": 0.2}, [], [0.3, 0.1], 2),
        ({"name": "threshold", "upper": 1}, [], [0.3, 1.1], 2),
        ({"name": "threshold", "lower": 0.2, "upper": 1.0}, [], GOOD, None),
        ({"name": "threshold", "upper": 1.0}, [], [float("nan")], 1),
        ({"name": "threshold", "lower": 0.2, "n_warmup_steps": 2}, [], BAD, 3),
        ({"name": "patient", "patience": 2}, [], BAD, 3),
        ({"name": "patient", "patience": 2}, [], [0.1, 0.2, 0.2, 0.2], 4),
        ({"name": "patient", "patience": 1}, [], [0.1, float("nan")], 2),
        ({"name": "patient", "patience": 2}, [], [0.1 * i for i in range(1, 9)], None),
        ({"name": "patient", "patience": 2, "min_delta": 0.5}, [], [0.1, 0.2, 0.7, 0.8, 0.9, 1.0], 5),
        ({"name": "patient", "patience": 2, "wrapped": "median"}, [BAD] * 9, [0.5] * 9, None),
        ({"name": "patient", "patience": 2, "wrapped": "median"}, [GOOD] * 9, BAD, 3),
    ],
)
def test_when_a_trial_is_pruned(
    pruner: dict[str, Any], history: list[list[float]], curve: list[float], epoch: int | None
) -> None:
    assert pruned_at(study_of(pruner, history), curve) == epoch


def test_a_loss_is_pruned_from_above() -> None:
    assert pruned_at(study_of(MEDIAN, [[0.1] * 5] * 3, metric="loss"), [0.9] * 5) == 1
    assert pruned_at(study_of(MEDIAN, [[0.9] * 5] * 3, metric="loss"), [0.1] * 5) is None
    patient = {"name": "patient", "patience": 2}
    assert pruned_at(study_of(patient, metric="loss"), [0.5, 0.4, 0.4, 0.4]) == 4
    assert pruned_at(study_of(patient, metric="loss"), [0.5, 0.4, 0.3, 0.2]) is None


def test_hyperband_never_prunes_the_best() -> None:
    """Hyperband prunes the hopeless in some bracket and never the best."""
    study = study_of({"name": "hyperband"}, [GOOD] * 20, training={"epochs": 9})
    ends = [pruned_at(study, BAD) for _ in range(12)]
    assert {1, 3} <= set(ends)
    assert set(ends) <= {1, 3, None}  # rungs 1 and 3 of the brackets; the last bracket runs all 9 epochs
    assert [pruned_at(study, [2.0] * 9) for _ in range(12)] == [None] * 12


@pytest.mark.parametrize(
    ("epochs", "most"), [(27, 27), ({"low": 3, "high": 9}, 9), ({"choices": [9, 81, 3]}, 81), (None, 20)]
)
def test_hyperbands_resource_is_the_epochs_of_the_longest_trial(epochs: Any, most: int) -> None:
    training = {} if epochs is None else {"epochs": epochs}
    assert spec({"name": "hyperband"}, training=training).pruner == {
        "name": "hyperband",
        "min_resource": 1,
        "reduction_factor": 3,
        "max_resource": most,
    }
    assert spec({"name": "hyperband", "max_resource": 5}, training=training).pruner["max_resource"] == 5


def test_every_pruner_is_built_from_its_defaults() -> None:
    needed: dict[str, dict[str, Any]] = {"threshold": {"lower": 0.0}, "patient": {"patience": 3}}
    for name in pruners.PRUNERS:
        built = pruners.build(spec({"name": name, **needed.get(name, {})}))
        assert isinstance(built, optuna.pruners.BasePruner)
    assert list(pruners.PRUNERS) == [
        "none",
        "auto",
        "median",
        "percentile",
        "successive_halving",
        "hyperband",
        "threshold",
        "patient",
    ]


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        ({"name": "medain"}, "pruner.name: there is no pruner 'medain' (did you mean 'median'?)"),
        (
            {"name": "median", "n_warmup": 1},
            "pruner.n_warmup: pruner median takes no 'n_warmup' (did you mean 'n_warmup_steps'?)",
        ),
        ({"name": "none", "n_warmup_steps": 1}, "pruner.n_warmup_steps: pruner none takes no 'n_warmup_steps'"),
        (
            {"name": "median", "interval_steps": 0},
            "pruner.interval_steps = 0: input should be greater than or equal to 1",
        ),
        (
            {"name": "percentile", "percentile": 101.0},
            "pruner.percentile = 101.0: input should be less than or equal to 100",
        ),
        (
            {"name": "successive_halving", "reduction_factor": 1},
            "pruner.reduction_factor = 1: input should be greater than or equal to 2",
        ),
        (
            {"name": "successive_halving", "min_resource": "auto"},
            "pruner.min_resource = 'auto': input should be a valid integer",
        ),
        (
            {"name": "hyperband", "max_resource": "auto"},
            "pruner.max_resource = 'auto': input should be a valid integer",
        ),
        (
            {"name": "hyperband", "min_resource": 21},
            "pruner.min_resource = 21: is above pruner.max_resource = 20; lower it",
        ),
        ({"name": "threshold"}, "pruner: threshold needs lower or upper; add one"),
        (
            {"name": "threshold", "lower": 2.0, "upper": 1.0},
            "pruner.lower = 2.0: is above pruner.upper = 1.0; lower it",
        ),
        ({"name": "patient"}, "pruner.patience: pruner patient needs 'patience'; add it"),
        (
            {"name": "patient", "patience": 1, "wrapped": "hyperband"},
            "pruner.wrapped = 'hyperband': input should be 'none', 'median', 'percentile' or 'successive_halving'",
        ),
    ],
)
def test_a_pruner_that_cannot_work_is_refused(pruner: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec(pruner)
    assert str(caught.value) == message


def test_hyperband_over_an_own_objective_needs_its_resource() -> None:
    """Hyperband over an objective of the user's own must be told its resource."""
    document = {"name": "s", "objective": "mine.py:f", "direction": "minimize", "pruner": {"name": "hyperband"}}
    with pytest.raises(SpecError) as caught:
        pruners.resolve(StudySpec.from_document(document))
    assert str(caught.value) == "pruner.max_resource: pruner hyperband needs 'max_resource'; add it"
