"""The divergence guard in workers: own objectives with every pruner, programs, declared trainings, kills amid the patience."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

import hpo
from hpo.storage.connect import Storage
from hpo.storage.tables import DIVERGED_KEY, hpo_trials
from hpo.strategy.pruners import PRUNERS
from hpo.study import results
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.train.build.executor import Choice
from hpo.view import pages
from hpo.worker import loop as worker_loop
from hpo.worker import objective
from hpo.worker.signals import StopSignal
from tests.support import declared, user_loops
from tests.support.trials import MakeStudy

NAN, INF = math.nan, math.inf
#: The curves of pain 15, and those that no guard may end.
CURVES: dict[str, list[float]] = {
    "all NaN": [NAN] * 9,
    "good, then NaN": [1.0, 0.9, *[NAN] * 7],
    "good, then 1e6": [1.0, 0.9, *[1e6] * 7],
    "infinite": [INF] * 9,
    "at chance": [1.0] * 9,
    "a peak": [1.0, 0.9, 1e6, 1e6, *[0.8] * 5],
}
ENDS: dict[str, int | None] = {
    "all NaN": 3,
    "good, then NaN": 5,
    "good, then 1e6": 5,
    "infinite": 3,
    "at chance": None,
    "a peak": None,
}
#: Options that the pruners need to be built. `threshold` could otherwise end the curves by itself.
OPTIONS: dict[str, dict[str, Any]] = {
    "hyperband": {"max_resource": 9},
    "threshold": {"upper": 1e9},
    "patient": {"patience": 4},
}


def work(study: Study, *curves: Sequence[float], asks: bool) -> None:
    """Let trials of an objective report these curves, one each. It asks the pruner if it is to."""
    left = list(curves)

    def train(trial: optuna.Trial) -> float:
        curve = left.pop(0)
        for step, value in enumerate(curve, start=1):
            trial.report(value, step)
            if asks and trial.should_prune():
                raise optuna.TrialPruned
        return curve[-1]

    assert worker_loop.work(study, train, study.ledger("w"), StopSignal()) == 0


def ends(study: Study) -> list[tuple[str, str, int]]:
    """Return state, outcome and number of reports of each trial."""
    with study.storage.engine.connect() as connection:
        of_study = sa.select(hpo_trials.c.outcome).where(hpo_trials.c.study_uid == study.uid)
        outcomes = connection.execute(of_study.order_by(hpo_trials.c.trial_id)).scalars()
        trials = study.optuna.get_trials(deepcopy=False)
        return [
            (trial.state.name, str(outcome), len(trial.intermediate_values))
            for trial, outcome in zip(trials, outcomes, strict=True)
        ]


@pytest.mark.parametrize("name", PRUNERS)
def test_no_curve_that_diverges_goes_on_whatever_the_pruner(make_study: MakeStudy, name: str) -> None:
    silent = make_study(12, name="silent", pruner={"name": name, **OPTIONS.get(name, {})})
    asking = make_study(12, name="asking", pruner={"name": name, **OPTIONS.get(name, {})})
    work(silent, *[[1.0] * 9] * 6, *CURVES.values(), asks=False)
    work(asking, *[[1.0] * 9] * 6, *CURVES.values(), asks=True)
    wanted = [
        ("COMPLETE", "complete", 9) if (end := ENDS[one]) is None else ("PRUNED", "diverged", end) for one in CURVES
    ]
    assert ends(silent)[6:] == wanted
    for (state, outcome, reports), (_, kind, last) in zip(ends(asking)[6:], wanted, strict=True):
        assert reports <= last
        if kind == "diverged":  # the guard ends it where the pruner has not done so before
            assert (state, outcome) in [("PRUNED", "diverged"), ("PRUNED", "pruned")]
            assert outcome == "pruned" or reports == last


def test_the_state_and_the_reason_are_shown(make_study: MakeStudy) -> None:
    study = make_study(2)
    work(study, [1.0, 0.9, *[1e6] * 7], [NAN] * 9, asks=True)
    first, second = study.optuna.get_trials(deepcopy=False)
    assert (first.state, first.value) == (TrialState.PRUNED, 1e6)
    assert (second.state, second.value) == (TrialState.PRUNED, None)
    why = [
        "step 5: value 1e+06; 3 reports in a row are not finite or above 100 (failures.diverged)",
        "step 3: value nan; 3 reports in a row are not finite (failures.diverged)",
    ]
    assert [trial.user_attrs[DIVERGED_KEY] for trial in (first, second)] == why
    with study.storage.engine.connect() as connection:
        assert list(connection.execute(sa.select(hpo_trials.c.reason).order_by(hpo_trials.c.trial_id)).scalars()) == why
    (failure,) = summarize(study).failures
    assert (failure.kind, failure.count, failure.message) == ("diverged", 2, why[1])
    assert why[1] in pages.status_text(summarize(study))


def test_the_policy_decides_what_becomes_of_it(make_study: MakeStudy) -> None:
    failing = make_study(1, name="failing", failures={"diverged": {"then": "fail", "patience": 1}})
    work(failing, [1.0, 1e6, 1.0], asks=False)
    assert ends(failing) == [("FAIL", "diverged", 2)]
    off = make_study(1, name="off", failures={"diverged": {"patience": 0}})
    work(off, [1.0, *[1e6] * 8, 1.0], asks=False)
    assert ends(off) == [("COMPLETE", "complete", 10)]


def test_a_report_of_an_earlier_step_is_counted_in_its_place(make_study: MakeStudy) -> None:
    study = make_study(1)

    def train(trial: optuna.Trial) -> float:
        for step in (1, 5, 3, 4):
            trial.report(1.0 if step == 1 else 1e6, step)
        return 0.0

    worker_loop.work(study, train, study.ledger("w"), StopSignal())
    assert ends(study) == [("PRUNED", "diverged", 4)]


def test_an_objective_that_catches_exceptions_ends_too(make_study: MakeStudy) -> None:
    study = make_study(1)

    def train(trial: optuna.Trial) -> float:
        for step in range(1, 9):
            try:
                trial.report(NAN, step)
            except Exception:
                continue
        return 0.0

    worker_loop.work(study, train, study.ledger("w"), StopSignal())
    assert ends(study) == [("PRUNED", "diverged", 3)]


@pytest.mark.parametrize("killed_in", [3, 4, 5])
def test_a_trial_that_is_killed_amid_the_patience_ends_where_an_undisturbed_one_does(
    make_study: MakeStudy, tmp_path: Path, killed_in: int
) -> None:
    study = make_study(1, recovery=user_loops.EVERY_EPOCH)
    once = tmp_path / "once"

    def train(trial: optuna.Trial) -> float:
        state: dict[str, float] = {}
        for epoch in hpo.epochs(trial, 9, state=state):
            if epoch + 1 == killed_in and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            trial.report([1.0, 0.9, *[1e6] * 7][epoch], epoch)
        return 0.0

    assert user_loops.killed(study, train)
    assert not user_loops.killed(study, train)
    assert ends(study) == [("PRUNED", "diverged", 5)]


def test_a_program_is_ended(make_study: MakeStudy, tmp_path: Path) -> None:
    script = "for epoch in 1 2 3 4 5 6; do echo epoch $epoch loss nan; done; sleep 60"
    study = make_study(
        1,
        objective=None,
        command=["sh", "-c", script.replace("$epoch", "$epoch"), "script", "{x}"],
        space={"x": {"low": 0.0, "high": 1.0}},
        metric=r"epoch (?P<epoch>\d+) loss (?P<value>\S+)",
    )
    from hpo.own import training

    worker_loop.work(study, training.load(study.spec, tmp_path), study.ledger("w"), StopSignal())
    assert ends(study) == [("PRUNED", "diverged", 3)]


# --- declared trainings -----------------------------------------------------------------------------------------------

#: Its loss rises, and a factor of 1.01 calls that diverged.
RISING: dict[str, Any] = {
    **declared.DOCUMENT,
    "metric": "loss",
    "training": {"epochs": 8, "batch_size": 64},
    "schedule": {"name": "constant"},
    "optimizer": {"name": "sgd", "lr": {"low": 1.0, "high": 1.5}, "momentum": 0.9},
    "failures": {"diverged": {"factor": 1.01, "patience": 2}},
    "recovery": {"checkpoint_every": "0s"},
    "budget": {"trials": 4},
}


@pytest.mark.parametrize("executor", ["loop", "stack", "vmap"])
def test_a_declared_trial_is_ended_by_its_raw_curve(
    lite: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    choice = Choice(executor=executor, slots=1 if executor == "loop" else 4, why="the test says so")
    monkeypatch.setattr(objective, "choose", lambda *_, **__: choice)
    study = declared.made(lite, tmp_path, RISING)
    assert declared.work(study) == 0
    assert results.best(study, number=0)[0].receipt["executor"] == executor
    assert {end[:2] for end in ends(study)} == {("PRUNED", "diverged")}
    raw = [results.best(study, number=number)[0].curves["validation_loss"] for number in range(4)]
    assert [end[2] for end in ends(study)] == [len(curve) for curve in raw]
    for curve in raw:  # the two last epochs diverge, and no two before them
        assert [count for count in range(1, len(curve) + 1) if study.spec.guard.why(curve[:count])] == [len(curve)]
    values = [trial.value for trial in study.optuna.get_trials(deepcopy=False)]
    lowest = [min(trial.intermediate_values.values()) for trial in study.optuna.get_trials(deepcopy=False)]
    assert values == lowest  # by the rule "best" Optuna saw no rise


class AfterReports(StopSignal):
    """A request to stop after so many reports to a study."""

    def __init__(self, study: Study, reports: int) -> None:
        super().__init__()
        self._study = study
        self._reports = reports

    def __call__(self) -> bool:
        trials = self._study.optuna.get_trials(deepcopy=False)
        return sum(len(trial.intermediate_values) for trial in trials) >= self._reports


def test_a_declared_trial_that_is_parked_amid_the_patience_ends_where_an_undisturbed_one_does(
    lite: Storage, tmp_path: Path
) -> None:
    whole = declared.made(lite, tmp_path, {**RISING, "name": "whole", "budget": {"trials": 1}})
    declared.work(whole)
    parked = declared.made(lite, tmp_path, {**RISING, "name": "parked", "budget": {"trials": 1}})
    ((_, _, reports),) = ends(whole)
    declared.work(parked, AfterReports(parked, reports - 1))
    assert ends(parked) == [("RUNNING", "None", reports - 1)]
    declared.work(parked)
    assert ends(parked) == ends(whole) == [("PRUNED", "diverged", reports)]
