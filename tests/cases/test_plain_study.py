"""A study that Optuna itself made, in a storage that nobody else uses: commands that only read work on it and change no byte."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import optuna
import pytest

from tests.cli.test_commands import Hpo, content, hpo

__all__ = ["hpo"]
OWN = 'name = "new"\nobjective = "mine.py:objective"\ndirection = "minimize"\n[pruner]\nname = "none"\n'


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0.0, 1.0)
    trial.suggest_categorical("c", [None, "a"])
    for step in range(2):
        trial.report(x, step)
    if trial.number == 1:
        raise optuna.TrialPruned
    if trial.number == 2:
        raise ValueError
    return x


@pytest.fixture
def plain(tmp_path: Path) -> optuna.Study:
    """A study of five trials: 0 COMPLETE, 1 PRUNED, 2 FAIL, 3 RUNNING, 4 queued."""
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/studies.db", study_name="theirs")
    for params in ({"x": 0.25, "c": None}, {"x": 0.5, "c": "a"}):
        study.enqueue_trial(params)
    study.optimize(objective, n_trials=3, catch=ValueError)
    study.ask()
    study.enqueue_trial({"x": 0.125})
    study.set_user_attr("note", "kept")
    (tmp_path / "mine.py").write_text(
        "def objective(trial):\n"
        "    assert trial.study.user_attrs['note'] == 'kept'\n"
        "    assert trial.suggest_categorical('c', [None, 'a']) is None\n"
        "    return trial.suggest_float('x', 0.0, 1.0) + len(trial.study.trials)\n"
    )
    return study


def test_it_is_shown_for_what_it_is(hpo: Hpo, tmp_path: Path, plain: optuna.Study) -> None:
    before = content(tmp_path)
    code, said, err = hpo("status", "theirs")
    assert (code, err) == (0, "")
    assert said.splitlines()[:3] == [
        "theirs  (minimize, made by Optuna, not by hpo, which only reads it)",
        "trials   3 of 5 finished: 1 complete · 1 pruned · 1 failed · 1 foreign · 1 queued",
        "best     0.2500 by trial 0",
    ]
    assert "theirs  3/5     0.2500" in hpo("status")[1]
    told = json.loads(hpo("status", "theirs", "--json")[1])
    assert (told["made_by"], told["counts"]["complete"], told["best"]["value"]) == ("Optuna", 1, 0.25)
    said = hpo("status", "theirs", "--trial", "0")[1]
    assert "param    x = 0.25" in said
    assert "param    c = None" in said
    assert hpo("doctor", "theirs")[:2] == (
        0,
        "note    theirs: was made by Optuna, not by hpo: 5 trials, of which 1 run\n"
        "        hpo shows, exports and forks it, and changes nothing in it\n"
        "nothing to mend\n",
    )
    assert hpo("doctor", "theirs", "--repair")[0] == 0
    assert content(tmp_path) == before


def test_its_winner_is_exported_and_trained(hpo: Hpo, tmp_path: Path, plain: optuna.Study) -> None:
    before = content(tmp_path)
    code, said, _ = hpo("export", "theirs")
    assert code == 0
    assert said == (
        "wrote best.toml: trial 0, 0.2500; next: Optuna made the study and does not know its objective: "
        'add objective = "file.py:function", then hpo train best.toml -o runs/best\n'
    )
    assert hpo("export", "theirs")[1] == said.replace("wrote", "replaced")
    text = (tmp_path / "best.toml").read_text()
    assert tomllib.loads(text)["params"] == {"x": 0.25, "c": {"json": "null"}}
    code, _, err = hpo("train", "best.toml")
    assert (code, err) == (
        2,
        'error: best.toml: objective: missing; [params] belong to an objective: add objective = "file.py:function"\n',
    )
    (tmp_path / "best.toml").write_text('objective = "mine.py:objective"\n' + text)
    assert hpo("train", "best.toml", "--replay")[:2] == (
        1,
        "the objective returned 1.25\nreplay of trial 0 differs in value: trial 0 returned 0.25, the replay 1.25; the "
        "objective draws something without a seed, or its code, its data or a package changed\n",
    )
    (tmp_path / "best.toml").unlink()
    assert content(tmp_path) == before


def test_it_is_forked(hpo: Hpo, tmp_path: Path, plain: optuna.Study) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    (tmp_path / "mine.py").write_text(
        "def objective(trial):\n"
        "    trial.suggest_categorical('c', [None, 'a', 'b'])\n"
        "    return trial.suggest_float('x', 0.0, 0.375)\n"
    )
    code, said, _ = hpo("fork", "theirs", "new", "own.toml")
    assert code == 0
    assert said.splitlines()[:2] == [
        "made study 'new' with 1 trials of 'theirs'; 1 do not fit the new space",
        "  1 left: its x is not a number from 0.0 to 0.375: 1",
    ]
    assert [trial.state.name for trial in plain.get_trials()] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]
    assert [one["name"] for one in json.loads(hpo("status", "--json")[1])] == ["theirs", "new"]
    assert json.loads(hpo("status", "new", "--json")[1])["best"]["value"] == 0.25
    (tmp_path / "own.toml").write_text(OWN.replace("minimize", "maximize"))
    code, _, err = hpo("fork", "theirs", "other", "own.toml")
    assert (code, err.splitlines()[0]) == (
        2,
        "error: direction: study 'theirs' is to minimize, the file to maximize; "
        "its values mean something else, so its trials cannot be taken along",
    )


def test_it_is_imported_and_what_it_trained_is_told_as_its_own(hpo: Hpo, tmp_path: Path, plain: optuna.Study) -> None:
    (tmp_path / "own.toml").write_text(OWN.replace("mine.py", "first.py"))
    (tmp_path / "first.py").write_text("def objective(trial): return trial.suggest_float('rate', 0.0, 1.0)\n")
    url = f"sqlite:///{tmp_path}/studies.db"
    call = ("import", url, "theirs", "--like", "own.toml", "--rename", "x=rate")
    code, said, err = hpo(*call)
    assert (code, said) == (2, "")
    assert err.splitlines()[:2] == [
        "error: no trial of study 'theirs' fits, so no study was made: it has 2 complete and pruned trials",
        "  2 of them: has c, for which the objective does not ask",
    ]
    (tmp_path / "own.toml").write_text(OWN)
    (tmp_path / "mine.py").write_text(
        "def objective(trial):\n"
        "    trial.suggest_categorical('c', [None])\n"
        "    return trial.suggest_float('rate', 0.0, 1.0) + trial.suggest_int('n', 1, 3)\n"
    )
    code, said, _ = hpo(*call, "--set", "n=2")
    assert code == 0
    assert said.splitlines()[:3] == [
        "made study 'new' with 1 trials of 'theirs'; 1 do not fit the new space",
        "  1 left: its c is not one of None: 1",
        "  without a result, so not taken: 1 failed, 1 running, 1 queued",
    ]
    assert hpo(*call, "--set", "n=2")[::2] == (2, "error: there is a study 'new' already; choose another name\n")
    assert "best     0.2500 by trial 0, taken from another study" in hpo("status", "new")[1]
    exported = hpo("export", "new")[1].splitlines()
    assert (
        exported[1]
        == f"note: this study has not trained it; it took the result from trial 0 of 'theirs' in {url}, made by Optuna"
    )
    pinned = tomllib.loads((tmp_path / "best.toml").read_text())
    assert pinned["params"] == {"c": {"json": "null"}, "rate": 0.25, "n": 2}
    assert pinned["receipt"]["taken_from"] == {"study": "theirs", "storage": url, "made_by": "Optuna", "trial": 0}


@pytest.mark.parametrize(
    "command", [["pause"], ["resume"], ["stop"], ["stop", "--trial", "3"], ["doctor", "--fail", "3"]]
)
def test_what_would_change_it_is_refused(hpo: Hpo, tmp_path: Path, plain: optuna.Study, command: list[str]) -> None:
    before = content(tmp_path)
    code, out, err = hpo(command[0], "theirs", *command[1:])
    assert (code, out) == (2, "")
    assert err == (
        f"error: study 'theirs' in sqlite:///{tmp_path}/studies.db was made by Optuna, not by hpo; hpo only reads "
        "it, with `hpo status`, `hpo export`, `hpo fork` and `hpo doctor`\n"
    )
    assert content(tmp_path) == before


def test_a_front_and_constraints_are_told(hpo: Hpo, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"
    study = optuna.create_study(storage=storage, study_name="two", directions=["minimize", "maximize"])
    for first, second, bound in ((1.0, 1.0, 0.0), (2.0, 3.0, 0.0), (3.0, 2.0, 0.0), (0.0, 9.0, 1.0)):
        trial = study.ask()
        trial.set_constraint("c", bound)
        study.tell(trial, [first, second])
    optuna.create_study(storage=storage, study_name="none")
    told = json.loads(hpo("status", "two", "--json")[1])
    assert told["objectives"] == {"value_0": "minimize", "value_1": "maximize"}
    assert ([one["number"] for one in told["front"]], told["infeasible"]) == ([0, 1], 1)
    assert hpo("export", "two", "--front")[0] == 0
    found = tomllib.loads((tmp_path / "best.2.toml").read_text())
    assert (found["objectives"], found["receipt"]["values"]) == (told["objectives"], {"value_0": 2.0, "value_1": 3.0})
    code, _, err = hpo("export", "none")
    assert (code, err) == (
        2,
        "error: study 'none' has no complete trial that violates no constraint; name another trial with --trial N\n",
    )
    code, _, err = hpo("status", "thors")
    assert (code, err.splitlines()[1:]) == (2, ["  studies: two, none"])
    assert os.listdir(tmp_path)
