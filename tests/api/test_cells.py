"""Functions of a notebook's cell: searched by several workers, found again, exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import hpo
from hpo.final import train as final
from hpo.final import user_objective
from hpo.launch.local import Fleet
from hpo.queue import workers
from hpo.spec import pickled
from hpo.storage.connect import connect
from hpo.study.study import join
from tests.support.cells import cell
from tests.support.waiting import wait_for

CELL = """
scale = 2.0
def f(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.report(x * scale, 1)
    return x * scale
"""
ARGUMENTS: dict[str, Any] = {"name": "cell", "direction": "minimize", "sampler": "random", "workers": 2}


def test_the_same_cell_goes_on_and_a_changed_one_only_if_that_is_allowed(here: Path) -> None:
    study = hpo.search(cell(CELL), trials=3, **ARGUMENTS)
    assert study.best.value == 2 * study.best.params["x"]
    folder = join(connect("sqlite:///studies.db"), "cell").code_folder
    assert [file.name for file in folder.iterdir()] == ["function.pickle"]
    assert folder.parents[2] == here / ".hpo"
    hpo.search(cell(CELL.replace("trial.report", "# why\n    trial.report")), trials=4, **ARGUMENTS)
    for source, part in ((CELL.replace("2.0", "3.0"), "the global 'scale'"), (CELL.replace("1)", "2)"), "the code")):
        with pytest.raises(
            hpo.MismatchError, match=f"the function changed since the study was made: {part}; undo the change"
        ):
            hpo.search(cell(source), trials=5, **ARGUMENTS)
    assert len(study.optuna.trials) == 4
    hpo.search(cell(CELL.replace("2.0", "3.0")), trials=5, allow_code_change=True, **ARGUMENTS)
    last = study.optuna.trials[-1]
    assert last.value == 3 * last.params["x"]


def test_a_cell_imports_in_the_worker_what_it_imports_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "scripts").mkdir()
    (here / "scripts" / "weights_of_mine.py").write_text("W = 1.0")
    (here / "weights_of_mine.py").write_text("W = 2.0")
    monkeypatch.syspath_prepend(here / "scripts")
    function = cell("import weights_of_mine\ndef f(trial): return weights_of_mine.W")
    known = sys.modules["weights_of_mine"]
    study = hpo.search(function, trials=1, **{**ARGUMENTS, "workers": 1})
    assert study.best.value == 1.0
    assert sys.modules.pop("weights_of_mine") is known


def test_an_exported_trial_finds_its_function(here: Path) -> None:
    study = hpo.search(cell(CELL), trials=2, **ARGUMENTS)
    spec = final.load_pinned(study.export("best.toml"))
    folder = final.find_code_folder(spec, Path("best.toml"))
    assert user_objective.run(spec, Path("best.toml"), folder).value == study.best.value


def test_a_cell_with_a_space(here: Path) -> None:
    function = cell('def f(config, trial):\n    trial.report(config["lr"], 1)\n    return config["lr"]')
    space = {"lr": {"low": 1e-4, "high": 0.1, "log": True}}
    study = hpo.search(function, space=space, trials=2, **ARGUMENTS)
    assert study.best.config == {"lr": study.best.value}


def test_a_loop_with_processes_that_load_a_class_of_the_cell(here: Path) -> None:
    source = """
import torch
import hpo
class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return torch.tensor([float(index)])
def f(trial):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.suggest_float("lr", 1e-4, 1e-3))
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=2)
    for epoch in hpo.epochs(trial, 2, model=model, optimizer=optimizer):
        for numbers in loader:
            optimizer.zero_grad()
            loss = model(numbers).square().mean()
            loss.backward()
            optimizer.step()
        trial.report(float(loss), epoch)
    return float(loss)
"""
    study = hpo.search(cell(source), trials=1, **{**ARGUMENTS, "workers": 1})
    assert study.best.weights is not None
    assert hpo.load_weights(study.best.weights)["model"].keys() == {"weight", "bias"}


def test_what_cannot_be_pickled_is_told_before_a_study_is_made(here: Path) -> None:
    with pytest.raises(hpo.SpecError, match=r"hpo\.search: the global 'lock' cannot be pickled"):
        hpo.search(cell("import threading\nlock = threading.Lock()\ndef f(trial): return lock"), **ARGUMENTS)
    with pytest.raises(hpo.SpecError, match=r"hpo\.search: .*takes \(\), but is called with the trial"):
        hpo.search(cell("def f(): return 1.0"), **ARGUMENTS)
    assert not (here / "studies.db").exists()


def test_a_second_notebook_does_not_change_the_function_beneath_a_search(here: Path) -> None:
    source = "from pathlib import Path\nimport time\ndef f(trial):\n    Path('begun').touch()\n"
    source += "    while not Path('go').exists(): time.sleep(0.05)\n    return {}"
    hpo.search(cell(source.format(1.0)), trials=2, **{**ARGUMENTS, "workers": 0})
    hpo.search(cell(source.format(2.0)), trials=2, **{**ARGUMENTS, "workers": 0})  # nothing has run the first one
    place = connect("sqlite:///studies.db")
    study = join(place, "cell")
    fleet = Fleet(study, 1, code_folder=study.code_folder)
    launcher = study.ledger("launcher:other")
    workers.register(launcher)
    with pytest.raises(hpo.MismatchError, match="the function changed since the study was made: the code"):
        hpo.search(cell(source.format(3.0)), trials=2, **{**ARGUMENTS, "workers": 0})
    workers.unregister(launcher)
    fleet.start()
    try:
        wait_for((here / "begun").exists)
        hpo.search(cell(source.format(4.0)), trials=2, allow_code_change=True, **{**ARGUMENTS, "workers": 0})
        (here / "go").touch()
        wait_for(lambda: not fleet.tend())
    finally:
        fleet.end()
    assert [trial.value for trial in study.optuna.trials] == [2.0, 2.0]
    kept = sorted(pickled.load(folder)(None) for folder in study.code_folder.parent.iterdir())
    assert kept == [1.0, 2.0, 4.0]
    assert pickled.load(join(place, "cell").code_folder)(None) == 4.0
