"""A study in MLflow's own store: runs with right states, parameters and curves, and the same runs after a second export."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import optuna
import pytest

pytest.importorskip("mlflow")

from mlflow import MlflowClient
from mlflow.entities import Run

from hpo import cli
from hpo.errors import Fault, SpecError
from hpo.spec import extras
from hpo.storage.connect import plain_url
from hpo.study.study import Study
from hpo.view.mlflow_runs import Exporter
from tests.support.trials import MakeStudy
from tests.support.user_loops import work


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def runs(uri: str, study: Study) -> dict[str, Run]:
    """Return the study's runs by name; each name is there once."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    by_name = {run.info.run_name: run for run in found}
    assert len(by_name) == len(found)
    return by_name


def curve(uri: str, run: Run, key: str) -> list[tuple[int, float]]:
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, key)
    return [(one.step, one.value) for one in history]


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", 0.0, 1.0)
    trial.suggest_categorical("kind", ["a", "b"])
    for step in range(3):
        trial.report(x + step, step)
        if trial.number == 1 and step == 1:
            raise optuna.TrialPruned("too slow")
    if trial.number == 2:
        raise ValueError("no")
    return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_each_trial_is_one_run_within_the_study_s_and_a_second_export_updates(make_study: MakeStudy, uri: str) -> None:
    study = make_study(trials=4)
    foreign = study.optuna.ask()  # runs elsewhere
    foreign.suggest_float("x", 0.0, 1.0)
    foreign.report(0.5, 0)
    Exporter(study, uri).export()
    assert {name: run.info.status for name, run in runs(uri, study).items()} == {
        study.name: "RUNNING",
        "trial 0": "RUNNING",
    }
    foreign.report(math.inf, 1)
    study.optuna.tell(foreign, 0.25)
    work(study, objective)
    for _ in range(2):
        summary = Exporter(study, uri).export()
    assert summary.is_over
    found = runs(uri, study)
    parent = found.pop(study.name)
    assert (parent.info.status, parent.data.tags["hpo_study_uid"]) == ("FINISHED", study.uid)
    assert summary.best is not None
    assert curve(uri, parent, "best_value") == [(4, summary.best.value)]
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert {name: (run.info.status, run.data.tags["hpo_state"]) for name, run in found.items()} == {
        "trial 0": ("FINISHED", "complete"),
        "trial 1": ("KILLED", "pruned"),
        "trial 2": ("FAILED", "fail"),
        "trial 3": ("FINISHED", "complete"),
    }
    for trial in study.optuna.get_trials(deepcopy=False):
        run = found[f"trial {trial.number}"]
        assert run.data.params == {key: str(value) for key, value in trial.params.items()}
        largest = sys.float_info.max  # what MLflow's store makes of infinity
        reported = [(step, min(value, largest)) for step, value in sorted(trial.intermediate_values.items())]
        assert curve(uri, run, "value") == reported
        assert run.data.metrics.get("final_value") == trial.value
        assert trial.datetime_complete is not None
        assert run.info.end_time >= run.info.start_time
    assert found["trial 1"].data.tags["hpo_attempts"] == "1"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_store_that_mlflow_refuses_is_named(make_study: MakeStudy, tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"MLflow at \S+: The filesystem tracking backend"):
        Exporter(make_study(), f"file://{tmp_path}/runs")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_following_ends_with_the_study(
    make_study: MakeStudy, uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, states = make_study(trials=2), []

    def work_meanwhile(_: float) -> None:
        states.append({name: run.info.status for name, run in runs(uri, study).items()})
        work(study, lambda trial: trial.suggest_float("x", 0.0, 1.0))

    monkeypatch.setattr("hpo.cli.results.time.sleep", work_meanwhile)
    cli.app(
        ["mlflow", study.name, "--to", uri, "--follow", "--storage", plain_url(study.storage.url)],
        standalone_mode=False,
    )
    assert states == [{study.name: "RUNNING"}]
    assert {run.info.status for run in runs(uri, study).values()} == {"FINISHED"}
    assert f"wrote 2 trials of {study.name!r} to " in capsys.readouterr().out


def test_without_the_extra_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "mlflow", ("no_such_package",))
    with pytest.raises(
        SpecError, match=r"hpo mlflow: needs no_such_package, which is not installed: pip install .*\[mlflow\]"
    ):
        cli.app(["mlflow", "digits"], standalone_mode=False)
