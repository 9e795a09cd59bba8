"""Known configurations are queued all or none, and workers take them before new trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.errors import SpecError, StudyError
from hpo.queue.claiming import Idle, claim_many
from hpo.spec import space
from hpo.study import configuration_file, queued_trials
from hpo.study.study import Study
from tests.support.trials import MakeStudy, begin, end_trial, make, suggested, trial_of

SPACE = {"lr": {"low": 1e-4, "high": 0.1, "log": True}, "widths": {"choices": [[32], [64, 32]]}, "epochs": 20}


@pytest.fixture
def spaced(make_study: MakeStudy, tmp_path: Path) -> Study:
    """A study whose space is known."""
    (tmp_path / "mine.py").write_text("def train(config, trial): return config['lr']\n")
    place = make_study(name="other").storage
    return make(place, tmp_path, objective=None, train="mine.py:train", space=SPACE, budget={"trials": 3})


@pytest.mark.both
def test_queued_trials_come_first_and_count_as_they_begin(spaced: Study) -> None:
    queued = queued_trials.enqueue(spaced, [{"lr": 0.01}, {"lr": 0.05, "widths": [32]}])
    assert [(one.number, one.missing) for one in queued] == [(0, ["widths"]), (1, [])]
    ledger = spaced.ledger("w")
    claims = claim_many(ledger, 9)
    assert not isinstance(claims, Idle)
    assert [claim.number for claim in claims] == [0, 1, 2]  # two queued ones and a new one: the budget of three
    assert [trial.system_attrs for trial in spaced.optuna.get_trials()] == [
        {"fixed_params": {"lr": 0.01}},
        {"fixed_params": {"lr": 0.05, "widths": "[32]"}},
        {},
    ]
    assert claim_many(ledger, 9) is Idle.WAIT


def test_a_queued_trial_gets_its_values_and_the_sampler_the_rest(spaced: Study) -> None:
    queued_trials.enqueue(spaced, [{"lr": 0.01, "epochs": 20}])
    _, _, trial = begin(spaced)
    trial.read_queued(spaced.spec.tree)
    config = suggested(trial, lambda one: space.suggest(spaced.spec.tree, one))
    assert config["lr"] == 0.01
    assert config["widths"] in ([32], [64, 32])


@pytest.mark.both
def test_of_several_configurations_all_are_queued_or_none(spaced: Study) -> None:
    with pytest.raises(SpecError, match=r"^configuration 2: lr = 1: is not in .*; the nearest legal value is 0\.1$"):
        queued_trials.enqueue(spaced, [{"lr": 0.01}, {"lr": 1}])
    assert spaced.optuna.get_trials() == []


def test_a_deleted_study_takes_nothing(spaced: Study) -> None:
    spaced.storage.optuna.delete_study(spaced.study_id)
    with pytest.raises(StudyError, match="was deleted"):
        queued_trials.enqueue(spaced, [{"lr": 0.01}])


@pytest.mark.both
def test_an_own_objective_is_checked_against_what_its_trials_were_asked_for(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    [first] = queued_trials.enqueue(study, [{"x": 0.25, "tpyo": 1}])
    assert (first.unknown, first.missing) == (["x", "tpyo"], [])  # no trial has run: nothing can be checked
    _, _, trial = begin(study)
    assert trial.suggest_float("x", 0, 1) == 0.25
    trial.suggest_categorical("c", [None, "a"])
    end_trial(trial, trial_of(study, 0).state.COMPLETE, 0.5)
    [second] = queued_trials.enqueue(study, [{"c": None}])
    assert (second.values, second.missing, second.unknown) == ({"c": None}, ["x"], [])
    for wrong, why in {
        "x": r"^x = 2: is not in \{ low = 0\.0, high = 1\.0 \}; the nearest legal value is 1\.0$",
        "xs": r"^xs: no trial of the objective has had it \(did you mean 'x'\?\); --unknown takes it all the same$",
    }.items():
        with pytest.raises(SpecError, match=why):
            queued_trials.enqueue(study, [{wrong: 2}])
    [third] = queued_trials.enqueue(study, [{"xs": 2}], unknown=True)
    assert (third.values, third.unknown) == ({"xs": 2}, ["xs"])
    assert len(study.optuna.trials) == 3


def test_a_value_may_fit_any_range_that_an_objective_has_had(make_study: MakeStudy) -> None:
    study = make_study(trials=9)
    for high in (1, 5):
        _, _, trial = begin(study)
        trial.suggest_float("x", 0, high)
    assert queued_trials.enqueue(study, [{"x": 4}])[0].values == {"x": 4.0}
    with pytest.raises(SpecError, match=r"the nearest legal value is 5\.0"):
        queued_trials.enqueue(study, [{"x": 6}])


def test_a_file_holds_start_tables_or_a_pinned_config(spaced: Study, tmp_path: Path) -> None:
    file = tmp_path / "given.toml"
    file.write_text('[[start]]\nlr = 0.01\n[[start]]\n"widths" = [32]\n')
    assert configuration_file.read(file, spaced.spec).configurations == [{"lr": 0.01}, {"widths": [32]}]
    file.write_text('name = "x"\n[space]\nlr = 0.01\nepochs = 50\nlayers = 2\n[receipt]\ntrial = 3\n')
    found = configuration_file.read(file, spaced.spec)
    assert found.configurations == [{"lr": 0.01}]
    assert found.left == ["epochs = 50: here it is 20", "layers = 2: the study has no such value"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[start]\nlr = 0.1\n", r"given\.toml: start: is one table; write \[\[start\]\]"),
        ("start = 3\n", r"start: is no list of tables; write \[\[start\]\]"),
        ("x = 1\n", r"holds neither \[\[start\]\] tables nor \[space\]"),
        ("[space]\nlr = { low = 0.1, high = 1 }\n", r"lr: is searched, .*; give a pinned config"),
        ("[space]\nrate = 1\n", r"holds no value of what the study searches: \['lr', 'widths'\]"),
    ],
)
def test_another_file_is_refused(content: str, why: str, spaced: Study, tmp_path: Path) -> None:
    (tmp_path / "given.toml").write_text(content)
    with pytest.raises(SpecError, match=why):
        configuration_file.read(tmp_path / "given.toml", spaced.spec)
