"""Tables: what is read from a study, what a file keeps, and which row stands for a proposal."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from hpo.errors import SpecError, StudyError
from hpo.lab import plan as plans
from hpo.lab import recording, replay
from hpo.lab import table as tables
from hpo.lab.asking import Asking
from hpo.lab.pool import Pool
from hpo.lab.table import Again, Ending
from hpo.storage.connect import Storage, plain_url
from hpo.study import plain, resolve
from tests.support.paths import ROOT
from tests.support.tables import DECLARED, X, falling, row, table
from tests.support.trials import MakeStudy

KIND = CategoricalDistribution(["a", "b"])


@pytest.fixture
def storage_kind() -> str:
    return "sqlite"


# --- a study ----------------------------------------------------------------------------------------------------------


def test_a_study_without_curves_and_one_with_several_objectives_are_refused(make_study: MakeStudy) -> None:
    empty = make_study(name="empty")
    with pytest.raises(StudyError, match=r"study 'empty': has no complete trial"):
        recording.record(empty)
    empty.optuna.tell(empty.optuna.ask(), 1.0)
    with pytest.raises(StudyError, match=r"study 'empty': has no curves"):
        recording.record(empty)
    several = make_study(name="several", direction=None, objectives={"loss": "minimize", "size": "minimize"})
    with pytest.raises(StudyError, match=r"study 'several' has several objectives; a replay supports one"):
        recording.record(several)


def made_by_optuna(url: str, name: str, curves: list[dict[int, float]], **settings: Any) -> optuna.Study:
    """Let Optuna make a study with its own storage. Trial 2 is pruned at the end of its curve."""
    storage = optuna.storages.RDBStorage(url)
    study = optuna.create_study(storage=storage, study_name=name, sampler=optuna.samplers.RandomSampler(0), **settings)
    for number, curve in enumerate(curves):
        trial = study.ask()
        trial.suggest_float("x", 0.0, 1.0)
        for step, value in curve.items():
            trial.report(value, step)
        if number == 2:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, number / 10)
    storage.remove_session()
    storage.engine.dispose()
    return study


def test_a_study_that_optuna_made_is_replayed_if_every_step_is_known(lite: Storage) -> None:
    url = plain_url(lite.url)
    made_by_optuna(url, "whole", [{0: 3.0, 1: 1.0}, {0: 4.0, 1: 2.0}, {0: 9.0}, {0: 1.0}], direction="minimize")
    found = recording.record(plain.open_any(lite, "whole"))
    assert [one.ending for one in found.rows] == [Ending.COMPLETE, Ending.COMPLETE, Ending.CUT, Ending.COMPLETE]
    assert [(one.steps, one.curve, one.value) for one in found.rows[:3]] == [
        ((0, 1), (3.0, 1.0), 0.0),
        ((0, 1), (4.0, 2.0), 0.1),
        ((0,), (9.0,), 9.0),
    ]
    assert found.spec.guard.patience == 0  # Optuna has none
    planned = plans.make(found, sampler=plans.RECORDED, pruner="none", workers=1)
    assert [end.state.name for end in replay.run(planned, 0).ends] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]


@pytest.mark.parametrize(
    ("name", "curves", "said"),
    [
        ("gap", [{0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 2: 1.0}], r"trial 1 reported no value at step 1, and others did; "),
        ("silent", [{0: 1.0}, {}], r"trial 1 reported no value at step 0, and others did; "),
        ("curveless", [{}, {}], r"study 'curveless': has no curves: "),
        ("empty", [], r"study 'empty': has no complete trial"),
    ],
)
def test_a_study_of_optuna_that_does_not_suffice_is_refused(
    lite: Storage, name: str, curves: list[dict[int, float]], said: str
) -> None:
    made_by_optuna(plain_url(lite.url), name, curves)
    with pytest.raises(StudyError, match=said):
        recording.record(plain.open_any(lite, name))


def test_a_study_of_optuna_with_several_objectives_or_constraints_is_refused(lite: Storage) -> None:
    storage = optuna.storages.RDBStorage(plain_url(lite.url))
    several = optuna.create_study(storage=storage, study_name="several", directions=["minimize", "maximize"])
    several.tell(several.ask(), [1.0, 2.0])
    bounded = optuna.create_study(storage=storage, study_name="bounded")
    trial = bounded.ask()
    trial.set_constraint("size", 1.0)
    trial.report(1.0, 0)
    bounded.tell(trial, 1.0)
    storage.remove_session()
    storage.engine.dispose()
    for name, what in (("several", "several objectives"), ("bounded", "constraints")):
        with pytest.raises(StudyError, match=f"study '{name}' has {what}; a replay supports one objective"):
            recording.record(plain.open_any(lite, name))


# --- its file ---------------------------------------------------------------------------------------------------------


def test_a_file_keeps_all_but_rounds_curves_to_32_bits(tmp_path: Path) -> None:
    kept = table(
        row(
            0, [0.1, math.nan], steps=(1, 5), seconds=0.3, stack_key="a", again=Again(value=0.5, curve=(0.75, 0.5, 0.5))
        ),
        row(
            1,
            [math.inf],
            Ending.DIVERGED,
            space={"kind": KIND, "x": X},
            params=(1.0, 1 / 3),
            again=Again(value=None, curve=()),
        ),
        row(2, [], Ending.FAILED, space={}, params=()),
        document=DECLARED,
    )
    tables.save(kept, tmp_path / "made.npz")
    found = tables.load(tmp_path / "made.npz")
    assert found.document == DECLARED
    assert [one.params for one in found.rows] == [(0.0,), (1.0, 1 / 3), ()]
    assert [one.space for one in found.rows] == [{"x": X}, {"kind": KIND, "x": X}, {}]
    assert [one.steps for one in found.rows] == [(1, 5), (1,), ()]
    assert repr([one.curve for one in found.rows]) == repr([(float(np.float32(0.1)), math.nan), (math.inf,), ()])
    assert [one.value for one in found.rows] == [None, None, None]  # a COMPLETE trial's value is never NaN
    assert [one.ending for one in found.rows] == [Ending.COMPLETE, Ending.DIVERGED, Ending.FAILED]
    assert found.rows[0].seconds == float(np.float32(0.3))
    assert [one.again for one in found.rows] == [one.again for one in kept.rows]
    assert [one.stack_key for one in found.rows] == ["a", None, None]


def test_a_file_of_before_has_no_trial_that_was_trained_again_and_no_stack_keys(tmp_path: Path) -> None:
    tables.save(table(*falling(2)), tmp_path / "made.npz")
    arrays = {
        name: array
        for name, array in np.load(tmp_path / "made.npz").items()
        if not name.startswith(("again", "stack_keys"))
    }
    header = json.loads(bytes(arrays["header"]))
    del header["stack_keys"]
    np.savez(tmp_path / "made.npz", **arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    assert [(one.again, one.stack_key) for one in tables.load(tmp_path / "made.npz").rows] == [(None, None)] * 2


def test_trials_of_another_table_are_found_by_their_parameters() -> None:
    first = table(row(0, [1.0]), row(1, [2.0]), row(2, [3.0]))
    second = table(
        row(7, [5.0], params=(0.02,)), row(8, [4.0, 3.0], params=(0.0,)), row(9, [1.0], Ending.CUT, params=(0.01,))
    )
    found = first.trained_again(second)
    assert [one.again for one in found.rows] == [
        Again(value=3.0, curve=(4.0, 3.0)),
        None,
        Again(value=5.0, curve=(5.0,)),
    ]
    assert found.again_order == (0, 2)


def test_a_file_keeps_the_raw_values_where_they_differ(tmp_path: Path) -> None:
    tables.save(table(row(0, [0.5, 0.5], raw=(0.5, 9.0)), row(1, [2.0])), tmp_path / "made.npz")
    assert [one.told for one in tables.load(tmp_path / "made.npz").rows] == [(0.5, 9.0), (2.0,)]


def test_a_name_by_which_a_table_would_not_be_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"--save .*/made\.dat: a table's name ends in \.npz; write --save .*/made\.dat\.npz"
    ):
        tables.save(table(*falling(2)), tmp_path / "made.dat")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    names = ("missing", "text", "empty", "other", "later", "damaged", "part", "cut", "folder")
    missing, text, empty, other, later, damaged, part, cut, folder = (tmp_path / f"{name}.npz" for name in names)
    text.write_text("no table")
    empty.touch()
    np.savez(other, x=np.zeros(3))
    tables.save(table(*falling(2)), later)
    arrays = dict(np.load(later))
    whole = bytearray(later.read_bytes())
    whole[len(whole) // 2] ^= 255
    damaged.write_bytes(whole)
    cut.write_bytes(later.read_bytes()[: len(whole) // 2])
    folder.mkdir()
    np.savez(part, **{name: array for name, array in arrays.items() if name != "curves"})
    header = json.loads(bytes(arrays["header"])) | {"version": 99}
    np.savez(later, **arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)})
    for file, said in (
        (missing, "no such file"),
        (text, "is not a table of recorded trials"),
        (empty, "is empty"),
        (cut, r"is damaged or cut off; `hpo replay STUDY --save FILE` writes one"),
        (folder, "cannot be read: Is a directory"),
        (other, "is not a table of recorded trials"),
        (damaged, "is damaged or cut off"),
        (part, "is not a table of recorded trials"),
        (later, "has version 99, this hpo reads version 1"),
    ):
        with pytest.raises(StudyError, match=said):
            tables.load(file)


# --- what is best -----------------------------------------------------------------------------------------------------


def test_the_goal_is_the_worst_value_within_the_best_share() -> None:
    found = table(*falling(200))  # final values 97 to 296
    assert [found.goal(share) for share in (0.001, 0.01, 0.5)] == [97.0, 98.0, 196.0]
    assert found.best == 97.0
    turned = dataclasses.replace(found, document={**found.document, "direction": "maximize"})
    assert (turned.goal(0.01), turned.best) == (295.0, 299.0)  # the best of all reports is a first one


# --- the nearest row --------------------------------------------------------------------------------------------------


def test_the_nearest_unused_row_stands_for_a_proposal() -> None:
    pool = Pool(table(*falling(5)), range(5))  # x is 0, 0.01, ... 0.04
    found = [pool.take({"x": (X, 0.018)}) for _ in range(5)]
    assert [match.place for match in found] == [2, 1, 3, 0, 4]
    assert [round(match.distance, 6) for match in found] == [0.002, 0.008, 0.012, 0.018, 0.022]
    assert (len(pool), all(match.is_of_branch for match in found)) == (0, True)


def test_distances_are_shares_of_the_ranges() -> None:
    rate, width = FloatDistribution(1e-4, 1.0, log=True), IntDistribution(0, 10)
    space = {"rate": rate, "width": width, "kind": KIND}
    rows = [row(0, [1.0], space=space, params=(1e-2, 5.0, 0.0)), row(1, [1.0], space=space, params=(1.0, 5.0, 0.0))]
    pool = Pool(table(*rows), range(2))
    match = pool.take({"rate": (rate, 1e-4), "width": (width, 5.0), "kind": (KIND, 1.0)})
    assert (match.place, round(match.distance, 6)) == (0, round(math.sqrt((0.5**2 + 0 + 1) / 3), 6))


def test_ranges_that_differ_from_trial_to_trial_are_one_range() -> None:
    narrow, wide = FloatDistribution(0.0, 1.0), FloatDistribution(0.0, 10.0)
    found = table(
        row(0, [1.0], space={"x": narrow}, params=(1.0,)),
        row(1, [1.0], space={"x": wide}, params=(4.0,)),
        row(2, [1.0], space={"x": wide}, params=(10.0,)),
    )
    for range_ in (narrow, wide):  # 3.0 is nearest to 4.0 in any
        match = Pool(found, found.whole).take({"x": (range_, 3.0)})
        assert (match.place, match.distance) == (1, pytest.approx(0.1))


def test_a_row_of_another_branch_is_taken_only_if_the_own_branch_has_none_left() -> None:
    branch = {"x": X, "kind": KIND}
    rows = [row(0, [1.0], space=branch, params=(0.9, 0.0)), row(1, [1.0]), row(2, [1.0])]  # x is 0.01 and 0.02
    pool = Pool(table(*rows), range(3))
    proposal = {"x": (X, 0.02), "kind": (KIND, 0.0)}
    found = [pool.take(proposal) for _ in range(3)]
    assert [(match.place, match.is_of_branch) for match in found] == [(0, True), (2, False), (1, False)]
    assert found[1].distance == math.sqrt(1 / 2)


def test_an_own_objective_is_asked_as_its_nearest_trials_were() -> None:
    """The number of layers decides whether there is a width. Nothing but the trials says so."""
    layers = IntDistribution(1, 2)
    one = [row(number, [1.0], space={"layers": layers}, params=(1.0,)) for number in range(3)]
    two = [row(number, [1.0], space={"layers": layers, "width": X}, params=(2.0, 0.5)) for number in range(3, 6)]
    asking = Asking(table(*one, *two))
    for values in ({"layers": 1}, {"layers": 2, "width": 0.25}):
        trial: Any = optuna.trial.FixedTrial(values)
        assert {name: value for name, (_, value) in asking.ask(trial, trial).items()} == values


# --- the tables of this repository ------------------------------------------------------------------------------------

TABLES = sorted((ROOT / "benchmarks" / "tables").glob("*.npz"))


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_a_table_of_ours_is_small_and_was_recorded_with_the_file_beside_it(file: Path) -> None:
    found = tables.load(file)
    recorded_with = resolve.read(file.with_suffix(".toml")).joining(found.spec).spec
    assert file.stat().st_size < 500_000
    guard = {key: found.document[key] for key in ("failures",) if key in found.document}  # the first tables have none
    assert found.document == {"format": recorded_with.format, **recorded_with.identity, **guard}
    assert (recorded_with.sampler["name"], recorded_with.pruner["name"]) == ("random", "none")
    assert (len(found.rows), found.count(Ending.CUT)) == (recorded_with.budget.trials, 0)
