"""Finished trials in columns, and the cache that fills them: what is new is read once, and nothing is lost or doubled."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.storage import sql
from hpo.storage.connect import connect
from hpo.storage.finished_trials import STANDING, FinishedTrials, GrowingArray
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.tables import intermediate_values, trials
from hpo.storage.trial_rows import TrialRow
from tests.support import emptied

NOW = datetime(2026, 11, 24)
MAXIMIZE = [StudyDirection.MAXIMIZE]
SPACES: list[dict[str, BaseDistribution]] = [
    {"x": FloatDistribution(0, 1)},
    {"x": FloatDistribution(0, 1), "y": IntDistribution(1, 9)},
    {},
]


def row(number: int, curve: dict[int, float] | None = None, **given: Any) -> TrialRow:
    points = sorted((curve or {}).items())
    return TrialRow(
        **{
            "trial_id": 100 + number,
            "number": number,
            "state": TrialState.COMPLETE,
            "started": NOW,
            "completed": NOW,
            "steps": array("i", [step for step, _ in points]),
            "curve": array("d", [value for _, value in points]),
            **given,
        }
    )


def columns_of(*batches: list[TrialRow]) -> FinishedTrials:
    columns = FinishedTrials()
    for batch in batches:
        columns.add(batch)
    return columns


# --- columns --------------------------------------------------------------------------------------------------------


def test_a_column_grows_at_its_end_and_what_was_taken_from_it_stays() -> None:
    column, held = GrowingArray(np.float64, math.nan), []
    taken = []
    for length in (0, 1, 15, 16, 17, 200):
        held += [float(i) for i in range(length)]
        column.extend(held[len(column) :])
        taken.append((column.array, list(held)))
    assert all(view.tolist() == then for view, then in taken)
    column.pad(len(held) + 2)
    column.put([len(held) + 1], [7.0])
    np.testing.assert_array_equal(column.array, [*held, math.nan, 7.0])
    column.pad(3)
    assert len(column) == len(held) + 2


def test_what_columns_hold_of_trials() -> None:
    one, two, _ = SPACES
    columns = columns_of(
        [
            row(4, {3: 0.3, 1: 0.1}, values=(0.5,), space=one, params=(0.25,)),
            row(1, {}, state=TrialState.FAIL, space=two, params=(0.75, 3.0)),
            row(2, {1: math.nan, 2: -math.inf}, state=TrialState.PRUNED, values=(math.inf,), space=one, params=(0.5,)),
        ],
        [row(9, {1: math.nan, 3: 0.9}, values=(0.9, 0.1), system_attributes={"constraints": "[1.0]"})],
    )
    nan = math.nan
    assert len(columns) == 4
    assert columns.complete == 2
    assert columns.has_constraints
    assert columns.numbers.tolist() == [4, 1, 2, 9]
    assert columns.states.tolist() == [
        TrialState.COMPLETE.value,
        TrialState.FAIL.value,
        TrialState.PRUNED.value,
        TrialState.COMPLETE.value,
    ]
    np.testing.assert_array_equal(columns.values, [0.5, nan, math.inf, 0.9])
    assert columns.last_steps.tolist() == [3, -1, 2, 3]
    np.testing.assert_array_equal(columns.last_values, [0.3, nan, -math.inf, 0.9])
    assert [columns.spaces[index] for index in columns.space_indices] == [one, two, one, {}]
    np.testing.assert_array_equal(columns.params("x"), [0.25, 0.75, 0.5, nan])
    np.testing.assert_array_equal(columns.params("y"), [nan, 3.0, nan, nan])
    np.testing.assert_array_equal(columns.params("z"), [nan] * 4)
    np.testing.assert_array_equal(columns.at_step(1), [0.1, nan])  # of COMPLETE trials
    np.testing.assert_array_equal(columns.at_step(3), [0.3, 0.9])
    assert columns.at_step(2).tolist() == []


def random_rows(seed: int, count: int) -> list[TrialRow]:
    draw = random.Random(seed)
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0]
    rows = []
    for number in draw.sample(range(2 * count), count):
        space = draw.choice(SPACES)
        value = draw.choice([*special, draw.random()])
        rows.append(
            row(
                number,
                {
                    step: draw.choice([*special, *[draw.random()] * 9])
                    for step in draw.sample(range(9), draw.randint(0, 6))
                },
                state=draw.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]),
                values=draw.choice([None, (value,), (value, 1.0)]),
                space=space,
                params=tuple(draw.random() for _ in space),
                system_attributes={f"completed_rung_{rung}": repr(draw.random()) for rung in range(draw.randint(0, 3))},
            )
        )
    return rows


def contents(columns: FinishedTrials) -> dict[str, Any]:
    plain = ["numbers", "states", "values", "last_steps", "last_values", "space_indices"]
    return {
        **{name: getattr(columns, name) for name in plain},
        **{f"param {name}": columns.params(name) for name in "xyz"},
        **{f"step {step}": columns.at_step(step) for step in range(10)},
        **{f"rung {rung}": columns.at_rung(rung) for rung in range(4)},
        "counts": np.array([len(columns), columns.complete, columns.has_constraints]),
    }


@pytest.mark.parametrize("seed", range(8))
def test_batches_of_any_size_make_the_same_columns(seed: int) -> None:
    rows = random_rows(seed, 120)
    whole, one_by_one = contents(columns_of(rows)), contents(columns_of(*[[row] for row in rows]))
    ends = sorted(random.Random(seed).choices(range(121), k=9))  # some batches are empty
    cut = contents(columns_of(*[rows[start:end] for start, end in zip([0, *ends], [*ends, 120], strict=True)]))
    for name, wanted in whole.items():
        np.testing.assert_array_equal(one_by_one[name], wanted, err_msg=name)
        np.testing.assert_array_equal(cut[name], wanted, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_the_percentile_at_a_step_follows_what_comes_in(seed: int) -> None:
    rows, columns = random_rows(seed, 60), FinishedTrials()
    for batch in (rows[:1], rows[1:20], [], rows[20:21], rows[21:]):
        columns.add(batch)
        for step in range(10):
            found = columns.at_step(step)
            numbers = found[~np.isnan(found)]
            for percent in (0.0, 25.0, 50.0, 100.0):
                with np.errstate(invalid="ignore"):
                    wanted = np.percentile(numbers, percent) if len(numbers) else math.nan
                for _ in range(2):  # the second time from memory
                    np.testing.assert_equal(columns.percentile(step, percent), wanted)


def test_the_standings_at_a_rung_are_of_trials_in_every_state() -> None:
    rungs = {"completed_rung_0": "0.5", "completed_rung_1": "-Infinity", "other": '"text"'}
    columns = columns_of(
        [row(3, state=TrialState.PRUNED, system_attributes=rungs)],
        [row(1, system_attributes={"completed_rung_0": "0.25"}), row(2, state=TrialState.FAIL)],
    )
    assert columns.at_rung(0).tolist() == [(3, 0.5), (1, 0.25)]
    assert columns.at_rung(1).tolist() == [(3, -math.inf)]
    assert columns.at_rung(2).tolist() == []
    assert columns.at_rung(2).dtype == STANDING


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(template: Path, tmp_path: Path) -> str:
    return emptied.sqlite_copy(template, tmp_path)


@pytest.fixture
def processes(database: str) -> Iterator[tuple[OptunaStorage, OptunaStorage]]:
    """Two processes' storages on one database: one that does things, one that looks."""
    opened = [connect(database) for _ in range(2)]
    yield opened[0].optuna, opened[1].optuna
    for place in opened:
        place.close()


@contextmanager
def counted(place: OptunaStorage) -> Iterator[list[str]]:
    """Collect the statements that a storage runs meanwhile."""
    found: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        found.append(statement)

    sa.event.listen(place.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(place.engine, "before_cursor_execute", note)


def finished(value: float = 0.5, **given: Any) -> FrozenTrial:
    return create_trial(**{"value": value, "intermediate_values": {1: value}, **given})


def assert_as_stored(looking: OptunaStorage, study_id: int) -> None:
    """Hold what a process knows, in columns and in objects, against a process that has just started."""
    fresh = OptunaStorage(looking.engine).get_all_trials(study_id)
    assert looking.get_all_trials(study_id) == fresh
    columns, rows = looking.view(study_id)
    ended = {trial.number: trial for trial in fresh if trial.state.is_finished()}
    assert sorted(columns.numbers.tolist()) == sorted(ended)
    assert columns.complete == sum(trial.state == TrialState.COMPLETE for trial in ended.values())
    assert sorted(row.number for row in rows) == sorted(t.number for t in fresh if t.number not in ended)
    for number, state, last in zip(columns.numbers, columns.states, columns.last_steps, strict=True):
        assert ended[number].state.value == state
        assert (-1 if ended[number].last_step is None else ended[number].last_step) == last


def test_a_study_without_trials_has_empty_columns(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    assert len(looking.columns(study_id)) == 0
    assert looking.view(study_id)[1] == []
    assert_as_stored(looking, study_id)
    with pytest.raises(KeyError, match="there is no study with id 99"):
        looking.columns(99)


def test_a_look_when_nothing_is_new_is_one_statement_whatever_runs(
    processes: tuple[OptunaStorage, OptunaStorage],
) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    for _ in range(5):
        acting.create_new_trial(study_id, finished())
    for _ in range(3):
        acting.create_new_trial(study_id)
    looking.columns(study_id)
    with counted(looking) as statements:
        looking.columns(study_id)
    assert len(statements) == 1
    with counted(looking) as statements:
        assert len(looking.view(study_id)[1]) == 3
    assert len(statements) == 2
    looking.set_known_finished(study_id, 5)
    with counted(looking) as statements:
        looking.columns(study_id)
    assert statements == []


def test_trials_finish_out_of_order_between_looks(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    study_id, draw = acting.create_new_study(MAXIMIZE, "s"), random.Random(0)
    running: list[int] = []
    for turn in range(80):
        if len(running) < 6 and draw.random() < 0.6:
            running.append(acting.create_new_trial(study_id))
        for trial_id in running:
            acting.set_trial_intermediate_value(trial_id, draw.randrange(9), draw.random())
        if running and draw.random() < 0.5:
            state = draw.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
            values = [draw.random()] if state == TrialState.COMPLETE else None
            acting.set_trial_state_values(running.pop(draw.randrange(len(running))), state, values)
        if draw.random() < 0.3:
            looking.columns(study_id)
        if turn % 8 == 0:
            assert_as_stored(looking, study_id)
    assert_as_stored(looking, study_id)


def test_a_queued_trial_runs_and_ends_between_two_looks(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    queued = acting.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    assert len(looking.columns(study_id)) == 0
    acting.set_trial_state_values(queued, TrialState.RUNNING)
    acting.set_trial_intermediate_value(queued, 1, 0.25)
    acting.set_trial_state_values(queued, TrialState.COMPLETE, [0.5])
    assert looking.columns(study_id).at_step(1).tolist() == [0.25]
    assert_as_stored(looking, study_id)


def test_a_queued_trial_that_begins_is_no_reason_to_read_all_again(
    processes: tuple[OptunaStorage, OptunaStorage],
) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    acting.create_new_trial(study_id, finished())
    queued = acting.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    known = looking.columns(study_id)
    acting.set_trial_state_values(queued, TrialState.RUNNING)
    assert looking.columns(study_id) is known


def test_a_curve_that_is_cut_back_is_read_as_it_is_now(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    trial_id = acting.create_new_trial(study_id)
    for step in range(1, 6):
        acting.set_trial_intermediate_value(trial_id, step, float(step))
    acting.set_trial_system_attr(trial_id, "completed_rung_0", 5.0)
    assert len(looking.view(study_id)[1][0].curve) == 5
    with sql.writing(acting.engine) as connection:
        connection.execute(sa.text("DELETE FROM trial_intermediate_values WHERE step > 2"))
        connection.execute(sa.text("DELETE FROM trial_system_attributes"))
    [shrunk] = looking.view(study_id)[1]
    assert (shrunk.curve.tolist(), shrunk.system_attributes) == ([1.0, 2.0], {})
    acting.set_trial_intermediate_value(trial_id, 3, -3.0)
    acting.set_trial_state_values(trial_id, TrialState.COMPLETE, [-3.0])
    columns = looking.columns(study_id)
    assert [columns.at_step(step).tolist() for step in (2, 3, 4)] == [[2.0], [-3.0], []]
    assert columns.at_rung(0).tolist() == []
    assert_as_stored(looking, study_id)


@pytest.mark.parametrize(("first", "second"), [(3, 3), (3, 5), (5, 2), (1, 1)])
def test_a_study_is_deleted_and_its_ids_are_given_to_another(
    processes: tuple[OptunaStorage, OptunaStorage], first: int, second: int
) -> None:
    acting, looking = processes
    old = acting.create_new_study(MAXIMIZE, "old")
    for _ in range(first):
        acting.create_new_trial(old, finished(1.0))
    assert looking.columns(old).complete == first
    acting.delete_study(old)
    new = acting.create_new_study(MAXIMIZE, "new")
    assert new == old  # SQLite does
    for _ in range(second):
        acting.create_new_trial(new, finished(2.0))
    assert looking.columns(new).at_step(1).tolist() == [2.0] * second
    assert_as_stored(looking, new)


def test_a_study_is_deleted_meanwhile(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    acting.create_new_trial(study_id, finished())
    looking.columns(study_id)
    acting.delete_study(study_id)
    with pytest.raises(KeyError):
        looking.columns(study_id)
    with pytest.raises(KeyError):
        looking.view(study_id)


def test_ids_of_trials_are_given_to_those_of_another_study(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    old, _ = (acting.create_new_study(MAXIMIZE, name) for name in ("old", "other"))
    queued = acting.create_new_trial(old, create_trial(state=TrialState.WAITING))
    looking.columns(old)
    acting.delete_study(old)
    new = acting.create_new_study(MAXIMIZE, "new")
    assert new != old
    assert acting.create_new_trial(new, finished()) == queued
    with pytest.raises(KeyError):
        looking.columns(old)


def test_two_studies_in_one_database_keep_apart(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    one, two = (acting.create_new_study(MAXIMIZE, name) for name in ("one", "two"))
    for turn in range(10):
        for study_id, value in ((one, 1.0), (two, 2.0)):
            acting.create_new_trial(study_id, finished(value))
            acting.create_new_trial(study_id)
            if turn % 3 == 0:
                assert set(looking.columns(study_id).at_step(1).tolist()) == {value}
    assert_as_stored(looking, one)
    assert_as_stored(looking, two)


def test_more_open_trials_than_fit_into_one_statement(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    other = acting.create_new_study(MAXIMIZE, "other")
    acting.create_new_trial(other, finished(9.0))
    count = 2 * sql.CHUNK + 200
    with sql.writing(acting.engine) as connection:
        connection.execute(
            trials.insert(),
            [
                {"study_id": study_id, "number": n, "state": TrialState.RUNNING, "datetime_start": NOW}
                for n in range(count)
            ],
        )
    ids = [row.trial_id for row in looking.view(study_id)[1]]
    assert len(ids) == count
    for trial_id in (ids[0], ids[700], ids[-1]):
        acting.set_trial_intermediate_value(trial_id, 1, 0.5)
        acting.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
    assert len(looking.columns(study_id)) == 3
    columns, rows = looking.view(study_id)
    assert columns.at_step(1).tolist() == [0.5] * 3
    assert len(rows) == count - 3


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("whole", [True, False])
def test_a_look_that_failed_half_way_is_made_good_by_the_next(
    processes: tuple[OptunaStorage, OptunaStorage], failing: int, whole: bool
) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    acting.create_new_trial(study_id, finished())
    running = acting.create_new_trial(study_id)
    looking.view(study_id)
    acting.set_trial_state_values(running, TrialState.COMPLETE, [0.5])
    for _ in range(3):
        acting.create_new_trial(study_id, finished())
        acting.create_new_trial(study_id)
    seen = 0

    def fail(*rest: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == failing:
            raise ConnectionError

    sa.event.listen(looking.engine, "before_cursor_execute", fail)
    with pytest.raises(ConnectionError):
        looking.view(study_id) if whole else looking.columns(study_id)
    sa.event.remove(looking.engine, "before_cursor_execute", fail)
    assert looking.columns(study_id).complete == 5
    assert_as_stored(looking, study_id)


def test_a_look_during_a_write_sees_the_trial_as_it_was_before(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    study_id = acting.create_new_study(MAXIMIZE, "s")
    trial_id = acting.create_new_trial(study_id)
    with sql.writing(acting.engine) as connection:
        connection.execute(trials.update().values(state=TrialState.COMPLETE, datetime_complete=NOW))
        assert len(looking.columns(study_id)) == 0
        assert [row.state for row in looking.view(study_id)[1]] == [TrialState.RUNNING]
        connection.execute(
            intermediate_values.insert().values(
                trial_id=trial_id, step=1, intermediate_value=0.5, intermediate_value_type="FINITE"
            )
        )
    assert looking.columns(study_id).at_step(1).tolist() == [0.5]
    assert_as_stored(looking, study_id)


def test_what_a_column_of_the_database_cannot_hold_comes_back(processes: tuple[OptunaStorage, OptunaStorage]) -> None:
    acting, looking = processes
    study = optuna.create_study(storage=acting, study_name="s", directions=["maximize"])
    curve = {5: math.nan, 0: math.inf, 3: -math.inf, 1: 1e-300}
    study.add_trial(
        create_trial(value=math.inf, intermediate_values=curve, system_attrs={"completed_rung_0": -math.inf})
    )
    columns = looking.columns(study._study_id)
    found = [columns.at_step(step).tolist() for step in (0, 1, 3)]
    assert found == [[math.inf], [1e-300], [-math.inf]]
    assert np.isnan(columns.at_step(5)).all()
    assert (columns.last_steps.tolist(), columns.values.tolist()) == ([5], [math.inf])
    assert columns.at_rung(0).tolist() == [(0, -math.inf)]
