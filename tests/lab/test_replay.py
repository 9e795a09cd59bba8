"""A replay decides as the live study did: the same pruner, the same sampler, on what really happened."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hpo.lab import plan as plans
from hpo.lab import recording, replay
from hpo.lab.plan import Plan
from hpo.lab.replay import TrialEnd
from hpo.lab.table import Ending, Table
from hpo.spec import seeds
from hpo.storage.connect import Storage
from hpo.study.study import Study
from hpo.worker import loop as worker_loop
from hpo.worker.signals import StopSignal
from tests.support import declared
from tests.support.tables import DECLARED, OWN, falling, row, table
from tests.support.trials import MakeStudy

EPOCHS = 9
PRUNERS: dict[str, dict[str, Any]] = {
    "none": {},
    "median": {"n_startup_trials": 3},
    "percentile": {"percentile": 40.0, "n_warmup_steps": 2, "interval_steps": 2},
    "successive_halving": {"reduction_factor": 2},
    "hyperband": {"max_resource": EPOCHS},
    "patient": {"patience": 2, "wrapped": "median"},
    "threshold": {"upper": 1.5},
    "auto": {"explore": 5},
}


def train(trial: optuna.Trial) -> float:
    """Train one of two made-up models, whose curves cross."""
    rate = trial.suggest_float("rate", 1e-3, 1.0, log=True)
    bumpy = trial.suggest_categorical("model", ["smooth", "bumpy"]) == "bumpy"
    width = trial.suggest_int("width", 1, 8) if bumpy else 0
    value = 0.0
    for epoch in range(1, EPOCHS + 1):
        value = abs(math.log(rate) + 3) * (1 / epoch + 0.1) + (0.3 * math.sin(width * epoch) if bumpy else 0.0)
        trial.report(value, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return value


def train_or_fail(trial: optuna.Trial) -> float:
    """Train. Every eleventh trial fails at its end."""
    value = train(trial)
    if trial.number % 11 == 7:
        raise RuntimeError("fails at its end")
    return value


def work(study: Study, objective: Callable[[optuna.Trial], float] = train_or_fail) -> Table:
    """Let one worker run a study, and return its table."""
    assert worker_loop.work(study, objective, study.ledger("w"), StopSignal()) == 0
    return recording.record(study)


def lived(study: Study) -> list[tuple[TrialState, int]]:
    """Return the state and the epochs of each trial."""
    return [(trial.state, len(trial.intermediate_values)) for trial in study.optuna.get_trials(deepcopy=False)]


def replayed(plan: Plan, seed: int = 0) -> list[tuple[TrialState, int]]:
    ends = sorted(replay.run(plan, seed).ends, key=lambda end: end.number)
    return [(end.state, end.epochs) for end in ends]


def plan_of(found: Table, pruner: str, options: dict[str, Any]) -> Plan:
    settings = [f"pruner.{key}={value}" for key, value in options.items()]
    return plans.make(found, sampler=plans.RECORDED, pruner=pruner, settings=settings, workers=1)


@pytest.fixture
def storage_kind() -> str:
    return "sqlite"


@pytest.mark.parametrize("pruner", PRUNERS)
def test_the_recorded_order_and_pruner_give_the_live_decisions(make_study: MakeStudy, pruner: str) -> None:
    """From the curves that this pruner has cut off, and from the whole curves of the same trials."""
    pruned = make_study(trials=30, pruner={"name": pruner, **PRUNERS[pruner]}, failures={"in_a_row": 99})
    of_pruned = work(pruned)
    whole = work(make_study(trials=30, name="whole", failures={"in_a_row": 99}))
    states = {state for state, _ in lived(pruned)}
    assert (TrialState.COMPLETE in states, TrialState.PRUNED in states) == (True, pruner != "none")
    assert replayed(plan_of(of_pruned, pruner, PRUNERS[pruner])) == lived(pruned)
    same_name = dataclasses.replace(whole, document={**whole.document, "name": pruned.name})  # Hyperband's brackets
    assert replayed(plan_of(same_name, pruner, PRUNERS[pruner])) == lived(pruned)


def test_a_declared_study_gives_its_live_decisions(lite: Storage, tmp_path: Path) -> None:
    """Some of its trials diverge. The pruner is not asked about these, nor about trials that have just trained to their end."""
    optimizer = {"name": "sgd", "lr": {"choices": [0.01, 0.1, 1e30]}, "momentum": {"low": 0.0, "high": 0.9}}
    changes = {"optimizer": optimizer, "pruner": {"name": "successive_halving"}, "sampler": {"name": "tpe"}}
    live = declared.made(lite, tmp_path, declared.DOCUMENT | changes | {"budget": {"trials": 16}})
    assert declared.work(live) == 0
    found = recording.record(live)
    assert {one.ending for one in found.rows} == {Ending.COMPLETE, Ending.DIVERGED, Ending.CUT}
    assert replayed(plan_of(found, "successive_halving", {})) == lived(live)


@pytest.mark.parametrize("sampler", ["tpe", "fidelity_tpe", "random", "qmc"])
def test_a_sampler_proposes_the_trials_of_its_own_study_again(make_study: MakeStudy, sampler: str) -> None:
    """One worker and the same seed: each proposal is a recorded trial bit for bit, in the recorded order."""
    settings = {"name": sampler} | ({"n_startup_trials": 5, "group": True} if "tpe" in sampler else {})
    found = work(make_study(trials=25, sampler=settings, seed=seeds.derive(0, "replay")), train)
    options = [f"sampler.{key}={str(value).lower()}" for key, value in settings.items() if key != "name"]
    course = replay.run(plans.make(found, sampler=sampler, pruner="none", settings=options, workers=1), 0)
    assert [end.number for end in course.ends] == list(range(25))
    assert (course.distances, course.strays) == ([0.0] * 25, 0)


# --- stacks -----------------------------------------------------------------------------------------------------------

SEVERAL = {"name": "mlp", "widths": {"choices": [[8], [6], [5]]}, "dropout": {"low": 0.0, "high": 0.5}}


def stacked(place: Storage, folder: Path, **changes: Any) -> Study:
    """Let one worker run a declared study in stacks of 4, whose trials end at different epochs."""
    own = {"executor": "stack", "slots": 4, "budget": {"trials": 24}}
    training = {"epochs": {"choices": [2, 3, 5]}, "batch_size": 64}
    study = declared.made(place, folder, declared.DOCUMENT | own | {"training": training} | changes)
    assert declared.work(study) == 0
    return study


@pytest.mark.parametrize(("pruner", "keys", "changes"), [("median", 1, {}), ("auto", 3, {"model": SEVERAL, "seed": 1})])
def test_a_stack_gives_its_live_decisions(
    lite: Storage, tmp_path: Path, pruner: str, keys: int, changes: dict[str, Any]
) -> None:
    """Trials of several architectures wait for each other. One after the other, some trials end otherwise."""
    live = stacked(lite, tmp_path, pruner={"name": pruner}, **changes)
    found = recording.record(live)
    assert {one.ending for one in found.rows} == {Ending.COMPLETE, Ending.CUT}
    assert len({one.stack_key for one in found.rows}) == keys
    planned = plans.make(found, sampler=plans.RECORDED, pruner=pruner, workers=1, slots=4)
    assert replayed(planned) == lived(live)
    assert replayed(dataclasses.replace(planned, slots=1)) != lived(live)


def test_a_sampler_proposes_the_trials_of_its_own_stacks_again(lite: Storage, tmp_path: Path) -> None:
    sampler = {"name": "fidelity_tpe", "n_startup_trials": 5}
    live = stacked(lite, tmp_path, model=SEVERAL, sampler=sampler, seed=seeds.derive(0, "replay"))
    options = ["sampler.n_startup_trials=5"]
    planned = plans.make(
        recording.record(live), sampler="fidelity_tpe", pruner="none", settings=options, workers=1, slots=4
    )
    course = replay.run(planned, 0)
    ended = sorted(live.optuna.get_trials(deepcopy=False), key=lambda trial: trial.datetime_complete or trial.number)
    assert [end.number for end in course.ends] == [trial.number for trial in ended]
    assert (course.distances, course.strays) == ([0.0] * 24, 0)


def test_the_trials_of_a_stack_report_together_and_the_slowest_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SPEEDS", (2.0, 2.0))
    rows = row(0, [9.0, 8.0]), row(1, [7.0, 6.0, 5.0], seconds=4.0), row(2, [3.0, 2.0]), row(3, [4.0])
    planned = plans.make(table(*rows, document=DECLARED), sampler="recorded", pruner="none", workers=1, slots=2)
    course = replay.run(planned, 0)
    assert [(end.number, end.epochs) for end in course.ends] == [(0, 2), (1, 3), (2, 2), (3, 1)]
    # Trials 0 and 1 train two epochs, then 1 and 2, then 2 and 3.
    assert (course.epochs, course.seconds) == (8, 3 * 4.0 / 2 + 1.0 / 2)
    assert [(moment.epochs, moment.seconds, moment.value) for moment in course.bests] == [
        (2, 2.0, 9.0),
        (2, 2.0, 7.0),
        (4, 4.0, 6.0),
        (6, 6.0, 5.0),
        (6, 6.0, 3.0),
        (8, 6.5, 2.0),
    ]


def test_the_pruner_decides_on_a_stack_at_once() -> None:
    """Both enter the first rung before one is judged. One after the other, each is the best so far."""
    found = table(row(0, [9.0] * 4), row(1, [8.0] * 4), document=DECLARED)
    planned = plans.make(found, sampler="recorded", pruner="successive_halving", workers=1, slots=2)
    assert replayed(planned) == [(TrialState.PRUNED, 1), (TrialState.COMPLETE, 4)]
    assert replayed(dataclasses.replace(planned, slots=1)) == [(TrialState.COMPLETE, 4)] * 2


def test_trials_of_another_stack_key_wait_and_at_most_as_many_as_there_are_slots() -> None:
    """Trials 1, 3 and 4 wait for the first stack, which has a free place then. So trial 6 begins with the second stack."""
    keys = ["a", "b", "a", "b", "c", "a", "b", "a"]
    rows = [row(number, [1.0, 1.0], stack_key=key) for number, key in enumerate(keys)]
    planned = plans.make(table(*rows, document=DECLARED), sampler="recorded", pruner="none", workers=1, slots=3)
    assert [end.number for end in replay.run(planned, 0).ends] == [0, 2, 1, 3, 6, 4, 5, 7]


def test_a_stack_trains_no_epoch_beyond_the_budget() -> None:
    found = table(*falling(12), document=DECLARED)
    planned = plans.make(found, sampler="random", pruner="none", workers=2, slots=4, epochs=18)
    assert [replay.run(planned, seed).epochs for seed in range(3)] == [16, 16, 16]


def test_a_grid_ends_after_its_last_point_in_a_stack_too() -> None:
    found = table(*falling(9), document={**DECLARED, "optimizer": {"name": "sgd", "lr": {"choices": [0.1, 0.2, 0.3]}}})
    planned = plans.make(found, sampler="grid", pruner="none", workers=2, slots=2, epochs=1000)
    assert len(replay.run(planned, 0).ends) == 3


# --- workers and time -------------------------------------------------------------------------------------------------


def test_each_worker_trains_one_trial_and_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SPEEDS", (1.0, 1.0))
    course = replay.run(plans.make(table(*falling(5)), sampler="recorded", pruner="none", workers=2), 0)
    assert (course.epochs, course.seconds) == (20, 12.0)  # trials 0 and 1, 2 and 3, then 4 alone
    assert [end.number for end in course.ends] == [0, 1, 2, 3, 4]
    assert [(moment.epochs, moment.seconds, moment.value) for moment in course.bests] == [
        (1, 1.0, 100.0),
        (3, 2.0, 99.0),
        (5, 3.0, 98.0),
        (7, 4.0, 97.0),
    ]


def test_a_slower_row_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SPEEDS", (2.0, 2.0))
    slow = row(0, [3.0, 2.0], seconds=5.0)
    course = replay.run(plans.make(table(slow, row(1, [3.0, 1.0])), sampler="recorded", pruner="none", workers=2), 0)
    assert (course.seconds, [end.number for end in course.ends]) == (5.0, [1, 0])


def test_workers_have_speeds_of_their_own_by_the_seed() -> None:
    plan = plans.make(table(*falling(40)), sampler="recorded", pruner="none", workers=3)
    seconds = [replay.run(plan, seed).seconds for seed in (1, 1, 2)]
    assert seconds[0] == seconds[1] != seconds[2]


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "nsga2", "qmc"])
def test_a_sampler_uses_each_row_once_until_the_budget_or_the_rows_are_spent(sampler: str) -> None:
    plan = plans.make(table(*falling(12)), sampler=sampler, pruner="none", workers=3, epochs=30)
    course = replay.run(plan, 0)
    assert course.epochs == 30
    ended = [end.number for end in replay.run(dataclasses.replace(plan, epochs=1000), 0).ends]
    assert sorted(ended) == list(range(12))


def test_a_grid_ends_the_replay_after_its_last_point() -> None:
    found = table(*falling(9), document={**DECLARED, "optimizer": {"name": "sgd", "lr": {"choices": [0.1, 0.2, 0.3]}}})
    course = replay.run(plans.make(found, sampler="grid", pruner="none", workers=1, epochs=1000), 0)
    assert (len(course.ends), course.strays) == (3, 3)  # the rows have another parameter


# --- ends -------------------------------------------------------------------------------------------------------------

THRESHOLD = ["pruner.upper=5"]


def ends(found: Table, *settings: str, pruner: str = "none") -> list[TrialEnd]:
    plan = plans.make(found, sampler="recorded", pruner=pruner, settings=settings, workers=1)
    return replay.run(plan, 0).ends


def test_a_cut_curve_is_unknown_beyond_its_end() -> None:
    found = table(row(0, [4.0, 4.0]), row(1, [4.0], Ending.CUT), row(2, [4.0, 9.0], Ending.CUT))
    assert [(end.state.name, end.epochs, end.is_unknown) for end in ends(found, *THRESHOLD, pruner="threshold")] == [
        ("COMPLETE", 2, False),
        ("PRUNED", 1, True),
        ("PRUNED", 2, False),  # the pruner ends it where it was cut
    ]


def test_trials_end_as_they_did_where_no_pruner_ends_them() -> None:
    found = table(
        row(0, [1.0]),
        row(1, [1.0, math.nan], Ending.DIVERGED),
        row(2, [], Ending.FAILED),
        row(3, [1.0], Ending.FAILED),
        row(4, [], Ending.DIVERGED),
    )
    assert [(end.state.name, end.epochs, end.is_unknown) for end in ends(found)] == [
        ("COMPLETE", 1, False),
        ("PRUNED", 2, False),
        ("FAIL", 0, False),
        ("FAIL", 1, False),
        ("PRUNED", 0, False),
    ]


def test_a_declared_trial_that_has_ended_is_not_judged() -> None:
    """A worker does not ask the pruner about it. An objective of the user's own asks after its last report, too."""
    rows = row(0, [4.0, 9.0]), row(1, [9.0, 4.0])
    assert [end.state.name for end in ends(table(*rows), *THRESHOLD, pruner="threshold")] == ["PRUNED", "PRUNED"]
    of_declared = ends(table(*rows, document=DECLARED), *THRESHOLD, pruner="threshold")
    assert [end.state.name for end in of_declared] == ["COMPLETE", "PRUNED"]


# --- the divergence guard ---------------------------------------------------------------------------------------------

EXPLODING = [
    row(0, [1.0] * 6),
    row(1, [1.0, *[1e6] * 5]),
    row(2, [1.0, 1.0, math.nan, math.nan], Ending.DIVERGED),
    row(3, [1.0] * 6, raw=(1.0, *[1e6] * 5)),  # by the rule "best" the pruner saw no rise
]


def guarded(*settings: str) -> list[tuple[str, int, bool]]:
    found = plans.make(table(*EXPLODING), sampler="recorded", pruner="none", settings=settings, workers=1)
    return [(end.state.name, end.epochs, end.is_diverged) for end in replay.run(found, 0).ends]


def test_the_guard_is_replayed_if_the_study_had_it_or_if_it_is_named() -> None:
    whole = ("COMPLETE", 6, False)
    assert guarded() == [whole, whole, ("PRUNED", 4, True), whole]  # a table from before the guard
    assert guarded("failures.diverged.patience=3") == [
        whole,
        ("PRUNED", 4, True),
        ("PRUNED", 4, True),
        ("PRUNED", 4, True),
    ]
    assert guarded("failures.diverged.patience=2", "failures.diverged.factor=1e7") == [
        whole,
        whole,
        ("PRUNED", 4, True),
        whole,
    ]


def test_a_curve_that_the_study_s_guard_cut_off_is_unknown_beyond_its_end() -> None:
    by_guard = row(0, [1.0, *[1e6] * 3], Ending.DIVERGED)
    found = table(
        by_guard,
        row(1, [1.0, math.nan], Ending.DIVERGED),
        document={**OWN, "failures": {"diverged": {"patience": 3}}},
    )
    same, patient = (
        [(end.epochs, end.is_unknown) for end in ends(found, *settings)]
        for settings in ((), ("failures.diverged.patience=4",))
    )
    assert (same, patient) == ([(4, False), (2, False)], [(4, True), (2, False)])


def test_a_study_s_guard_gives_its_live_decisions(make_study: MakeStudy) -> None:
    study = make_study(6, value="best", pruner={"name": "successive_halving", "reduction_factor": 2})

    def explode(trial: optuna.Trial) -> float:
        trial.suggest_float("rate", 0.0, 1.0)
        loss = 9.0 if trial.number == 4 else 1 / (trial.number + 1)  # ever better, but for one
        for epoch in range(1, EPOCHS + 1):
            huge = math.nan if trial.number == 5 else 1e6  # the pruner sees neither
            trial.report(huge if trial.number % 2 and epoch > 3 else loss, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss

    assert worker_loop.work(study, explode, study.ledger("w"), StopSignal()) == 0
    recorded = recording.record(study)
    assert recorded.spec.guard == study.spec.guard
    assert recorded.rows[5].told[3:] == pytest.approx([math.nan] * 3, nan_ok=True)
    assert [row.ending for row in recorded.rows] == [
        *(Ending.COMPLETE, Ending.DIVERGED) * 2,
        *(Ending.CUT, Ending.DIVERGED),
    ]
    again = plans.make(
        recorded, sampler="recorded", pruner="successive_halving", settings=["pruner.reduction_factor=2"], workers=1
    )
    assert [(end.state, end.epochs) for end in replay.run(again, 0).ends] == [
        (trial.state, len(trial.intermediate_values)) for trial in study.optuna.trials
    ]
