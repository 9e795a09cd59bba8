"""Trials of another study: mapped into a changed space, taken from any storage of Optuna's, all at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from hpo.errors import SpecError, StorageError, StudyError
from hpo.spec import space as space_of
from hpo.spec.study_file import StudySpec
from hpo.storage import trial_writes
from hpo.storage.connect import Storage
from hpo.study import export, resolve, results, source, status
from hpo.study import study as studies
from hpo.study.fork import Forked, distribution_of, fork_study
from hpo.study.study import Study
from hpo.view import pages
from tests.support.trials import make
from tests.support.trials import taken as taken_up

OLD = {
    "lr": {"low": 0.01, "high": 1.0},
    "depth": 2,
    "optimizer": {"name": {"choices": ["sgd", "adam"]}, "sgd": {"momentum": {"low": 0.0, "high": 0.9}}},
    "epochs": 5,
}
#: The trials of the old study.
TRIALS: list[dict[str, Any]] = [
    {"lr": 0.1, "optimizer.name": "adam"},
    {"lr": 0.5, "optimizer.name": "sgd", "optimizer.sgd.momentum": 0.5},
    {"lr": 0.5, "optimizer.name": "adam"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(
        "def train(config, trial): return 0.0\n"
        "def objective(trial):\n"
        "    trial.suggest_float('lr', 0.01, 1.0)\n"
        "    trial.suggest_int('depth', 1, 4)\n"
        "    trial.report(0.5, 1)\n"
    )
    return tmp_path


def trained(study: Study, *given: Mapping[str, Any]) -> Study:
    """Give a study finished trials with these parameters, each with a curve."""
    old = dict(space_of.parameters(study.spec.tree))
    for place, params in enumerate(given):
        distributions = {path: distribution_of(old[path]) for path in params}
        curve = {1: 0.75, 2: 0.5 + place}
        state = TrialState.COMPLETE if place else TrialState.PRUNED
        trial = create_trial(state=state, value=0.5 + place, params=dict(params), distributions=distributions,
                             intermediate_values=curve, user_attrs={"note": place})  # fmt: skip
        study.optuna.add_trial(trial)
    return study


def wanted(folder: Path, space: dict[str, Any], **document: Any) -> resolve.StudyFile:
    base = {"name": "new", "train": "mine.py:train", "direction": "minimize", "space": space, "budget": {"trials": 4}}
    (folder / "new.toml").write_text("")
    document = {"checkpoints": str(folder / "checkpoints"), **base, **document}
    return resolve.complete(StudySpec.from_document({k: v for k, v in document.items() if v}), folder / "new.toml")


@pytest.fixture
def old(place: Storage, folder: Path) -> Study:
    study = make(place, folder, name="old", objective=None, train="mine.py:train", direction="minimize", space=OLD)
    return trained(study, *TRIALS)


def taken(study: Study, name: str = "new") -> list[dict[str, Any]]:
    return [trial.params for trial in studies.join(study.storage, name).optuna.get_trials()]


CASES: dict[str, tuple[dict[str, Any], list[int], dict[str, list[int]], list[str]]] = {
    "a constant is searched": ({"depth": {"low": 1, "high": 4}}, [0, 1, 2], {}, []),
    "a constant is searched elsewhere": (
        {"depth": {"low": 3, "high": 4}}, [], {"its depth is not in { low = 3, high = 4 }": [0, 1, 2]}, [],
    ),
    "a range is a constant": (
        {"lr": 0.5}, [1, 2], {"its lr is not 0.5, the constant of the file": [0]}, [],
    ),
    "a constant has changed": ({"epochs": 50}, [0, 1, 2], {}, ["epochs = 50, was 5"]),
    "a branch is gone": (
        {"optimizer": {"name": "adam"}},
        [0, 2], {"its optimizer.name is not 'adam', the constant of the file": [1]}, [],
    ),
    "a parameter is new": ({"width": {"low": 1, "high": 9}}, [], {"has no width": [0, 1, 2]}, []),
    "a parameter is gone": ({"lr": None}, [], {"has lr, which the file does not search": [0, 1, 2]}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trials_are_mapped_into_the_changed_space(case: str, old: Study, folder: Path) -> None:
    changes, numbers, left, changed = CASES[case]
    space = {key: value for key, value in {**OLD, **changes}.items() if value is not None}
    forked = fork_study(old, wanted(folder, space))
    assert (forked.taken, forked.left_behind, list(forked.changed)) == (len(numbers), left, changed)
    found = studies.join(old.storage, "new").optuna.get_trials()
    assert [trial.user_attrs["hpo:forked_from"] for trial in found] == numbers
    searched = set(dict(space_of.parameters(wanted(folder, space).spec.tree)))
    assert all(trial.params.keys() <= searched for trial in found)
    for trial in found:
        before = old.optuna.get_trials()[trial.user_attrs["hpo:forked_from"]]
        assert (trial.state, trial.value, trial.intermediate_values) == (
            before.state,
            before.value,
            before.intermediate_values,
        )
        of_constants = {"depth": 2} if case == "a constant is searched" else {}
        assert trial.params == {key: value for key, value in before.params.items() if key in searched} | of_constants


def test_what_old_trials_lack_is_told_and_names_may_change(old: Study, folder: Path) -> None:
    space = {**OLD, "width": {"low": 1, "high": 9}, "rate": OLD["lr"]}
    del space["lr"]
    file = wanted(folder, space)
    forked = fork_study(old, file, lacking={"width": 3}, renamed={"lr": "rate"})
    assert (forked.taken, forked.left) == (3, {})
    assert taken(old)[0] == {"rate": 0.1, "optimizer.name": "adam", "width": 3}
    for arguments, why in (
        ({"lacking": {"width": 33}}, r"width = 33: is not in .*; the nearest legal value is 9"),
        ({"lacking": {"widht": 3}}, r"widht: the file does not search it \(did you mean 'width'\?\)"),
        ({"renamed": {"lrr": "rate"}}, r"lrr: no trial has a parameter of this name \(did you mean 'lr'\?\)"),
        ({"renamed": {"lr": "optimizer.name"}}, "is the name of another parameter"),
        (
            {"renamed": {"lr": "rate", "optimizer.name": "rate"}},
            "cannot both be renamed to rate, since some trials have",
        ),
        ({"lacking": {"lr": 0.5}}, r"lr: the file does not search it"),
        (
            {"lacking": {"width": 3, "rate": 0.5}, "renamed": {"lr": "rate"}},
            r"^rate: no trial lacks it, the first has 0\.1; ",
        ),
    ):
        with pytest.raises(SpecError, match=why):
            fork_study(old, wanted(folder, space, name="other"), **arguments)
    assert studies.names(old.storage) == ["old", "new"]


def test_an_own_objective_may_ask_for_what_old_trials_lack(old: Study, folder: Path) -> None:
    file = wanted(folder, {}, train=None, objective="mine.py:objective")
    forked = fork_study(old, file)
    assert (forked.taken, list(forked.left_behind.values())) == (0, [[0, 1, 2]])
    lr = {"lr": old.optuna.trials[0].distributions["lr"]}
    old.optuna.add_trial(create_trial(value=1.0, params={"lr": 0.25}, distributions=lr))
    again = wanted(folder, {}, train=None, objective="mine.py:objective", name="again")
    assert fork_study(old, again, lacking={"depth": 3}).taken == 1
    assert taken(old, "again") == [{"lr": 0.25, "depth": 3}]
    with pytest.raises(SpecError, match="other: no trial that fits has such a parameter; leave it out"):
        fork_study(old, wanted(folder, {}, train=None, objective="mine.py:objective", name="third"),
                   lacking={"depth": 3, "other": 1})  # fmt: skip


@pytest.mark.both
def test_a_fork_is_made_whole_or_not_at_all(old: Study, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the process amid it leaves nothing that is in the way of a second call."""
    insert = trial_writes.insert_templates

    def cut_off(*arguments: Any) -> list[int]:
        insert(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trial_writes, "insert_templates", cut_off)
        with pytest.raises(KeyboardInterrupt):
            fork_study(old, wanted(folder, OLD))
    assert studies.names(old.storage) == ["old"]
    assert fork_study(old, wanted(folder, OLD, start=[{"lr": 0.25}])).taken == 3
    new = studies.join(old.storage, "new")
    assert [trial.state.name for trial in new.optuna.get_trials()] == ["PRUNED", "COMPLETE", "COMPLETE", "WAITING"]
    assert (new.budget, status.summarize(new).own_finished) == (7, 0)
    with pytest.raises(StudyError, match="there is a study 'new' already"):
        fork_study(old, wanted(folder, OLD))
    assert taken_up(new.ledger("w")).number == 3


# --- an import --------------------------------------------------------------------------------------------------------


def fill(storage: Any) -> None:
    """Make a study as a user of Optuna has it: complete, pruned, failed, running and queued trials."""
    study = optuna.create_study(study_name="theirs", storage=storage, direction="minimize")
    params = {"lr": 0.25, "opt": "sgd"}
    distributions = {
        "lr": optuna.distributions.FloatDistribution(0.01, 1.0),
        "opt": optuna.distributions.CategoricalDistribution(["sgd", "adam"]),
    }
    for state, value in ((TrialState.COMPLETE, 0.5), (TrialState.PRUNED, 0.75), (TrialState.FAIL, None)):
        study.add_trial(create_trial(state=state, value=value, params=params, distributions=distributions,
                                     intermediate_values={1: 0.75, 2: 0.5}, user_attrs={"note": "mine"}))  # fmt: skip
    params = {**params, "opt": "adam"}
    study.add_trial(create_trial(state=TrialState.COMPLETE, value=0.1, params=params, distributions=distributions))
    study.ask()
    study.enqueue_trial({"lr": 0.5})


SPACE = {"lr": {"low": 0.01, "high": 1.0, "log": True}, "optimizer": "sgd"}


@pytest.fixture(params=["sqlite", "journal", pytest.param("postgres", marks=pytest.mark.both)])
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        fill(JournalStorage(JournalFileBackend(str(tmp_path / "journal.log"))))
        return str(tmp_path / "journal.log")
    url = f"sqlite:///{tmp_path}/theirs.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
    storage = RDBStorage(url)
    fill(storage)
    storage.remove_session()
    storage.engine.dispose()
    return url


def imported(url: str, lite: Storage, file: resolve.StudyFile, **arguments: Any) -> tuple[Forked, Study]:
    with source.opened(url, "theirs") as taking:
        forked = fork_study(taking, file, lite, may_be_empty=False, **arguments)
    return forked, studies.join(lite, file.spec.name)


def test_an_optuna_study_becomes_prior_trials(theirs: str, lite: Storage, folder: Path) -> None:
    forked, new = imported(theirs, lite, wanted(folder, SPACE), renamed={"opt": "optimizer"})
    assert (forked.taken, forked.left_behind) == (
        2,
        {"its optimizer is not 'sgd', the constant of the file": [3]},
    )
    assert forked.unfinished == {"failed": 1, "running": 1, "queued": 1}
    found = new.optuna.get_trials()
    assert [(one.state.name, one.value, one.params, one.intermediate_values) for one in found] == [
        ("COMPLETE", 0.5, {"lr": 0.25}, {1: 0.75, 2: 0.5}),
        ("PRUNED", 0.75, {"lr": 0.25}, {1: 0.75, 2: 0.5}),
    ]
    assert [one.user_attrs for one in found] == [
        {"note": "mine", "hpo:forked_from": 0},
        {"note": "mine", "hpo:forked_from": 1},
    ]
    summary = status.summarize(new)
    assert (summary.own_finished, summary.own_budget, summary.imported) == (0, 4, 2)
    assert "best     0.5000 by trial 0, taken from another study" in pages.status_text(summary).splitlines()
    assert taken_up(new.ledger("w")).number == 2
    origin = export.taken_from(new, results.best(new)[0])
    assert (origin["study"], origin["made_by"], origin["trial"]) == ("theirs", "Optuna", 0)
    assert export.pinned(new, results.best(new)[0])["receipt"]["taken_from"] == origin
    assert "hpo:taken_from" not in json.dumps(export.pinned(new, results.best(new)[0]))


def test_no_study_is_made_if_nothing_fits(lite: Storage, folder: Path, tmp_path: Path) -> None:
    fill(JournalStorage(JournalFileBackend(str(tmp_path / "j.log"))))
    with pytest.raises(StudyError) as refused:
        imported(str(tmp_path / "j.log"), lite, wanted(folder, SPACE))
    assert refused.value.lines[1:] == [
        "  3 of them: has opt, which the file does not search",
        "  their parameters are lr, opt; give new names by --rename, and values that they lack by --set",
    ]
    assert studies.all_names(lite) == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://h", r"^storage .*: cannot be opened: "),
        ("no.log", r"storage no\.log: cannot be read: No such file"),
        ("mine.py", "is no file of Optuna's JournalStorage"),
        ("sqlite:///no.db", "no such file"),
        ("oracle://a:secret@h/d", r"^storage oracle:\*\*\*@h/d: cannot be opened: "),
    ],
)
def test_a_storage_that_is_none_is_refused(url: str, why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(StorageError, match=why):
        source.opened(url, "theirs").__enter__()


def test_a_name_that_is_none_is_refused_with_the_nearest(tmp_path: Path) -> None:
    fill(JournalStorage(JournalFileBackend(str(tmp_path / "j.log"))))
    with pytest.raises(StudyError, match=r"there is no study 'their' in .* \(did you mean 'theirs'\?\)"):
        source.opened(str(tmp_path / "j.log"), "their").__enter__()
