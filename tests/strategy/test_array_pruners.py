"""Pruners over columns: each decides next to Optuna's own, whose study is in memory, on random histories.

A `Pair` of studies goes through the same events. At each report both pruners are asked, ours in one of two processes that
learn of the history bit by bit: the decisions must be the same, and what is written down about the trials.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from optuna.pruners import BasePruner
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.queue import cut_back
from hpo.storage import sql
from hpo.storage.connect import connect
from hpo.storage.finished_trials import RUNG_PREFIX
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.tables import intermediate_values, trial_system_attributes
from hpo.strategy import pruners
from hpo.strategy.array_pruners import Brackets, Hyperband, Median, Percentile, SuccessiveHalving, decide
from tests.support import emptied

Own = Callable[[], BasePruner]
ENDS = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]

# Ours, Optuna's, and what both are made with.
PRUNERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "median": (Median, optuna.pruners.MedianPruner, {"n_startup_trials": 2}),
    "median at once": (Median, optuna.pruners.MedianPruner, {"n_startup_trials": 0}),
    "median, seldom": (
        Median,
        optuna.pruners.MedianPruner,
        {"n_startup_trials": 1, "n_warmup_steps": 2, "interval_steps": 3, "n_min_trials": 3},
    ),
    "best": (Percentile, optuna.pruners.PercentilePruner, {"percentile": 0.0, "n_startup_trials": 0}),
    "quarter": (Percentile, optuna.pruners.PercentilePruner, {"percentile": 25.0, "n_min_trials": 2}),
    "most": (Percentile, optuna.pruners.PercentilePruner, {"percentile": 87.5, "interval_steps": 2}),
    "all": (Percentile, optuna.pruners.PercentilePruner, {"percentile": 100.0, "n_startup_trials": 3}),
    "halving": (SuccessiveHalving, optuna.pruners.SuccessiveHalvingPruner, {"min_resource": 1, "reduction_factor": 2}),
    "halving late": (
        SuccessiveHalving,
        optuna.pruners.SuccessiveHalvingPruner,
        {"min_resource": 2, "reduction_factor": 3, "min_early_stopping_rate": 1},
    ),
    "halving after four": (
        SuccessiveHalving,
        optuna.pruners.SuccessiveHalvingPruner,
        {"min_resource": 1, "reduction_factor": 2, "bootstrap_count": 4},
    ),
    "halving by itself": (SuccessiveHalving, optuna.pruners.SuccessiveHalvingPruner, {"min_resource": "auto"}),
    "hyperband": (
        Hyperband,
        optuna.pruners.HyperbandPruner,
        {"min_resource": 1, "max_resource": 9, "reduction_factor": 2},
    ),
    "hyperband of three": (Hyperband, optuna.pruners.HyperbandPruner, {"max_resource": 9, "bootstrap_count": 2}),
    "hyperband by itself": (Hyperband, optuna.pruners.HyperbandPruner, {"reduction_factor": 2}),
}


@pytest.fixture(scope="module")
def database(template: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return emptied.sqlite_copy(template, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def processes(database: str) -> Iterator[list[OptunaStorage]]:
    """The storages of two processes on one database, which all tests share."""
    opened = [connect(database) for _ in range(2)]
    yield [place.optuna for place in opened]
    for place in opened:
        place.close()


class Pair:
    """A study in our storage, open in several processes, and its copy in memory with Optuna's pruner."""

    def __init__(
        self, processes: list[OptunaStorage], name: str, direction: str, ours: Own, optunas: Own, *, lazy: bool = False
    ) -> None:
        self.copy = optuna.create_study(study_name=name, direction=direction, pruner=optunas())
        assert isinstance(self.copy._storage, InMemoryStorage)
        self.memory = self.copy._storage
        self.study_id = processes[0].create_new_study([StudyDirection[direction.upper()]], name)
        self.studies = [optuna.load_study(study_name=name, storage=place, pruner=ours()) for place in processes]
        self.writing = processes[0]
        self.ids: dict[int, int] = {}  # in our storage, by those in memory
        self.lazy = lazy
        self.decisions: list[bool] = []

    @property
    def running(self) -> list[int]:
        return [trial._trial_id for trial in self.copy.get_trials(deepcopy=False, states=(TrialState.RUNNING,))]

    def add(self, template: FrozenTrial | None = None) -> int:
        trial_id = self.memory.create_new_trial(self.copy._study_id, template)
        self.ids[trial_id] = self.writing.create_new_trial(self.study_id, template)
        return trial_id

    def begin(self, trial_id: int) -> None:
        self.memory.set_trial_state_values(trial_id, TrialState.RUNNING)
        self.writing.set_trial_state_values(self.ids[trial_id], TrialState.RUNNING)

    def report(self, trial_id: int, step: int, value: float) -> None:
        self.memory.set_trial_intermediate_value(trial_id, step, value)
        self.writing.set_trial_intermediate_value(self.ids[trial_id], step, value)

    def end(self, trial_id: int, state: TrialState, value: float) -> None:
        values = [value] if state == TrialState.COMPLETE else None
        self.memory.set_trial_state_values(trial_id, state, values)
        self.writing.set_trial_state_values(self.ids[trial_id], state, values)

    def cut_back(self, trial_id: int, epoch: int, kept: dict[str, Any]) -> None:
        """Do as `queue.cut_back` does: another attempt goes on from an earlier checkpoint."""
        in_memory = self.memory._get_trial(trial_id)
        in_memory.intermediate_values = {s: v for s, v in in_memory.intermediate_values.items() if s <= epoch}
        in_memory.system_attrs = dict(kept)
        ours, points, marks = self.ids[trial_id], intermediate_values.c, trial_system_attributes
        with sql.writing(self.writing.engine) as connection:
            connection.execute(intermediate_values.delete().where(points.trial_id == ours, points.step > epoch))
            connection.execute(marks.delete().where(marks.c.trial_id == ours))
            for key, value in kept.items():
                connection.execute(marks.insert().values(trial_id=ours, key=key, value_json=json.dumps(value)))

    def seen(self, trial_id: int, process: int = 0) -> FrozenTrial:
        """Return a trial as our pruners are shown it; with `lazy`, as `optuna.Trial` shows it."""
        study = self.studies[process]
        if self.lazy:
            return optuna.trial.Trial(study, self.ids[trial_id])._get_latest_trial()
        return study._storage.get_trial(self.ids[trial_id])

    def ask(self, trial_id: int, process: int = 0) -> None:
        """Ask both pruners, and hold the one against the other."""
        with warnings.catch_warnings(action="ignore"):  # numpy's, of nothing but NaN
            wanted = bool(self.copy.pruner.prune(self.copy, self.memory.get_trial(trial_id)))
        study = self.studies[process]
        assert study.pruner.prune(study, self.seen(trial_id, process)) is wanted
        written = self.writing.get_trial_system_attrs(self.ids[trial_id])
        assert written == self.memory.get_trial_system_attrs(trial_id)
        self.decisions.append(wanted)


def go_through(pair: Pair, draw: random.Random, events: int) -> None:
    """Let the studies go through random events."""
    special = [math.nan, math.inf, -math.inf, 0.0, 0.5, 0.5]
    checkpoints: dict[int, tuple[int, dict[str, Any]]] = {}

    def value() -> float:
        return draw.choice(special) if draw.random() < 0.2 else draw.random()

    for _ in range(events):
        running = pair.running
        event = draw.random()
        if event < 0.12 or not running:
            begun = pair.add()
            if draw.random() < 0.1:
                pair.ask(begun)  # before it has reported anything
        elif event < 0.16:
            curve = {step: value() for step in draw.sample(range(9), 4)}
            pair.add(create_trial(state=TrialState.COMPLETE, value=1.0, intermediate_values=curve))
        elif event < 0.19:
            queued = create_trial(state=TrialState.WAITING, system_attrs={"completed_rung_0": draw.random()})
            trial_id = pair.add(queued)
            if draw.random() < 0.5:
                pair.begin(trial_id)
        elif event < 0.30:
            ended = draw.choice(running)
            checkpoints.pop(ended, None)
            pair.end(ended, draw.choice(ENDS), draw.random())
        elif event < 0.36:
            trial_id = draw.choice(running)
            trial = pair.memory.get_trial(trial_id)
            if trial_id in checkpoints and draw.random() < 0.7:
                pair.cut_back(trial_id, *checkpoints[trial_id])
            else:
                checkpoints[trial_id] = (trial.last_step or 0, dict(trial.system_attrs))
        else:
            trial_id = draw.choice(running)
            last = pair.memory.get_trial(trial_id).last_step
            following = draw.choice([0, 1]) if last is None else last + draw.choice([1, 1, 1, 1, 2, 5])
            step = following if draw.random() < 0.9 else draw.randrange(9)  # at times one that was left out
            pair.report(trial_id, step, value())
            if draw.random() < 0.9:
                pair.ask(trial_id, draw.randrange(len(pair.studies)))


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 40), marks=pytest.mark.soak)], ids=["few", "many"])
@pytest.mark.parametrize("name", PRUNERS)
def test_decisions_are_optunas_on_any_history(processes: list[OptunaStorage], name: str, seeds: range) -> None:
    ours, optunas, options = PRUNERS[name]
    open_in = processes[:1] if "by itself" in name else processes  # two would find out different things
    made: Own = lambda: ours(**options)  # noqa: E731
    decisions = []
    for seed in seeds:
        direction, lazy = ("maximize", "minimize")[seed % 2], seed % 3 == 2
        pair = Pair(open_in, f"{name} {seed}", direction, made, lambda: optunas(**options), lazy=lazy)
        go_through(pair, random.Random(f"{name} {seed}"), 100)
        decisions += pair.decisions
    assert {True, False} == set(decisions)


@pytest.mark.parametrize("wrapped", ["median", "percentile", "successive_halving"])
def test_patience_over_our_pruners_is_patience_over_optunas(processes: list[OptunaStorage], wrapped: str) -> None:
    optunas = {
        "median": optuna.pruners.MedianPruner(5, 1, n_min_trials=3),
        "percentile": optuna.pruners.PercentilePruner(25.0, 5, 1, n_min_trials=3),
        "successive_halving": optuna.pruners.SuccessiveHalvingPruner(1, 3),
    }
    pair = Pair(
        processes,
        f"patient {wrapped}",
        "minimize",
        lambda: pruners.patient(patience=2, wrapped=wrapped),
        lambda: pruners.Patient(optunas[wrapped], 2, 0.0),
    )
    go_through(pair, random.Random(wrapped), 200)
    assert {True, False} == set(pair.decisions)


@pytest.mark.parametrize("name", PRUNERS)
def test_on_another_storage_optunas_own_code_decides(name: str) -> None:
    ours, optunas, options = PRUNERS[name]
    draw = random.Random(name)
    studies = [
        optuna.create_study(study_name="s", pruner=made(**options), sampler=optuna.samplers.RandomSampler(seed=0))
        for made in (ours, optunas)
    ]
    curves = [[draw.random() for _ in range(8)] for _ in range(30)]
    ends = []
    for study in studies:
        ends.append([])
        for curve in curves:
            trial = study.ask()
            for step, reported in enumerate(curve, 1):
                trial.report(reported, step)
                if trial.should_prune():
                    break
            study.tell(trial, curve[-1])
            ends[-1].append(step)
    assert ends[0] == ends[1]


# --- several trials at once -----------------------------------------------------------------------------------------


def wiped(pair: Pair, kept: dict[int, dict[str, Any]]) -> None:
    """Put the system attributes of trials back to what they were."""
    for trial_id, attributes in kept.items():
        pair.cut_back(trial_id, 100, attributes)


def together(pair: Pair, order: tuple[int, ...]) -> tuple[dict[int, bool], dict[int, dict[str, Any]]]:
    """Decide on trials in this order; return by trial what was decided and what was written down."""
    study = pair.studies[0]
    found = decide(study, [pair.seen(trial_id) for trial_id in order])
    written = {trial_id: pair.writing.get_trial_system_attrs(pair.ids[trial_id]) for trial_id in order}
    return dict(zip(order, found, strict=True)), written


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 20))])
@pytest.mark.parametrize("name", [name for name in PRUNERS if "by itself" not in name])
def test_the_order_of_trials_decided_together_is_of_no_account(
    processes: list[OptunaStorage], name: str, seed: int
) -> None:
    """And each is decided on as Optuna would if it came last, with all the others at their rungs already."""
    ours, optunas, options = PRUNERS[name]
    draw = random.Random(f"{name} {seed}")
    pair = Pair(processes, f"together {name} {seed}", "maximize", lambda: ours(**options), lambda: optunas(**options))
    go_through(pair, draw, 60)
    slots = [pair.add() for _ in range(5)]
    step = draw.choice([1, 2, 4, 6, 9])
    for slot in slots:
        for epoch in range(step if slot % 2 else 1, step + 1):  # some have passed rungs already
            pair.report(slot, epoch, draw.choice([draw.random(), draw.random(), draw.random(), 0.5, math.nan]))
            if epoch < step and draw.random() < 0.5:
                pair.ask(slot)
    before = {slot: dict(pair.memory.get_trial_system_attrs(slot)) for slot in slots}
    decided, written = together(pair, tuple(slots))
    for order in list(itertools.permutations(slots))[:: draw.randint(19, 29)]:
        wiped(pair, before)
        assert together(pair, order) == (decided, written)
    for last in slots:
        wiped(pair, {**written, last: before[last]})
        with warnings.catch_warnings(action="ignore"):
            alone = pair.copy.pruner.prune(pair.copy, pair.memory.get_trial(last))
        assert bool(alone) is decided[last]
        assert pair.memory.get_trial_system_attrs(last) == written[last]


def test_of_all_that_reach_a_rung_together_the_best_go_on(processes: list[OptunaStorage]) -> None:
    pair = Pair(
        processes,
        "rung",
        "maximize",
        lambda: SuccessiveHalving(1, 3),
        lambda: optuna.pruners.SuccessiveHalvingPruner(1, 3),
    )
    slots = [pair.add() for _ in range(6)]
    for slot, value in zip(slots, [0.1, 0.6, 0.2, 0.5, 0.3, 0.4], strict=True):
        pair.report(slot, 1, value)
    decided, _ = together(pair, tuple(slots))
    assert [not pruned for pruned in decided.values()] == [False, True, False, True, False, False]


def test_patience_shows_the_wrapped_pruner_only_what_does_not_improve(processes: list[OptunaStorage]) -> None:
    pair = Pair(
        processes,
        "patience",
        "maximize",
        lambda: pruners.Patient(Median(0), 1, 0.0),
        lambda: pruners.Patient(optuna.pruners.MedianPruner(0), 1, 0.0),
    )
    pair.add(create_trial(value=1.0, intermediate_values={1: 0.5, 2: 0.5}))
    curves = [(0.1, 0.2), (0.2, 0.1), (0.9, 0.8), (0.1, 0.1), (0.8, 0.9)]
    slots = [pair.add() for _ in curves]
    for slot, curve in zip(slots, curves, strict=True):
        for epoch, value in enumerate(curve, 1):
            pair.report(slot, epoch, value)
    for order in (slots, slots[::-1]):
        decided, _ = together(pair, tuple(order))
        assert [decided[slot] for slot in slots] == [False, True, False, True, False]


def test_what_is_written_down_is_added_to_the_trial_that_was_shown(processes: list[OptunaStorage]) -> None:
    for lazy in (False, True):
        made: Own = lambda: SuccessiveHalving(1, 2)  # noqa: E731
        pair = Pair(processes, f"shown {lazy}", "maximize", made, optuna.pruners.NopPruner, lazy=lazy)
        slot = pair.add()
        pair.report(slot, 1, 0.5)
        shown = pair.seen(slot)
        assert decide(pair.studies[0], [shown]) == [False]
        assert shown.system_attrs == {"completed_rung_0": 0.5}
        assert decide(pair.studies[0], [shown]) == [False]  # it is on its way to the next rung


def test_nobody_to_decide_on_is_no_decision(processes: list[OptunaStorage]) -> None:
    for name, (ours, optunas, options) in PRUNERS.items():
        pair = Pair(processes, f"nobody {name}", "maximize", lambda: ours(**options), lambda: optunas(**options))  # noqa: B023
        with counted(pair) as statements:
            assert decide(pair.studies[0], []) == []
        assert len(statements) <= 1, name


# --- what it costs --------------------------------------------------------------------------------------------------


@contextmanager
def counted(pair: Pair) -> Iterator[list[str]]:
    """Collect which kinds of statements the study's first process runs meanwhile."""
    found: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if not statement.startswith("BEGIN"):  # which on Postgres the driver sends
            found.append("write" if "INSERT INTO" in statement else "read")

    sa.event.listen(pair.writing.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(pair.writing.engine, "before_cursor_execute", note)


def with_history(processes: list[OptunaStorage], name: str, ours: Own, count: int) -> tuple[Pair, list[int]]:
    """Return a study with so many finished trials, and eight that run; it has been looked at."""
    pair = Pair(processes, f"{name} {count}", "maximize", ours, optuna.pruners.NopPruner)
    for number in range(count):
        rungs = {"completed_rung_0": number / count}
        curve = dict.fromkeys(range(1, 10), number / count)
        pair.add(create_trial(value=1.0, intermediate_values=curve, system_attrs=rungs))
    slots = [pair.add() for _ in range(8)]
    pair.writing.view(pair.study_id)
    return pair, slots


@pytest.mark.parametrize("count", [10, 60])
def test_statements_of_a_median_decision(processes: list[OptunaStorage], count: int) -> None:
    pair, slots = with_history(processes, "median costs", lambda: Median(5, 2), count)
    for slot in slots:
        pair.report(slot, 1, 0.9)
    shown = [pair.seen(slot) for slot in slots]
    with counted(pair) as statements:
        decide(pair.studies[0], shown)
    assert statements == []  # it warms up
    for slot in slots:
        pair.report(slot, 2, 0.9)
    shown = [pair.seen(slot) for slot in slots]
    for trials in (shown, shown[:1]):
        with counted(pair) as statements:
            decide(pair.studies[0], trials)
        assert statements == ["read"]
    pair.add(create_trial(value=1.0, intermediate_values={2: 0.5}))
    with counted(pair) as statements:
        decide(pair.studies[0], shown)
    assert statements == ["read", "read"]  # one that finished is read
    pair.writing.set_known_finished(pair.study_id, count + 1)
    with counted(pair) as statements:
        decide(pair.studies[0], shown)
    assert statements == []  # a report has told that nothing finished


@pytest.mark.parametrize("count", [10, 60])
@pytest.mark.parametrize(
    "made", [lambda: SuccessiveHalving(2, 3), lambda: Hyperband(2, 5, 3)], ids=["halving", "hyperband"]
)
def test_statements_of_a_halving_decision(processes: list[OptunaStorage], made: Own, count: int) -> None:
    pair, slots = with_history(processes, f"{made().__class__.__name__} costs", made, count)
    statements_at: dict[int, list[str]] = {}
    for epoch in range(1, 5):
        for slot in slots:
            pair.report(slot, epoch, 2.0)
        shown = [pair.seen(slot) for slot in slots]
        with counted(pair) as statements_at[epoch]:
            decide(pair.studies[0], shown)
    read, marks = ["read"] * 2, ["write"] * len(slots)
    assert statements_at == {1: [], 2: read + marks, 3: [], 4: []}  # one bracket, with rungs at 2 and 6


def test_statements_of_a_halving_decision_through_optunas_trial(processes: list[OptunaStorage]) -> None:
    pair, slots = with_history(processes, "lazy costs", lambda: SuccessiveHalving(2, 3), 10)
    trial = optuna.trial.Trial(pair.studies[0], pair.ids[slots[0]])
    statements_at: dict[int, list[str]] = {}
    for epoch in range(1, 4):
        trial.report(2.0, epoch)
        with counted(pair) as statements_at[epoch]:
            assert not trial.should_prune()
    own = ["read"]  # the trial's attributes, which Optuna's trial reads when they are looked at
    assert statements_at == {1: [], 2: [*own, "read", "read", "write"], 3: own}


@pytest.mark.parametrize(
    "made",
    [
        pruners.none,
        lambda: pruners.threshold(lower=0.0),
        lambda: pruners.patient(patience=1),
        lambda: pruners.patient(patience=5, wrapped="median"),
    ],
    ids=["none", "threshold", "patient", "patient that need not ask"],
)
def test_pruners_that_look_at_the_trial_alone_read_nothing(
    request: pytest.FixtureRequest, processes: list[OptunaStorage], made: Own
) -> None:
    pair, slots = with_history(processes, request.node.name, made, 5)
    for epoch in range(1, 4):
        pair.report(slots[0], epoch, -float(epoch))
    shown = [pair.seen(slot) for slot in slots]
    with counted(pair) as statements:
        decide(pair.studies[0], shown)
    assert statements == []


# --- details --------------------------------------------------------------------------------------------------------


def test_nothing_is_pruned_before_a_trial_is_complete(processes: list[OptunaStorage]) -> None:
    pair = Pair(processes, "first", "maximize", lambda: Median(0), lambda: optuna.pruners.MedianPruner(0))
    slot = pair.add()
    pair.report(slot, 1, math.nan)
    pair.ask(slot)
    pair.add(create_trial(value=1.0))  # from now on a trial that reports no number is
    pair.ask(slot)
    assert pair.decisions == [False, True]


def test_a_trial_that_has_ended_cannot_enter_a_rung(processes: list[OptunaStorage]) -> None:
    pair = Pair(processes, "ended", "maximize", lambda: SuccessiveHalving(1, 2), optuna.pruners.NopPruner)
    slots = [pair.add() for _ in range(3)]
    for slot in slots:
        pair.report(slot, 1, 0.5)
    shown = [pair.seen(slot) for slot in slots]
    pair.end(slots[1], TrialState.FAIL, 0.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        decide(pair.studies[0], shown)
    assert [pair.writing.get_trial_system_attrs(pair.ids[slot]) for slot in slots] == [{}, {}, {}]
    assert decide(pair.studies[0], [shown[0], shown[2]]) == [False, False]


@pytest.mark.parametrize("name", ["s", "ünï 7_1", ""])
def test_brackets_are_optunas(name: str) -> None:
    pruner = optuna.pruners.HyperbandPruner(1, 81, 3)
    study = optuna.create_study(study_name=name, pruner=pruner)
    pruner._try_initialization(study)
    brackets = Brackets(name, pruner._trial_allocation_budgets)
    for numbers in ([3], [150, 7, 99], [], [4000]):
        wanted = [
            pruner._get_bracket_id(
                study, FrozenTrial(number, TrialState.RUNNING, None, None, None, {}, {}, {}, {}, {}, number)
            )
            for number in numbers
        ]
        assert brackets(np.array(numbers, np.int64)).tolist() == wanted


def test_the_ledger_forgets_the_keys_that_columns_gather() -> None:
    assert f"{RUNG_PREFIX}%" == cut_back.RUNG_KEYS


def test_our_pruners_are_optunas() -> None:
    """Optuna's samplers ask for HyperbandPruner, to look at one bracket only."""
    for ours, optunas, options in PRUNERS.values():
        assert isinstance(ours(**options), optunas)
