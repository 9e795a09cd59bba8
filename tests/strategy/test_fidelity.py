"""TPE by fidelity ranks as a slow reference does, whatever the order in which trials come, and herds no stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.storage import memory
from hpo.storage.optuna_storage import OptunaStorage
from hpo.strategy.fidelity import FidelityTPE, RungLook, RungRanking
from hpo.strategy.rungs import Ladder

MINIMIZE, MAXIMIZE = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
COMPLETE, PRUNED, FAIL, RUNNING, WAITING = (TrialState[n] for n in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"))
SPACE: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0), "epochs": IntDistribution(1, 27)}
PLAIN = Ladder(first=1, factor=3)
LADDERS = [PLAIN, Ladder(first=2, factor=4), Ladder(first=27 / 9, factor=3, rungs=2, length="epochs", longest=27)]

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def storage() -> OptunaStorage:
    return memory.storage()


def trial(x: float, state: TrialState, curve: Sequence[float] = (), *, epochs: int = 27, first: int = 1) -> FrozenTrial:
    """Return a trial that reported a curve at the steps from `first` on. A COMPLETE one has its last value, or 0.5."""
    value = (curve[-1] if curve else 0.5) if state == COMPLETE else None
    return create_trial(
        state=state,
        value=value,
        params={"x": x, "epochs": epochs},
        distributions=SPACE,
        intermediate_values=dict(enumerate(curve, start=first)),
    )


def drawn(seed: int, size: int) -> list[FrozenTrial]:
    """Return trials in all states with curves of all lengths, equal values and NaN among them."""
    draws = np.random.RandomState(seed)
    complete = [0.05, 0.5][seed % 2]
    rest = (1 - complete) * np.array([0.5, 0.1, 0.3, 0.1])
    found = []
    for _ in range(size):
        state = (COMPLETE, PRUNED, FAIL, RUNNING, WAITING)[draws.choice(5, p=[complete, *rest])]
        epochs = int(draws.randint(1, 28))
        steps = 0 if state == WAITING else int(draws.choice([0, 1, 2, 3, 8, 9, 27, epochs]))
        curve = [float(draws.choice([0.0, 0.25, 0.5, math.inf, math.nan, draws.rand()])) for _ in range(steps)]
        if curve and math.isnan(curve[-1]):
            curve[-1] = 1.0  # Optuna accepts no COMPLETE trial with NaN
        found.append(trial(draws.rand(), state, curve, epochs=epochs, first=int(draws.choice([0, 1, 2]))))
    return found


def fill(storage: OptunaStorage, trials: Sequence[FrozenTrial], direction: StudyDirection, order: int = 0) -> int:
    """Make a study of trials that ended in an order of their own. Return its id."""
    study_id = storage.create_new_study([direction])
    ids = []
    for one in trials:
        begun = create_trial(
            state=RUNNING if one.state.is_finished() else one.state,
            params=one.params,
            distributions=one.distributions,
            intermediate_values=one.intermediate_values,
        )
        ids.append(storage.create_new_trial(study_id, begun))
    for place in np.random.RandomState(order).permutation(len(trials)):
        if trials[place].state.is_finished():
            storage.set_trial_state_values(ids[place], trials[place].state, trials[place].values)
            storage.view(study_id)
    return study_id


def begin(
    storage: OptunaStorage, study_id: int, ladder: Ladder = PLAIN, seed: int = 0, **settings: Any
) -> optuna.Trial:
    sampler = FidelityTPE(ladder=ladder, seed=seed, multivariate=True, **settings)
    name = storage.get_study_name_from_id(study_id)
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    return optuna.Trial(study, storage.create_new_trial(study_id))


def suggest(begun: optuna.Trial) -> tuple[float, int]:
    return begun.suggest_float("x", 0.0, 1.0), begun.suggest_int("epochs", 1, 27)


def look(storage: OptunaStorage, study_id: int, ladder: Ladder, enough: int = 8) -> RungLook:
    study = optuna.load_study(study_name=storage.get_study_name_from_id(study_id), storage=storage)
    columns, rows = storage.view(study_id)
    running = sorted((row for row in rows if row.state == RUNNING), key=lambda row: row.number)
    found = FidelityTPE(ladder=ladder, enough=enough, multivariate=True).look_of(columns, running, study)
    assert isinstance(found, RungLook)
    return found


# --- the reference ----------------------------------------------------------------------------------------------------


def reference(
    trials: Sequence[FrozenTrial], direction: StudyDirection, ladder: Ladder, enough: int
) -> tuple[list[int], list[int], int]:
    """Return the numbers of the ranked trials, best first, those of the liars, and how many reached the rung."""
    counted = {n: one for n, one in enumerate(trials) if one.state in (COMPLETE, PRUNED, RUNNING)}

    def step_of(rung: int, one: FrozenTrial) -> int:
        share = one.params["epochs"] / ladder.longest if ladder.length else 1
        return max(1, math.ceil(ladder.first * ladder.factor**rung * share - 1e-9))

    def there(rung: int | None, one: FrozenTrial) -> float | None:
        """Return the value at a rung, None if the trial has not reached it."""
        if rung is not None:
            later = [step for step in sorted(one.intermediate_values) if step >= step_of(rung, one)]
            if later:
                return one.intermediate_values[later[0]]
        return one.value if one.state == COMPLETE else None

    def worse(value: float) -> float:
        return math.inf if math.isnan(value) else value if direction == MINIMIZE else -value

    furthest = max([one.last_step or 0 for one in counted.values()], default=0)
    rungs = [k for k in range(ladder.rungs or 9) if ladder.rungs or ladder.first * ladder.factor**k <= furthest]
    for rung in [None, *reversed(rungs), 0]:
        values = {n: there(rung, one) for n, one in counted.items()}
        reached = {n: value for n, value in values.items() if value is not None}
        if len(reached) >= enough:
            break
    best = sorted(reached, key=lambda n: (worse(reached[n]), n))
    others = [n for n, one in counted.items() if n not in reached and one.state == PRUNED]

    def last(n: int) -> tuple[float, float, int]:
        reported = counted[n].intermediate_values
        step = max(reported, default=-1)
        return -step, worse(reported.get(step, math.nan)), n

    liars = [n for n, one in counted.items() if n not in reached and one.state == RUNNING]
    return best + sorted(others, key=last), liars, len(reached)


@pytest.mark.parametrize("direction", [MINIMIZE, MAXIMIZE])
@pytest.mark.parametrize("seed", range(8))
def test_the_ranking_is_that_of_the_reference(storage: OptunaStorage, seed: int, direction: StudyDirection) -> None:
    ladder, enough = LADDERS[seed % 3], [8, 1, 3][seed // 3]
    trials = drawn(seed, [3, 40, 90][seed % 3])
    found = look(storage, fill(storage, trials, direction, seed), ladder, enough)
    ranked, liars, reached = reference(trials, direction, ladder, enough)
    assert (len(found), found.compared) == (len(ranked), reached)
    for good in range(len(ranked) + 1):
        sides = [sorted(ranked[:good]), sorted(ranked[good:] + liars)]
        for values, numbers in zip(found.good_and_bad(good, SPACE), sides, strict=True):
            assert values["x"].tolist() == [trials[number].params["x"] for number in numbers]


def test_the_rung_rises_with_the_trials_that_reached_it(storage: OptunaStorage) -> None:
    """Of 8 trials at step 3 the best one there is good, though another one got further."""
    study_id = storage.create_new_study([MINIMIZE])
    for number in range(7):
        storage.create_new_trial(study_id, trial(number / 10, PRUNED, [0.9, 0.9, 0.5 + number]))
    storage.create_new_trial(study_id, trial(0.99, COMPLETE, [0.9, 0.9, 0.9, 0.8]))
    storage.create_new_trial(study_id, trial(0.95, PRUNED, [0.1]))
    assert look(storage, study_id, PLAIN).good_and_bad(1, SPACE)[0]["x"].tolist() == [0.0]
    assert look(storage, study_id, PLAIN, enough=9).good_and_bad(1, SPACE)[0]["x"].tolist() == [0.95]


def test_running_trials_are_ranked_and_failed_ones_are_not(storage: OptunaStorage) -> None:
    """A RUNNING trial, parked or not, that is best at the rung is good, one below the rung is bad, a failed one neither."""
    study_id = storage.create_new_study([MINIMIZE])
    for number in range(8):
        storage.create_new_trial(study_id, trial(number / 10, PRUNED, [0.9] * 3))
    for x, state, curve in ((0.91, RUNNING, [0.1] * 3), (0.92, RUNNING, [0.0]), (0.93, FAIL, [0.0] * 9)):
        storage.create_new_trial(study_id, trial(x, state, curve))
    good, bad = look(storage, study_id, PLAIN).good_and_bad(1, SPACE)
    assert good["x"].tolist() == [0.91]
    assert bad["x"].tolist() == [*(number / 10 for number in range(8)), 0.92]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_trials_end_changes_no_suggestion(seed: int) -> None:
    trials = drawn(2 * seed + 1, 40)
    found = set()
    for order in range(3):
        storage = memory.storage()
        study_id = fill(storage, trials, MINIMIZE, order)
        found.add(suggest(begin(storage, study_id, seed=seed)))
    assert len(found) == 1


def test_the_trials_of_a_stack_avoid_each_other(storage: OptunaStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that are opened together rank the history once. Each counts those before it as bad, so none repeats another.

    A trial that is opened after another report ranks anew.
    """
    study_id = storage.create_new_study([MINIMIZE])
    draws = np.random.RandomState(0)
    for x in draws.rand(40):
        storage.create_new_trial(study_id, trial(x, PRUNED, [(x - 0.3) ** 2] * 3))
    begun = [begin(storage, study_id, seed=seed) for seed in range(8)]
    seen: list[int] = []
    values = RungLook.good_and_bad

    def noted(self: RungLook, good: int, space: Any) -> Any:
        seen.append(len(values(self, good, space)[1]["x"]))
        return values(self, good, space)

    rankings: list[int] = []
    rank = RungRanking.__init__

    def counted(self: RungRanking, *given: Any) -> None:
        rank(self, *given)
        rankings.append(self.reached)

    monkeypatch.setattr(RungLook, "good_and_bad", noted)
    monkeypatch.setattr(RungRanking, "__init__", counted)
    found = []
    with storage.snapshot(study_id):
        for one in begun:
            with storage.deferred_writes(one._trial_id):
                found.append(suggest(one))
    assert seen == [36 + before for before in range(8)]
    assert len(set(found)) == 8
    assert rankings == [40]
    for step in (1, 2, 3):
        storage.set_trial_intermediate_value(begun[0]._trial_id, step, 0.0)
    suggest(begin(storage, study_id, seed=8))
    assert rankings == [40, 41]


def test_an_objective_without_a_known_space_is_learnt(storage: OptunaStorage) -> None:
    """A space that is defined by run, with branches, is searched; most trials are in the better branch, at its better end."""
    study_id = storage.create_new_study([MINIMIZE])
    late = []
    for seed in range(50):
        begun = begin(storage, study_id, seed=seed, group=True)
        if begun.suggest_categorical("branch", ["a", "b"]) == "a":
            value = begun.suggest_float("y", 0.0, 1.0)
        else:
            value = 1.0 + begun.suggest_float("z", 0.0, 1.0)
        for step in range(1, 4):
            begun.report(value, step)
        storage.set_trial_state_values(begun._trial_id, PRUNED)
        late += [value] if seed >= 30 else []
    assert sum(value < 0.3 for value in late) >= 15
