"""Searching in a notebook: what the cells show, and what an interrupt and a restarted kernel leave."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

import hpo
from tests.support.cells import SLOW
from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE, wait_for

CELL = f"import hpo, os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\n{SLOW}"
SEARCH = "hpo.search(objective, name='cell', trials=2, workers=1, direction='minimize', sampler='random')"
Outputs = list[dict[str, Any]]
Run = Callable[[Any], list[Outputs]]


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a notebook in a kernel of its own, in an empty folder, and return the outputs of each code cell."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(here / "jupyter"))
    monkeypatch.setenv("JUPYTER_PATH", str(Path(sys.prefix) / "share" / "jupyter"))

    def run_cells(notebook: Any) -> list[Outputs]:
        client = NotebookClient(
            notebook,
            timeout=PATIENCE,
            startup_timeout=PATIENCE,
            allow_errors=True,
            resources={"metadata": {"path": here}},
        )
        client.execute()
        return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]

    return run_cells


def shown(outputs: Outputs, kind: str) -> list[str]:
    """Return what a cell shows of one kind, such as text/html."""
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def printed(outputs: Outputs) -> str:
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def test_the_example_runs_and_shows_its_progress_without_escapes(run: Run) -> None:
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code"] == [[]] * 5
    _, search, best, table, weights = outputs = run(notebook)
    assert [output for cell in outputs for output in cell if output["output_type"] == "error"] == []
    picture, study = shown(search, "text/html")
    assert "notebook" in picture
    assert "8 of 8" in shown(search, "text/plain")[0]
    assert study.startswith("<pre>notebook  (maximize, sampler tpe, pruner median)\ntrials   8 of 8 finished")
    assert shown(best, "text/plain")[0].startswith("BestTrial(number=")
    assert "<table" in shown(table, "text/html")[0]
    assert "'0.weight': (" in shown(weights, "text/plain")[0]
    assert "\x1b" not in picture + "".join(map(printed, outputs))
    assert printed(search) == ""


def test_an_interrupted_cell_parks_and_a_restarted_kernel_goes_on(run: Run, here: Path) -> None:
    def interrupt() -> None:
        wait_for((here / "begun-0").exists)
        os.kill(int((here / "pid").read_text()), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    cells = [new_code_cell(CELL), new_code_cell(SEARCH), new_code_cell("study = hpo.open('cell')\nstudy")]
    _, search, after = run(new_notebook(cells=cells))
    thread.join()
    assert [output["ename"] for output in search if output["output_type"] == "error"] == ["KeyboardInterrupt"]
    assert "stopping: running trials are parked" in printed(search)
    assert "0 of 2 trials finished" in shown(after, "text/plain")[0]
    (here / "go").touch()
    _, search = run(new_notebook(cells=[new_code_cell(CELL), new_code_cell(SEARCH)]))
    assert "2 of 2 trials finished" in shown(search, "text/plain")[-1]
    assert [trial.number for trial in hpo.open("cell").optuna.trials] == [0, 1]
