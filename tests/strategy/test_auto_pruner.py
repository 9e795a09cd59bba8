"""The pruner `auto`: where its rungs lie, whom it compares there, and whom it spares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.spec.study_file import StudySpec
from hpo.storage import memory
from hpo.strategy import array_pruners, pruners
from hpo.strategy.auto_pruner import AutoPruner
from hpo.strategy.pareto_pruner import CostAwarePruner
from hpo.strategy.rungs import Ladder

EPOCHS = IntDistribution(1, 27)
RUNGS = Ladder(first=1, factor=3, rungs=3)
SHARES = Ladder(first=1, factor=3, rungs=3, length="epochs", longest=27)
CHOSEN = Ladder(first=1, factor=3, rungs=3, length="epochs", longest=27, choices=(27, 9))
TREE: dict[str, Any] = {"data": {"name": "d"}, "model": {"name": "m"}, "optimizer": {"name": "o", "lr": 0.1}}


def study_of(pruner: optuna.pruners.BasePruner) -> optuna.Study:
    return optuna.create_study(storage=memory.storage(), study_name="s", pruner=pruner)


def begin(study: optuna.Study, epochs: int = 27, distribution: BaseDistribution = EPOCHS) -> optuna.Trial:
    template = create_trial(state=TrialState.RUNNING, params={"epochs": epochs}, distributions={"epochs": distribution})
    return optuna.Trial(study, study._storage.create_new_trial(study._study_id, template))


def train(trial: optuna.Trial, curve: Sequence[float], *, ends: bool = True) -> int | None:
    """Report a curve. Return the epoch at which the trial is pruned, None if it never is."""
    for epoch, value in enumerate(curve, start=1):
        trial.report(value, epoch)
        if trial.should_prune():
            trial.study.tell(trial, state=TrialState.PRUNED)
            return epoch
    if ends:
        trial.study.tell(trial, curve[-1])
    return None


# --- where the rungs lie ----------------------------------------------------------------------------------------------


def spec(training: dict[str, Any], pruner: dict[str, Any] | None = None, **sections: Any) -> StudySpec:
    document = {"name": "s", "pruner": pruner or {"name": "auto"}, "training": training, **TREE, **sections}
    return pruners.resolve(StudySpec.from_document(document))


def ladder(training: dict[str, Any], pruner: dict[str, Any] | None = None, **sections: Any) -> Ladder:
    return pruners.ladder(spec(training, pruner, **sections))


def steps(found: Ladder, length: float = math.nan) -> list[int]:
    return [int(found.steps(rung, np.array([length]))[0]) for rung in found.up_to(1000)]


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"epochs": 27}, [1, 3, 9]),
        ({"epochs": 20}, [1, 3, 7]),
        ({"epochs": 100}, [2, 4, 12, 34]),
        ({"epochs": 1000}, [13, 38, 112, 334]),
        ({"epochs": 2}, [1]),
        ({"epochs": {"low": 5, "high": 27}}, [1, 3, 9]),
    ],
)
def test_the_rungs_are_thirds_of_the_epochs(training: dict[str, Any], expected: list[int]) -> None:
    assert steps(ladder(training)) == expected


def test_another_factor_and_an_own_objective() -> None:
    assert steps(ladder({"epochs": 64}, {"name": "auto", "reduction_factor": 4})) == [1, 4, 16]
    own = StudySpec.from_document(
        {"name": "s", "objective": "f.py:f", "direction": "minimize", "pruner": {"name": "auto"}}
    )
    assert steps(pruners.ladder(pruners.resolve(own))) == [1, 3, 9, 27, 81, 243, 729]


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        ({"name": "linear"}, [3, 9]),  # 0.05 of the schedule by default
        ({"name": "linear", "share": {"low": 0.0, "high": 0.2}}, [9]),
        ({"name": "linear", "epochs": 0.5}, [1, 3, 9]),
        ({"name": "linear", "epochs": {"low": 1, "high": 3}}, [9]),
    ],
)
def test_no_rung_lies_in_a_warm_up(warmup: dict[str, Any], expected: list[int]) -> None:
    assert steps(ladder({"epochs": 27}, warmup=warmup)) == expected


def test_rungs_are_shares_of_a_searched_length() -> None:
    found = ladder({"epochs": {"choices": [9, 27, 14]}})
    assert (found.length, found.longest, found.choices) == ("training.epochs", 27, (9, 27, 14))
    assert [steps(found, length) for length in (27, 14, 9)] == [[1, 3, 9], [1, 2, 5], [1, 1, 3]]
    assert ladder({"epochs": {"choices": [9, 18]}, "schedule_epochs": 27}).length is None
    assert steps(ladder({"epochs": {"choices": [9, 18]}, "schedule_epochs": 27})) == [1, 3, 9]


def test_other_pruners_have_their_own_rungs() -> None:
    assert steps(ladder({"epochs": 27}, {"name": "median"}))[:4] == [1, 3, 9, 27]
    halving = {"name": "successive_halving", "min_resource": 2, "reduction_factor": 4, "min_early_stopping_rate": 1}
    assert steps(ladder({"epochs": 27}, halving))[:3] == [8, 32, 128]


# --- who is compared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (1, 2))])
def test_with_equal_lengths_it_decides_as_successive_halving(seed: int) -> None:
    """Trials side by side in any order, whose last epoch is not judged, as in a worker."""
    draws = np.random.RandomState(seed)
    curves = draws.choice(np.arange(12) / 12, size=(60, 27))
    studies = [study_of(AutoPruner(RUNGS, explore=0)), study_of(array_pruners.SuccessiveHalving(1, 3, 0))]
    running: dict[int, int] = {}  # epochs by number
    decisions: list[list[Any]] = [[], []]
    trials = [[begin(study) for _ in curves] for study in studies]
    waiting = list(range(60))
    while waiting or running:
        if waiting and len(running) < 8:
            running[waiting.pop(0)] = 0
        number = int(draws.choice(list(running)))
        running[number] += 1
        epoch = running[number]
        verdicts = []
        for study, of_study in zip(studies, trials, strict=True):
            of_study[number].report(curves[number, epoch - 1], epoch)
            verdicts.append(epoch < 27 and of_study[number].should_prune())
            if verdicts[-1] or epoch == 27:
                state = TrialState.PRUNED if verdicts[-1] else TrialState.COMPLETE
                value = None if verdicts[-1] else float(curves[number, -1])
                study.tell(of_study[number], value, state)
        for log, verdict in zip(decisions, verdicts, strict=True):
            log.append((number, epoch, verdict))
        if verdicts[0] or epoch == 27:
            del running[number]
    assert decisions[0] == decisions[1]
    assert sum(verdict for *_, verdict in decisions[0]) > 30


@pytest.mark.parametrize(("ladder", "kind"), [(SHARES, EPOCHS), (CHOSEN, CategoricalDistribution((27, 9)))])
def test_trials_of_unequal_length_are_compared_at_equal_shares(ladder: Ladder, kind: BaseDistribution) -> None:
    """At a third of its 9 epochs a trial meets those of 27 epochs at their epoch 9. At first those that ran then meet it."""
    study = study_of(AutoPruner(ladder, explore=0))
    running = [begin(study, 27, kind) for _ in range(3)]
    for trial in running[:2]:
        train(trial, [0.9] * 8 + [0.5] * 19)
    train(running[2], [0.9] * 8 + [0.5], ends=False)
    assert train(begin(study, 9, kind), [0.9, 0.9, 0.6] + [0.1] * 6) == 3
    assert train(begin(study, 9, kind), [0.9, 0.9, 0.5] + [0.6] * 6) is None


def test_a_trial_that_stopped_early_counts_at_later_rungs_by_its_value() -> None:
    curve = [0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    study = study_of(AutoPruner(RUNGS, explore=0))
    train(begin(study), [0.9, 0.2])  # by a stopping rule
    assert train(begin(study), curve, ends=False) == 3
    assert train(begin(study_of(AutoPruner(RUNGS, explore=0))), curve) is None


def reference(trials: list[dict[str, Any]], number: int, explore: int) -> bool:
    """Return whether `auto` prunes a trial after its last report, from four rules of fairness. Lower is better.

    1. A rung is a share of a trial's own length: 1/27, 1/9 and 1/3, rounded up. A trial is judged once at each rung.
    2. It is compared with all that have reached the rung, each by its first value at or after its own step there.
    3. A trial that stopped early has reached every rung, by its final value where it has no report.
    4. One trial in `explore` is never pruned.
    """
    own = trials[number]
    if number % explore == explore - 1:
        return False
    for share in (27, 9, 3):
        if max(math.ceil(own["length"] / share), 1) != len(own["curve"]):  # reports are at the steps 1, 2, 3 ...
            continue
        values = []
        for other in trials:
            step = max(math.ceil(other["length"] / share), 1)
            if len(other["curve"]) >= step:
                values.append(other["curve"][step - 1])
            elif other["is_complete"]:
                values.append(other["curve"][-1])
        kept = sorted(values)[: max(len(values) // 3, 1)]
        if own["curve"][-1] > kept[-1]:
            return True
    return False


@pytest.mark.parametrize("seed", range(3))
def test_decisions_follow_four_rules_of_fairness(seed: int) -> None:
    """Trials of 9, 14 and 27 epochs run side by side. Some stop early, and one in 9 is never pruned."""
    draws = np.random.RandomState(seed)
    study = study_of(AutoPruner(SHARES, explore=9))
    trials: list[dict[str, Any]] = []
    live: list[optuna.Trial] = []
    open_, states = [], {"pruned": 0, "early": 0, "spared": 0}
    while len(trials) < 90 or open_:
        if len(trials) < 90 and len(open_) < 6:
            length = int(draws.choice([9, 14, 27]))
            trials.append({"length": length, "curve": [], "is_complete": False})
            live.append(begin(study, length))
            open_.append(len(trials) - 1)
        number = int(draws.choice(open_))
        one, trial = trials[number], live[number]
        one["curve"].append(float(draws.randint(20)))
        trial.report(one["curve"][-1], len(one["curve"]))
        is_early = draws.rand() < 0.05
        if is_early or len(one["curve"]) == one["length"]:  # as in a worker, the pruner is not asked about its end
            study.tell(trial, one["curve"][-1])
            one["is_complete"] = True
            open_.remove(number)
            states["early"] += is_early
            states["spared"] += number % 9 == 8
            continue
        verdict = trial.should_prune()
        assert verdict == reference(trials, number, 9), (number, one)
        if verdict:
            study.tell(trial, state=TrialState.PRUNED)
            open_.remove(number)
            states["pruned"] += 1
    assert states["pruned"] > 30
    assert states["early"] > 5
    assert states["spared"] == 10  # all of them ended


def test_one_trial_in_so_many_is_never_pruned() -> None:
    study = study_of(AutoPruner(RUNGS, explore=4))
    train(begin(study), [0.0] * 27)
    assert [train(begin(study), [place / 10] * 27) for place in range(1, 8)] == [1, 1, None, 1, 1, 1, None]


def test_as_many_are_spared_as_reach_the_end_by_merit() -> None:
    built = pruners.build(spec({"epochs": 27}))
    assert isinstance(built, AutoPruner)
    assert built.explore == 27


def test_a_value_that_is_no_number_is_pruned_and_no_bar_for_others() -> None:
    study = study_of(AutoPruner(RUNGS, explore=0))
    assert train(begin(study), [math.nan] * 3) == 1
    assert train(begin(study), [0.9] * 27) is None


def test_trials_that_report_together_are_decided_in_any_order() -> None:
    """Each of 9 trials meets all the others, and one decided again from the storage gets no second verdict."""
    for order in (range(9), reversed(range(9))):
        study = study_of(AutoPruner(RUNGS, explore=0))
        trials = [begin(study) for _ in range(9)]
        for place, trial in enumerate(trials):
            trial.report(place / 10, 1)
        frozen: list[FrozenTrial] = [study.get_trials()[place] for place in order]
        decisions = array_pruners.decide(study, frozen)
        assert sorted(one.number for one, is_pruned in zip(frozen, decisions, strict=True) if not is_pruned) == [
            0,
            1,
            2,
        ]
        assert array_pruners.decide(study, study.get_trials()) == [False] * 9


def test_steps_that_were_skipped_are_judged_at_the_next_question() -> None:
    """An own objective may report often and ask seldom."""
    study = study_of(AutoPruner(Ladder(first=1, factor=3), explore=0))
    train(begin(study), [0.1, 0.1, 0.1])
    asked = begin(study)
    for step in range(1, 6):
        asked.report(0.2, step)
    assert asked.should_prune()


def test_with_costs_it_is_successive_halving_among_comparable_trials() -> None:
    found = spec({"epochs": 20}, metric="loss", objectives={"loss": "minimize", "params": "minimize"})
    assert isinstance(pruners.build(found), CostAwarePruner)
