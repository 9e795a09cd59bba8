"""The winner of an objective of the user's own is exported, and trains from its file as it ran in the search.

The names of schedules that hold a None, and tuples of layers, are in many public Optuna scripts.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SpecError, StudyError
from hpo.final import train as final
from hpo.final import user_objective
from hpo.spec import usercode
from hpo.study import export, results
from hpo.study.study import Study
from hpo.worker import loop as worker_loop
from hpo.worker.signals import StopSignal

pytestmark = pytest.mark.filterwarnings("ignore:Choices for a categorical distribution should be")
MakeStudy = Callable[..., Study]
#: Choices of which each must come back as it was.
CHOICES = {
    "none": "[None, 'cosine']",
    "tuples": "[(64, 64), (32, 32)]",
    "nested": "[[[1, 2], (3,)], [(4, None), {'a': None}]]",
    "mixed": "[None, True, 3, 2.5, 'x', (1, 'y')]",
    "one to Optuna": "[1, True, 1.0, 0, False, 0.0, '1']",
    "no numbers": "[float('nan'), float('inf'), -float('inf')]",
    "big": "[2**63, 10**30, -(2**64)]",
    "texts": r"['', 'null', '[1, 2]', '\x00\x1b[31m', 'a\nb', '\ud800', 'ä']",
    "tables": "[{'json': 'null'}, {'lr': 0.1, 'betas': (0.9, None)}]",
    "enumeration": "[*__import__('signal').Signals][:3]",
}


def searched(make_study: MakeStudy, folder: Path, code: str, trials: int = 6, **document: Any) -> Study:
    """Return a study after its search by an objective with this code."""
    (folder / "mine.py").write_text(code)
    study = make_study(trials=trials, **document)
    worker_loop.work(study, worker_loop.build_objective(study, folder), study.ledger("w"), StopSignal())
    return study


def again(path: Path, earlier: Any = ()) -> user_objective.OwnRun:
    spec = final.load_pinned(path)
    return user_objective.run(spec, path, final.find_code_folder(spec, path), earlier)


def trained(path: Path, earlier: Any = ()) -> Any:
    return again(path, earlier).value


@pytest.mark.parametrize("case", CHOICES)
def test_each_choice_comes_back_as_the_same_object(make_study: MakeStudy, tmp_path: Path, case: str) -> None:
    code = (
        f"CHOICES = {CHOICES[case]}\n"
        "TAKEN = []\n"
        "def objective(trial):\n"
        "    TAKEN.append(trial.suggest_categorical('c', CHOICES))\n"
        "    assert trial.suggest_categorical('c', CHOICES) is TAKEN[-1]\n"
        "    assert any(TAKEN[-1] is choice for choice in CHOICES)\n"
        "    return trial.number\n"
    )
    study = searched(make_study, tmp_path, code, sampler={"name": "tpe", "n_startup_trials": 3})
    taken = usercode.load_objective("mine.py:objective", tmp_path).__globals__["TAKEN"]
    assert len(taken) == 6
    for number in range(6):
        (path,) = export.export(study, tmp_path / "best.toml", number=number)
        assert trained(path) == number
        assert taken[-1] is taken[number]


@pytest.mark.parametrize("returned", ["[x]", "(x,)"])
def test_one_number_in_a_list_is_that_number(make_study: MakeStudy, tmp_path: Path, returned: str) -> None:
    """As Optuna takes it; with another number of values the trial fails, as there."""
    code = f"def objective(trial):\n    x = trial.suggest_float('x', 0.5, 0.5)\n    return {returned}\n"
    study = searched(make_study, tmp_path, code, trials=1)
    assert study.optuna.best_value == 0.5
    assert trained(*export.export(study, tmp_path / "best.toml")) == 0.5


def test_what_toml_cannot_say_is_written_as_json(make_study: MakeStudy, tmp_path: Path) -> None:
    code = (
        "def objective(trial):\n"
        "    trial.suggest_categorical('s', [None])\n"
        "    trial.suggest_categorical('layers', [(64, 64)])\n"
        "    return trial.suggest_float('x', 0.5, 0.5)\n"
    )
    (path,) = export.export(searched(make_study, tmp_path, code, trials=1), tmp_path / "best.toml")
    assert tomllib.loads(path.read_text())["params"] == {"s": {"json": "null"}, "layers": [64, 64], "x": 0.5}


@pytest.mark.parametrize("value", [None, [None], {"json": "null"}, "\ud800", 1, 1.0, True, "null", [1, [2.5, "x"]], {}])
def test_a_value_is_written_and_read(value: Any) -> None:
    again = export.from_toml(export.to_toml(value))
    assert (again, type(again)) == (value, type(value))


def test_which_of_two_equal_choices_it_was_is_not_guessed(make_study: MakeStudy, tmp_path: Path) -> None:
    """Optuna records the first of them, whichever it was."""
    study = make_study(trials=1)
    study.optuna.enqueue_trial({"c": 1})
    trial = study.optuna.ask()
    trial.suggest_categorical("c", [True, 1, 2])
    study.optuna.tell(trial, 0.0)
    with pytest.raises(StudyError, match="trial 0: c was one of True, 1, which Optuna takes for equal"):
        export.export(study, tmp_path / "best.toml")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[b'a', b'b']", "TypeError: c: the choice b'a' is of type bytes, which no storage can hold"),
        ("[(1, 2), [1, 2]]", "ValueError: c: the choices (1, 2) and [1, 2] are both stored as [1, 2]; keep one"),
    ],
)
def test_what_no_storage_holds_is_told(make_study: MakeStudy, tmp_path: Path, given: str, said: str) -> None:
    study = searched(
        make_study,
        tmp_path,
        f"def objective(trial):\n    return trial.suggest_categorical('c', {given})[0]\n",
        trials=1,
    )
    with study.storage.engine.connect() as connection:
        (reason,) = connection.exec_driver_sql("SELECT message FROM hpo_failures").scalars()
    assert reason.startswith(said)


ALL_OF_A_TRIAL = """
import optuna
SEEN = []

def objective(trial):
    x = trial.suggest_float("x", 0.0, 1.0)
    n = trial.suggest_int("n", 2**60, 2**62)
    high = trial.suggest_int("high", 1, 9)
    low = trial.suggest_int("low", 0, high)
    y = trial.suggest_float("x", 0.0, 1.0)
    study = trial.study
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    best = study.best_value if complete else None
    trial.set_user_attr("x", x)
    trial.set_constraint("c", x - 2)
    for step in range(3):
        trial.report(x * (3 - step), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    SEEN.append({
        "params": trial.params, "n": n, "distributions": trial.distributions, "number": trial.number,
        "attributes": trial.user_attrs, "constraints": trial.constraints, "study": study.user_attrs["note"],
        "name": study.study_name, "direction": study.direction, "complete": len(complete), "best": best,
        "started": trial.datetime_start is not None, "same": x == y, "relative": isinstance(trial.relative_params, dict),
    })
    return x + low / 100
"""


def test_all_that_a_trial_has_is_there(make_study: MakeStudy, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ALL_OF_A_TRIAL)
    study = make_study(trials=5)
    study.optuna.set_user_attr("note", {"of": [1, None]})
    objective = worker_loop.build_objective(study, tmp_path)
    worker_loop.work(study, objective, study.ledger("w"), StopSignal())
    seen = objective.__globals__["SEEN"]
    assert len(seen) == 5
    for number in range(5):
        (path,) = export.export(study, tmp_path / "best.toml", number=number)
        earlier, why_none = user_objective.earlier_trials(final.load_pinned(path), str(study.storage.url))
        assert why_none is None
        trained(path, earlier)
        assert seen[-1] == seen[number]


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ("trial.study.stop(); return trial.suggest_float('x', 0.0, 1.0)", None),
        ("return trial.user_attrs.get('note', 0.25) + 0 * trial.suggest_float('x', 0.0, 1.0)", 0.25),
        ("trial.report(0.5, 1); trial.report(0.25, 2); raise optuna.TrialPruned", 0.25),
        ("return 0.75", 0.75),
    ],
)
def test_it_runs_as_in_the_search(make_study: MakeStudy, tmp_path: Path, objective: str, value: float | None) -> None:
    study = searched(make_study, tmp_path, f"import optuna\ndef objective(trial):\n    {objective}\n", trials=1)
    (path,) = export.export(study, tmp_path / "best.toml", number=0)
    assert trained(path) == results.best(study, number=0)[0].value
    assert value is None or trained(path) == value


def test_a_queued_trial_has_the_attributes_that_it_was_queued_with(make_study: MakeStudy, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def objective(trial):\n    return trial.suggest_float('x', 0, 9) + trial.user_attrs['add']\n"
    )
    study = make_study(trials=1)
    study.optuna.enqueue_trial({"x": 4}, user_attrs={"add": 0.5})
    worker_loop.work(study, worker_loop.build_objective(study, tmp_path), study.ledger("w"), StopSignal())
    (path,) = export.export(study, tmp_path / "best.toml")
    assert trained(path) == 4.5


def test_the_value_is_the_curve_s_where_the_study_says_so(make_study: MakeStudy, tmp_path: Path) -> None:
    code = "def objective(trial):\n    for step, v in enumerate([3.0, 1.0, 2.0], 1):\n        trial.report(v, step)\n"
    study = searched(make_study, tmp_path, code, trials=1, value="best")
    (path,) = export.export(study, tmp_path / "best.toml")
    assert trained(path) == 1.0
    assert user_objective.difference(final.load_pinned(path), path, again(path)) is None


REPORTS = """
import hpo, json, pathlib, torch
def objective(trial):
    data = json.loads(pathlib.Path(__file__).with_name("data.json").read_text())
    for epoch in hpo.epochs(trial, data["epochs"], model=torch.nn.Linear(1, 1)):
        trial.report(torch.rand(()).item() + data["more"] * (epoch == 2), epoch + 1)
    return data["value"]
"""
DATA = {"epochs": 5, "more": 0, "value": 1.0}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, "None"),
        ({"more": 1}, r"at step 3: trial 0 reported 0\.\d+, the replay 1\.\d+"),
        ({"epochs": 4}, "in length: trial 0 reported 5 values, the replay 4"),
        ({"value": 2.0}, r"in value: trial 0 returned 1\.0, the replay 2\.0"),
    ],
    ids=["nothing", "a value", "the length", "the end"],
)
def test_a_replay_compares_the_whole_curve(
    make_study: MakeStudy, tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    study = searched(make_study, tmp_path, REPORTS, trials=1)
    (path,) = export.export(study, tmp_path / "best.toml")
    (tmp_path / "data.json").write_text(json.dumps(DATA | change))
    assert re.fullmatch(difference, str(user_objective.difference(final.load_pinned(path), path, again(path))))


def test_the_trials_before_are_as_they_were_then(make_study: MakeStudy, tmp_path: Path) -> None:
    """Of an objective that aims at the best value so far each trial comes to the same again."""
    code = (
        "def objective(trial):\n"
        "    x = trial.suggest_float('x', 0.0, 1.0)\n"
        "    return x + (trial.study.best_value + len(trial.study.trials) if trial.number else 0)\n"
    )
    study = searched(make_study, tmp_path, code, trials=4)
    for number in range(4):
        (path,) = export.export(study, tmp_path / "best.toml", number=number)
        spec = final.load_pinned(path)
        earlier, _ = user_objective.earlier_trials(spec, str(study.storage.url))
        assert user_objective.difference(spec, path, again(path, earlier)) is None
    gone, why = user_objective.earlier_trials(spec, f"sqlite:///{tmp_path}/gone.db")
    assert gone == []
    assert "no such file" in (why or "")


WRITTEN = 'objective = "mine.py:objective"\ndirection = "minimize"\n[params]\n'


@pytest.mark.parametrize(
    ("params", "asked", "found"),
    [
        ("c = [64, 64]", "suggest_categorical('c', ((32, 32), (64, 64)))", "(64, 64)"),
        ("c = 1", "suggest_categorical('c', (1.0, 2.0))", "1.0"),
        ("c = 1", "suggest_float('c', 0, 2)", "1.0"),
        ("c = 2.0", "suggest_int('c', 0, 2)", "2"),
        ("c = {json = 'null'}", "suggest_categorical('c', ('x', None))", "None"),
    ],
)
def test_what_a_person_or_an_earlier_hpo_wrote_is_taken(tmp_path: Path, params: str, asked: str, found: str) -> None:
    (tmp_path / "mine.py").write_text(
        f"def objective(trial):\n    assert repr(trial.{asked}) == {found!r}\n    return 1\n"
    )
    (tmp_path / "best.toml").write_text(WRITTEN + params)
    assert trained(tmp_path / "best.toml") == 1.0


@pytest.mark.parametrize(
    ("params", "asked", "said"),
    [
        (
            "c = [64]",
            "suggest_categorical('c', ((32, 32), 'x'))",
            "params.c = [64]: is none of the objective's choices: (32, 32), 'x'",
        ),
        ("d = 1", "suggest_float('c', 0, 2)", "params.c: is missing, and the objective asks for it (known: d)"),
        ("c = '1'", "suggest_float('c', 0, 2)", "params.c = '1': is not a number"),
        ("c = 1.5", "suggest_int('c', 0, 2)", "params.c = 1.5: is not an integer"),
        ("c = nan", "suggest_float('c', 0, 2)", "params.c = nan: is not a number"),
        ("c = {json = 'x'}", "suggest_float('c', 0, 2)", "params.c = {'json': 'x'}: is not JSON"),
    ],
)
def test_what_does_not_fit_the_objective_is_told(tmp_path: Path, params: str, asked: str, said: str) -> None:
    """Even if the objective catches all errors."""
    (tmp_path / "mine.py").write_text(
        f"def objective(trial):\n    try:\n        trial.{asked}\n    except Exception:\n        pass\n    return 1\n"
    )
    (tmp_path / "best.toml").write_text(WRITTEN + params)
    with pytest.raises(SpecError) as refused:
        trained(tmp_path / "best.toml")
    assert str(refused.value).startswith(f"{tmp_path / 'best.toml'}: {said}")


def test_a_value_outside_of_the_range_is_taken_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def objective(trial):\n    return trial.suggest_float('c', 0, 2)\n")
    (tmp_path / "best.toml").write_text(WRITTEN + "c = 3.0")
    with pytest.warns(UserWarning, match="params.c = 3.0 is outside of what the objective asks for"):
        assert trained(tmp_path / "best.toml") == 3.0
