"""A training of the user's own with `[space]`: what the file may hold, and what the function gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from hpo.errors import SpecError
from hpo.final import user_objective
from hpo.own import training
from hpo.spec import space, usercode
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import connect
from hpo.study import export, resolve
from hpo.study.fork import fork_study
from hpo.study.results import best
from hpo.study.study import Study, create_or_join
from hpo.worker import loop as worker_loop
from hpo.worker.signals import StopSignal

SPACE: dict[str, Any] = {
    "epochs": 3,
    "lr": {"low": 0.25, "high": 1.0},
    "model": {"layers": {"choices": [[1, 2], [3]]}, "deep": {"er": {"low": 1, "high": 4}}},
    "optimizer": {"name": {"choices": ["sgd", "adam"]}, "sgd": {"momentum": {"low": 0.5, "high": 0.9}}},
}
CODE = """
seen = []

def train(config, trial):
    seen.append(config)
    for epoch in range(config["epochs"]):
        trial.report(config["lr"] + epoch, epoch)
    return config["lr"] + sum(config["model"]["layers"]) + config["optimizer"].get("momentum", 0)

def alone(trial):
    return 0.0
"""


def document(**changes: Any) -> dict[str, Any]:
    found = {"name": "mine", "train": "mine.py:train", "direction": "minimize", "space": SPACE, "budget": {"trials": 6}}
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def made(folder: Path, **changes: Any) -> Study:
    spec = resolve.resolve(StudySpec.from_document(document(**changes)), folder)
    place = connect(f"sqlite:///{folder}/studies.db", create=True)
    return create_or_join(place, spec, code_folder=folder, code_digest="")


def work(study: Study, folder: Path) -> None:
    assert worker_loop.work(study, training.load(study.spec, folder), study.ledger("w"), StopSignal()) == 0


def test_the_function_gets_a_plain_dict_of_the_trial_s_values(folder: Path) -> None:
    study = made(folder)
    study.optuna.enqueue_trial({"lr": 0.5, "model.layers": [3], "model.deep.er": 2, "optimizer.name": "adam"})
    work(study, folder)
    first, *others = study.optuna.get_trials(deepcopy=False)
    assert first.value == 3.5
    assert first.params == {"lr": 0.5, "model.layers": "[3]", "model.deep.er": 2, "optimizer.name": "adam"}
    assert [trial.state for trial in (first, *others)] == [optuna.trial.TrialState.COMPLETE] * 6
    seen = usercode.load("mine.py:train", folder, "train").__globals__["seen"]
    assert seen[0] == {
        "epochs": 3,
        "lr": 0.5,
        "model": {"layers": [3], "deep": {"er": 2}},
        "optimizer": {"name": "adam"},
    }


def test_a_wrong_queued_value_fails_its_trial_alone(folder: Path) -> None:
    study = made(folder, budget={"trials": 2})
    study.optuna.enqueue_trial({"model.layers": [4]})
    work(study, folder)
    states = [trial.state for trial in study.optuna.get_trials(deepcopy=False)]
    assert states == [optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE]


def test_the_best_trial_is_exported_and_trained_again(folder: Path) -> None:
    study = made(folder)
    work(study, folder)
    (winner,) = best(study)
    file = folder / "best.toml"
    export.export(study, file)
    spec = StudySpec.load(file)
    assert spec.is_pinned
    assert spec.space["epochs"] == 3
    assert spec.space["lr"] == winner.params["lr"]
    assert spec.space["model"]["layers"] == winner.params["model.layers"]
    assert user_objective.run(spec, file, folder).value == winner.value


def test_a_fork_takes_the_trials_that_fit(folder: Path) -> None:
    study = made(folder)
    work(study, folder)
    narrower = {**SPACE, "lr": {"low": 0.25, "high": 0.5}}
    (folder / "next.toml").write_text("")
    wanted = resolve.complete(StudySpec.from_document(document(name="next", space=narrower)), folder / "next.toml")
    forked = fork_study(study, wanted)
    fitting = sum(trial.params["lr"] <= 0.5 for trial in study.optuna.get_trials(deepcopy=False))
    assert 0 < fitting < 6
    assert forked.taken == fitting
    assert list(forked.left.values()) == [6 - fitting]


def test_a_grid_comes_from_the_space(folder: Path) -> None:
    grid = {
        "lr": {"choices": [0.25, 0.5]},
        "model": {"layers": {"choices": [[1, 2], [3]]}},
        "optimizer": {},
        "epochs": 0,
    }
    study = made(folder, space=grid, sampler={"name": "grid"})
    work(study, folder)
    found = {(trial.params["lr"], trial.params["model.layers"]) for trial in study.optuna.get_trials(deepcopy=False)}
    assert found == {(lr, layers) for lr in (0.25, 0.5) for layers in ("[1,2]", "[3]")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": None}, "space: missing; train = 'mine.py:train' needs [space] with ranges"),
        (
            {"objective": "a.py:f"},
            "objective = 'a.py:f': cannot stand beside train = 'mine.py:train'; remove one of them",
        ),
        (
            {"model": {"name": "mlp"}},
            "model: belongs to a declared training, not to train = 'mine.py:train'; remove it",
        ),
        ({"params": {"lr": 1}}, "params: does not belong to train = 'mine.py:train'; write the values into [space]"),
        ({"train": None, "objective": "a.py:f"}, "space: does not belong to objective = 'a.py:f', whose suggest calls"),
        ({"train": None}, 'train: missing; [space] belongs to a training of your own: add train = "file.py:function"'),
        ({"direction": None}, 'direction: needed with an objective of your own; write "maximize" or "minimize"'),
        ({"space": {"lr": {"low": 2, "high": 1}}}, "space.lr: low = 2 is above high = 1; swap them"),
        ({"space": {"a.b": 1}}, "space.'a.b': a key with a dot would be read as a path; write a table"),
        ({"space": {"of": {"name": "x", "y": {}}}}, "space.of.y: no choice has this name: space.of.name is 'x'"),
    ],
)
def test_a_contradictory_file_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=r".*") as refused:
        StudySpec.from_document(document(**changes))
    assert message in str(refused.value)


def test_a_function_of_the_trial_alone_is_refused(folder: Path) -> None:
    with pytest.raises(SpecError) as refused:
        resolve.resolve(StudySpec.from_document(document(train="mine.py:alone")), folder)
    assert str(refused.value) == (
        "train = 'mine.py:alone': takes (trial), but is called with the config and the trial; write `def alone(config, trial)`"
    )


def test_branches_at_any_depth_make_a_space_conditional() -> None:
    assert space.is_conditional(space.lift(SPACE))
    assert space.is_conditional(space.lift({"deep": {"er": SPACE["optimizer"]}}))
    assert not space.is_conditional(space.lift({"model": SPACE["model"]}))
