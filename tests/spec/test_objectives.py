"""What trials are judged by, as a study file says it: names, directions and bounds, told before any worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from hpo.errors import SpecError
from hpo.spec.objectives import COSTS, Beside, Bound, KnownCosts
from hpo.spec.study_file import StudySpec, differences
from hpo.storage.finished_trials import violation_in
from hpo.strategy import pruners
from hpo.strategy.lint import lint
from hpo.strategy.pareto_pruner import CostAwarePruner
from hpo.study import resolve
from tests.support.paths import ROOT

DECLARED: dict[str, Any] = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": {"choices": [[8], [16]]}},
    "optimizer": {"name": "sgd", "lr": 0.1},
}
OWN: dict[str, Any] = {"name": "s", "objective": "x.py:f"}
TWO = {"accuracy": "maximize", "params": "minimize"}


def resolved(**changes: Any) -> StudySpec:
    return resolve.resolve(StudySpec.from_document({**DECLARED, **changes}), Path())


def test_a_study_of_one_objective_is_what_it_was() -> None:
    document = resolved().document
    assert not {"objectives", "constraints"} & document.keys()
    goals = resolved().goals
    assert (goals.directions, goals.are_several, goals.costs) == ({"accuracy": "maximize"}, False, [])
    assert StudySpec.from_document({**OWN, "direction": "minimize"}).goals.directions == {"value": "minimize"}


def test_the_first_objective_gives_metric_and_direction() -> None:
    """Objectives stand in their order and the first gives metric and direction."""
    spec = resolved(objectives={"loss": "minimize", "latency_ms": "minimize", "params": "minimize"})
    assert (spec.metric, spec.direction, spec.goals.names) == ("loss", "minimize", ["loss", "latency_ms", "params"])
    again = StudySpec.from_document(spec.document)
    assert again.fingerprint == spec.fingerprint
    other = resolved(objectives={"loss": "minimize", "params": "minimize", "latency_ms": "minimize"})
    assert other.fingerprint != spec.fingerprint
    assert [line.partition(":")[0] for line in differences(spec, other)] == ["objectives"]


def test_what_is_bounded_and_what_an_objective_is_measured_once() -> None:
    goals = resolved(objectives=TWO, constraints={"params": "<= 1e6", "memory_mb": "<=2", "accuracy": ">= 0.9"}).goals
    assert goals.costs == ["params", "memory_mb"]
    assert list(map(str, goals.bounds)) == ["params <= 1e+06", "memory_mb <= 2", "accuracy >= 0.9"]
    assert [bound.name for bound in goals.static_bounds] == ["params", "memory_mb"]


REFUSED = [
    ({"objectives": {"accuracy": "maximize"}}, "objectives.accuracy: is the only objective; name two or more"),
    ({"objectives": {"params": "minimize", "accuracy": "maximize"}}, "objectives.params: the first objective must be a metric"),
    ({"objectives": {"accuracy": "maximize", "loss": "minimize"}}, "objectives.loss: only the first objective can be a metric"),
    ({"objectives": {"accuracy": "maximize", "parms": "minimize"}}, "objectives.parms: there is no such objective (did"),
    ({"objectives": {"accuracy": "minimize", "params": "minimize"}}, "objectives.accuracy = 'minimize': must be maximized"),
    ({"objectives": {"accuracy": "maximize", "params": "maximize"}}, "objectives.params = 'maximize': must be minimized"),
    ({"objectives": {"accuracy": "maximize", "params": "least"}}, "objectives.params = 'least': input should be 'maximize'"),
    ({"objectives": TWO, "metric": "loss"}, "metric = 'loss': the first of [objectives] is accuracy; remove metric"),
    ({"objectives": TWO, "direction": "minimize"}, "direction = 'minimize': accuracy must be maximized"),
    ({"constraints": {"param": "<= 3"}}, "constraints.param: there is no such value (did you mean 'params'?)"),
    ({"constraints": {"loss": "<= 3"}}, "constraints.loss: there is no such value"),
    ({"constraints": {"params": "< 3"}}, 'constraints.params = \'< 3\': is not a bound; write "<= 1e6" or ">= 0.9"'),
    ({"constraints": {"params": "<= many"}}, "constraints.params = '<= many': is not a bound"),
    ({"constraints": {"params": "<= 1e999"}}, "constraints.params = '<= 1e999': is not a bound"),
    ({"objectives": TWO, "sampler": {"name": "cmaes"}}, "sampler.name = 'cmaes': does not support several objectives"),
    ({"constraints": {"params": "<= 9"}, "sampler": {"name": "cmaes"}}, "sampler.name = 'cmaes': does not support constraints"),
    ({"objectives": TWO, "pruner": {"name": "patient", "patience": 2}}, 'pruner.wrapped = "none": a trial without improvement'),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_is_told_with_its_path(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolved(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "maximize", "constraints": {"value": "<= 3"}}, "constraints.value: needs named [objectives]"),
        ({"objectives": {"a": "minimize"}}, "objectives.a: is the only objective"),
        ({"objectives": {"a": "minimize", "b": "maximize"}, "direction": "maximize"}, "direction = 'maximize': objectives.a"),
        ({"objectives": {"a": "minimize", "b": "maximize"}, "constraints": {"params": "<= 3"}}, "constraints.params: there is"),
    ],
)  # fmt: skip
def test_what_an_objective_of_ones_own_cannot_have_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        StudySpec.from_document({**OWN, **changes})
    assert str(caught.value).startswith(message)


def test_an_objective_of_ones_own_names_and_directs_what_it_returns() -> None:
    spec = StudySpec.from_document(
        {**OWN, "objectives": {"a": "minimize", "b": "maximize"}, "constraints": {"b": ">= 1"}}
    )
    assert (spec.direction, spec.goals.costs) == ("minimize", ["b"])
    known = spec.goals.returned({"a": 3.0, "b": 0.25})
    assert known.beside(3.0) == Beside(values=(0.25,), constraints={"b": 0.75})


@pytest.mark.parametrize(
    ("text", "value", "violation"),
    [
        ("<= 200", 300.0, 0.5),
        ("<= 200", 200.0, 0.0),
        ("<=2e2", 100.0, -0.5),
        (" >= 0.5 ", 0.25, 0.5),
        (">= 0.5", 1.0, -1.0),
        ("<= -4", -2.0, 0.5),
        ("<= 0", 3.0, 3.0),  # of nothing there is no share
    ],
)
def test_a_violation_is_the_share_of_the_limit_by_which_it_is_passed(text: str, value: float, violation: float) -> None:
    assert Bound.parse("params", text).violation(value) == violation


def test_what_is_known_of_an_end_survives_the_database() -> None:
    goals = resolved(objectives=TWO, constraints={"params": "<= 100", "accuracy": ">= 0.8"}).goals
    known = goals.known({"params": 150.0})
    assert KnownCosts.from_json(known.to_json()) == known
    assert known.beside(0.6) == Beside(
        values=(150.0,), constraints={"params": 0.5, "accuracy": cast(float, pytest.approx(0.25))}
    )
    assert known.beside(None) == Beside(constraints={"params": 0.5})  # a trial without a value has none of the others


def test_the_columns_read_optuna_s_constraints_of_both_versions() -> None:
    assert violation_in({"constraints:a": "0.5", "constraints:b": "-3.0", "other": "7"}) == 0.5
    assert violation_in({"constraints": "[1.0, -1.0, 2.0]"}) == 3.0
    assert violation_in({}) == 0.0


@pytest.mark.parametrize(
    ("changes", "is_among_rivals"),
    [
        ({}, False),
        ({"objectives": TWO}, True),
        ({"constraints": {"params": "<= 9"}}, True),
        ({"constraints": {"accuracy": ">= 0.9"}}, False),  # which nobody knows before
        ({"objectives": TWO, "pruner": {"name": "hyperband"}}, True),
        ({"objectives": TWO, "pruner": {"name": "successive_halving"}}, True),
        ({"objectives": TWO, "pruner": {"name": "threshold", "lower": 0.1}}, False),
        ({"objectives": TWO, "pruner": {"name": "none"}}, False),
    ],
)
def test_a_pruner_compares_comparable_trials_where_costs_are_known(
    changes: dict[str, Any], is_among_rivals: bool
) -> None:
    assert isinstance(pruners.build(resolved(**changes)), CostAwarePruner) is is_among_rivals
    wrapped = {"name": "patient", "patience": 2, "wrapped": "median"}
    patient = pruners.build(resolved(**{**changes, "pruner": wrapped}))
    assert isinstance(patient, pruners.Patient)
    assert isinstance(patient.wrapped, CostAwarePruner) is (is_among_rivals or "objectives" in changes)


def test_a_search_in_which_all_cost_the_same_is_warned_of() -> None:
    fixed = resolved(
        objectives=TWO, model={"name": "mlp", "widths": [8]}, optimizer={"name": "sgd", "lr": {"low": 0.1, "high": 1.0}}
    )
    assert [line for line in lint(fixed) if line.startswith("params: nothing of [model] is searched")]
    assert not [line for line in lint(resolved(objectives=TWO)) if "searched, so" in line]


def test_the_example_is_right_and_searches_its_size() -> None:
    spec = resolve.read(ROOT / "examples/accuracy_size.toml").spec
    assert spec.goals.costs == ["params", "memory_mb"]
    assert lint(spec) == []


def test_the_costs_that_a_file_may_name_are_those_that_are_measured() -> None:
    from hpo.train.build.costs import MEASURES

    assert tuple(MEASURES) == COSTS
