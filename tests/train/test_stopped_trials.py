"""Trials that end by rules of their own: in the loop, in a stack, beside a pruner, resumed, exported, replayed, at last."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from hpo.errors import SpecError
from hpo.final import train as final
from hpo.spec.space import lift, middle
from hpo.spec.training import Stopping, TrainConfig
from hpo.storage import sql
from hpo.storage.connect import Storage
from hpo.storage.tables import hpo_curves, hpo_trials
from hpo.study import export, results
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.study.trial_history import history
from hpo.train import loop
from hpo.train.build import assemble, check
from hpo.train.early_stopping import verdict
from hpo.train.epoch import EpochResult
from hpo.train.run import Run
from hpo.view.pages import history_text, to_json
from tests.support.declared import DOCUMENT, Asked, made, nothing, quiet, work
from tests.support.stacks import Trial, digits, stop_before
from tests.support.trials import MakeStudy
from tests.support.waiting import wait_for

EXECUTORS = [{"executor": "loop"}, {"executor": "stack", "slots": 3}]
TRAINING = {"epochs": 8, "batch_size": 64}
AFTER_TWO = {"patience": 1, "monitor": "loss", "min_delta": 1000.0, "min_epochs": 2}  # every trial, after epoch 2


@pytest.fixture
def make_digits(lite: Storage, tmp_path: Path) -> MakeStudy:
    def make(trials: int, **changes: Any) -> Study:
        return made(lite, tmp_path, {**DOCUMENT, "budget": {"trials": trials}, "training": TRAINING, **changes})

    return make


def enqueued(study: Study, *trials: dict[str, Any]) -> Study:
    for given in trials:
        study.optuna.enqueue_trial(given)
    return studies.join(study.storage, study.name)


def reasons(study: Study) -> list[str | None]:
    with study.storage.engine.connect() as connection:
        ours = sa.select(hpo_trials.c.reason).where(hpo_trials.c.study_uid == study.uid)
        return list(connection.execute(ours.order_by(hpo_trials.c.trial_id)).scalars())


def ends(study: Study) -> list[tuple[str, int]]:
    """Return every trial's state and how many epochs it reported."""
    return [(trial.state.name, len(trial.intermediate_values)) for trial in study.optuna.get_trials(deepcopy=False)]


def curves(study: Study, number: int) -> dict[str, list[float]]:
    return results.best(study, number=number)[0].curves


def timeless(study: Study) -> list[Any]:
    count = len(study.optuna.trials)
    return [{k: list(v) for k, v in curves(study, n).items() if k != "seconds"} for n in range(count)]


@pytest.mark.parametrize("how", EXECUTORS)
def test_a_trial_ends_by_its_own_searched_rule(make_digits: MakeStudy, how: dict[str, Any]) -> None:
    """A trial ends complete where its own searched rule says so of its recorded curve."""
    rules = {"patience": {"low": 1, "high": 2}, "min_delta": {"low": 0.0, "high": 0.1}, "up": 1, "strip": 2}
    study = make_digits(6, stopping=rules, **how)
    assert work(study) == 0
    early = 0
    for trial, reason in zip(study.optuna.trials, reasons(study), strict=True):
        raw = curves(study, trial.number)
        epochs = len(raw["validation_loss"])
        chosen = {name.removeprefix("stopping."): value for name, value in trial.params.items() if "stopping." in name}
        assert chosen.keys() == {"patience", "min_delta"}
        settings = Stopping(monitor="accuracy", up=1, strip=2, **chosen)
        said = [verdict(settings, {k: v[:epoch] for k, v in raw.items()}) for epoch in range(1, epochs + 1)]
        assert said[:-1] == [None] * (epochs - 1)
        assert trial.state.name == "COMPLETE"
        assert trial.value == max(raw["validation_accuracy"]) == trial.intermediate_values[epochs]
        if epochs < 8:
            early += 1
            assert reason == f"stopped after epoch {epochs} by {said[-1]}"
        else:
            assert reason is None
    assert early >= 3


RATES = [{"optimizer.name": "sgd", "optimizer.lr": lr, "optimizer.sgd.momentum": 0.0} for lr in (0.1, 0.05, 1e-3)]


def test_loop_and_stack_stop_at_the_same_epochs(make_digits: MakeStudy) -> None:
    found = []
    for how in EXECUTORS:
        stopping = {"patience": 1, "monitor": "loss", "min_delta": 0.08}
        study = enqueued(make_digits(3, name=how["executor"], stopping=stopping, **how), *RATES)
        work(study)
        found.append((ends(study), [(reason or "")[:40] for reason in reasons(study)]))
    assert found[0] == found[1]
    assert len({epochs for _, epochs in found[0][0]}) > 1


@pytest.mark.parametrize("how", EXECUTORS)
def test_a_rung_prunes_before_a_rule_stops(make_digits: MakeStudy, how: dict[str, Any]) -> None:
    """Rungs at epochs 1, 2 and 4. At 1 the pruner ends the worst; the others stop by themselves at 2, which is a rung too."""
    pruner = {"name": "successive_halving", "min_resource": 1, "reduction_factor": 2}
    study = make_digits(3, pruner=pruner, stopping=AFTER_TWO, **how)
    study = enqueued(study, *RATES)
    assert work(study) == 0
    trials = study.optuna.trials
    assert ends(study)[0] == ("COMPLETE", 2)
    assert ends(study)[2] == ("PRUNED", 1)
    for trial, reason in zip(trials, reasons(study), strict=True):
        at_rungs = {key for key in trial.system_attrs if key.startswith("completed_rung")}
        assert at_rungs == {"completed_rung_0"}
        is_own = trial.state.name == "COMPLETE"
        assert (reason or "").startswith(
            "stopped after epoch 2 by stopping.patience = 1" if is_own else "by the pruner"
        )


@pytest.mark.parametrize(("asked_from", "end"), [(2, ("PRUNED", 2)), (3, ("COMPLETE", 8))])
@pytest.mark.parametrize("slots", [1, 2])
def test_a_stopped_trial_counts_at_its_own_epochs(
    make_digits: MakeStudy, asked_from: int, end: tuple[str, int], slots: int
) -> None:
    """The good trial stops after epoch 2; the poor one is asked about from epoch 2 or 3 on."""
    pruner = {"name": "median", "n_startup_trials": 1, "n_min_trials": 1, "n_warmup_steps": asked_from - 1}
    stopping = {**AFTER_TWO, "min_epochs": {"choices": [2, 8]}}
    study = make_digits(2, pruner=pruner, stopping=stopping, executor="loop" if slots == 1 else "stack", slots=slots)
    study = enqueued(study, {**RATES[0], "stopping.min_epochs": 2}, {**RATES[2], "stopping.min_epochs": 8})
    assert work(study) == 0
    assert ends(study)[0] == ("COMPLETE", 2)
    # Together in a stack the poor one's epoch 2 is judged after the good one has ended, in the very same epoch.
    assert ends(study)[1] == end


def test_a_trial_that_diverges_where_it_would_stop_has_diverged(make_digits: MakeStudy) -> None:
    study = make_digits(1, stopping=AFTER_TWO, optimizer={"name": "sgd", "lr": {"low": 1e30, "high": 2e30}})
    work(study)
    assert ends(study)[0][0] == "PRUNED"
    assert "epoch 1: loss" in (reasons(study)[0] or "")


@pytest.mark.parametrize(
    ("how", "asked"),
    [
        (EXECUTORS[0], 12),
        (EXECUTORS[1], 60),
        pytest.param(EXECUTORS[0], 60, marks=pytest.mark.soak),
        pytest.param(EXECUTORS[1], 12, marks=pytest.mark.soak),
    ],
)
def test_what_was_parked_stops_where_it_would_have_unbroken(
    make_digits: MakeStudy, how: dict[str, Any], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.worker.stacked_runner.LOOK_SECONDS", 0.0)
    stopping = {"patience": 2, "gradient_norm": 0.2}
    whole, broken = (make_digits(4, name=name, stopping=stopping, **how) for name in ("whole", "broken"))
    work(whole)
    assert work(broken, Asked(asked)) == 0
    assert "RUNNING" in [state for state, _ in ends(broken)]
    assert work(broken) == 0
    assert timeless(broken) == timeless(whole)
    assert reasons(broken) == reasons(whole)
    assert any(reason for reason in reasons(whole))


def test_a_state_of_a_run_that_has_stopped_is_finished() -> None:
    trial = Trial(splits=digits(), epochs=9, options={"stopping": Stopping(**AFTER_TWO)})
    run, other = trial.run(), trial.run()
    assert len(list(loop.train(run))) == 2
    assert run.finished
    other.load_state_dict(run.state_dict())
    assert other.finished
    assert other.stopped_by == run.stopped_by
    assert list(loop.train(other)) == []


def test_in_its_last_epoch_a_run_ends_by_having_had_all() -> None:
    run = Trial(splits=digits(), epochs=2, options={"stopping": Stopping(**AFTER_TWO)}).run()
    assert len(list(loop.train(run))) == 2
    assert run.stopped_by is None


def test_a_run_stops_by_its_time_counted_over_a_pause() -> None:
    def make() -> Run:
        return Trial(splits=digits(), epochs=100, options={"stopping": Stopping(max_seconds=5.0)}).run()

    run = make()
    list(loop.train(run, stop_before(6)))
    state = run.state_dict()
    state["seconds"] = 4.9  # spent on the epoch under way
    state["curves"]["seconds"] = [0.2]
    other = make()
    other.load_state_dict(state)
    assert len(list(loop.train(other))) == 1
    assert (other.stopped_by or "").startswith("stopping.max_seconds = 5: trained for 5.1")


def test_status_shows_why_a_trial_stopped_and_what_was_measured(make_digits: MakeStudy) -> None:
    study = make_digits(1, stopping=AFTER_TWO, watch={"norms": True, "metrics": ["auroc"]})
    work(study)
    found = history(study, 0)
    text = history_text(found)
    assert "reason   stopped after epoch 2 by stopping.patience = 1: validation loss did not improve on the " in text
    assert {
        "validation_auroc",
        "gradient_norm",
        "parameter_norm",
        "train_loss",
        "validation_loss",
    } <= found.metrics.keys()
    raw = curves(study, 0)
    assert f"measured validation_auroc = {raw['validation_auroc'][-1]:.4f}" in text
    assert found.raw == raw["validation_accuracy"]
    assert to_json(found)["overfits_since"] is None


@pytest.mark.parametrize("how", EXECUTORS)
def test_a_study_is_judged_by_any_metric(make_digits: MakeStudy, how: dict[str, Any]) -> None:
    training = {"epochs": 3, "batch_size": 64}
    study = make_digits(3, metric="calibration_error", watch={"metrics": ["macro_f1"]}, training=training, **how)
    assert work(study) == 0
    for trial in study.optuna.trials:
        raw = curves(study, trial.number)
        assert len(raw["validation_macro_f1"]) == 3
        assert trial.value == min(raw["validation_calibration_error"])
        assert trial.intermediate_values[2] == min(raw["validation_calibration_error"][:2])
    assert results.best(study)[0].value == min(trial.value for trial in study.optuna.trials if trial.value is not None)
    assert results.best(study)[0].receipt["parameters"] == 64 * 8 + 2 * 8 + 8 * 10 + 10


def test_a_k_that_says_nothing_is_refused_before_any_trial(make_digits: MakeStudy) -> None:
    study = make_digits(1, metric="top_10_accuracy")
    with pytest.raises(
        SpecError, match='metric = "top_10_accuracy": is 1 for every model, since the data has 10 classes'
    ):
        work(study)
    assert study.optuna.trials == []


def test_check_does_not_take_a_rule_for_unused(make_digits: MakeStudy, tmp_path: Path) -> None:
    tree = lift({**DOCUMENT_OF_ONE, "stopping": {"patience": {"low": 1, "high": 5}}})
    config = TrainConfig.from_tree(middle(tree, {}))
    splits = assemble.load_splits(config, 0, tmp_path, torch.device("cpu"))
    assert list(check.unused(tree, splits, 0, tmp_path, torch.device("cpu"))) == []


DOCUMENT_OF_ONE: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [8]},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"name": "constant"},
    "training": TRAINING,
}


# --- after the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", EXECUTORS)
def test_a_stopped_trial_replays_to_its_epoch(make_digits: MakeStudy, how: dict[str, Any], tmp_path: Path) -> None:
    """A stopped trial exports replays and trains again to the epoch at which it stopped."""
    watch = {"norms": True, "noise": True, "resources": True, "metrics": ["macro_f1"]}
    study = make_digits(4, stopping={"patience": {"low": 1, "high": 2}}, watch=watch, **how)
    work(study)
    number = min(range(4), key=lambda n: len(curves(study, n)["seconds"]))
    epochs = len(curves(study, number)["seconds"])
    assert epochs < 8
    old = {"study_uid": study.uid, "trial_id": study.optuna.trials[number]._trial_id, "epoch": 1, "value": 9.0}
    with sql.writing(study.storage.engine) as connection:
        connection.execute(hpo_curves.insert().values(metric="images_per_second", **old))
    (path,) = export.export(study, tmp_path / "best.toml", number=number)
    training = final.prepare(path)
    compared = training.spec.receipt["curves"].keys()
    assert compared >= {"gradient_norm", "parameter_norm", "gradient_variance", "validation_macro_f1"}
    assert not compared & {"seconds", "examples_per_second", "images_per_second", "peak_memory_mb"}
    assert training.config.stopping.patience == study.optuna.trials[number].params["stopping.patience"]
    assert final.replay(training, quiet) == []
    metrics = final.train(training, tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing)
    assert metrics is not None
    assert len(metrics["history"]) == epochs
    assert f"stopped after epoch {epochs} by {metrics['stopped_by']}" == reasons(study)[number]
    assert metrics["value"] == study.optuna.trials[number].value
    assert {"test_loss", "test_accuracy", "test_macro_f1", "parameters"} <= metrics.keys()
    assert (tmp_path / "run" / "trajectory.svg").read_text().count("<path") > 10


def test_a_replay_goes_as_far_as_the_trial(make_digits: MakeStudy, tmp_path: Path) -> None:
    """A replay goes as far as the trial whatever its rule says of time."""
    study = make_digits(1)
    work(study)
    (path,) = export.export(study, tmp_path / "best.toml")
    path.write_text(path.read_text() + "\n[stopping]\nmax_seconds = 1e-9\n")
    seen: list[Any] = []
    assert final.replay(final.prepare(path), seen.append) == []
    assert len(seen) == 8


@pytest.fixture
def pinned(tmp_path: Path) -> Path:
    """A pinned config whose training stops by itself after some epochs."""
    path = tmp_path / "pinned.toml"
    path.write_text(
        'name = "p"\n[data]\nname = "digits"\n[model]\nname = "mlp"\nwidths = [8]\n[optimizer]\nname = "sgd"\nlr = 0.1\n'
        "[training]\nepochs = 20\nbatch_size = 64\n[stopping]\npatience = 1\nmin_epochs = 3\nmin_delta = 0.5\n"
    )
    return path


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


SOAK = pytest.mark.soak


@pytest.mark.parametrize("batches", [pytest.param(7, marks=SOAK), 30, pytest.param(45, marks=SOAK)])
def test_a_stopped_final_training_goes_on_to_the_same_end(pinned: Path, tmp_path: Path, batches: int) -> None:
    """A final training that was stopped goes on to the same end and the same steps."""
    training = final.prepare(pinned)

    def trained(folder: str, stop: Callable[[], bool]) -> dict[str, Any] | None:
        return final.train(training, tmp_path / folder, stop=stop, progress=quiet, before_test=nothing)

    whole = trained("whole", lambda: False)
    assert trained("broken", stop_before(batches)) is None
    began = int(
        time.time()
    )  # event files are read by the second in their names, and in one by a count that sorts as text
    wait_for(lambda: int(time.time()) > began)
    broken = trained("broken", lambda: False)
    assert whole is not None
    assert broken is not None
    for one in (whole, broken):
        for epoch in one["history"]:
            epoch.pop("seconds")
        one.pop("receipt")
    assert whole == broken
    assert len(whole["history"]) == 3
    assert whole["stopped_by"].startswith("stopping.patience = 1")
    left, right = (scalars(tmp_path / folder / "steps") for folder in ("whole", "broken"))
    assert left == right
    assert {tag: [step for step, _ in found] for tag, found in left.items()} == {
        f"step/{name}": list(range(1, 3 * 19 + 1)) for name in ("loss", "gradient_norm", "parameter_norm")
    }
    by_epoch = scalars(tmp_path / "whole")
    last = whole["history"][-1]
    gap = last["validation_loss"] - last["train_loss"]
    assert by_epoch["generalisation_gap"][-1] == (3, pytest.approx(gap))
    assert by_epoch["overfitting"][-1] == (3, 0.0)
    steps = [(epoch, epoch) for epoch in (1, 2, 3)]
    assert [tag for tag, found in by_epoch.items() if found == steps] == []  # each card shows something by epoch
    assert by_epoch["gradient_norm"][0][1] == pytest.approx(
        sum(value for _, value in left["step/gradient_norm"][:19]) / 19
    )


def test_a_final_training_killed_after_its_last_checkpoint_goes_on_to_the_same_end(
    pinned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is of epoch 1, the logs of epoch 2: each epoch and each step is in the logs once."""
    training, whole, killed = final.prepare(pinned), tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr(final, "SAVE_SECONDS", 0.0)

    def copy_what_a_kill_leaves(result: EpochResult) -> None:
        if result.epoch == 1:
            shutil.copytree(whole, killed)
        elif result.epoch == 2:
            shutil.copytree(whole, killed, dirs_exist_ok=True, ignore=shutil.ignore_patterns(final.CHECKPOINT))

    def trained(folder: Path, progress: Callable[[EpochResult], None]) -> dict[str, Any]:
        found = final.train(training, folder, stop=lambda: False, progress=progress, before_test=nothing)
        assert found is not None
        history = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in found["history"]]
        return {**found, "history": history, "receipt": None}

    def write_slowly(writer: RecordWriter, entry: bytes) -> None:
        time.sleep(0.003)
        write(writer, entry)

    write = RecordWriter.write
    with monkeypatch.context() as disk:
        disk.setattr(RecordWriter, "write", write_slowly)
        in_one_go = trained(whole, copy_what_a_kill_leaves)
    assert [step for step, _ in scalars(killed)["generalisation_gap"]] == [1, 2]
    began = int(time.time())
    wait_for(lambda: int(time.time()) > began)  # event files are read by the second in their names
    epochs: list[int] = []
    assert trained(killed, lambda result: epochs.append(result.epoch)) == in_one_go
    assert epochs == [2, 3]
    assert scalars(killed / "steps") == scalars(whole / "steps")
    assert [step for step, _ in scalars(killed)["generalisation_gap"]] == [1, 2, 3]


def test_a_training_that_overfits_is_flagged(tmp_path: Path) -> None:
    """Labels that mean nothing: the model can only learn them by heart."""
    source = tmp_path / "noise.py"
    source.write_text(
        "import torch\nfrom hpo.data import Source\ndef noise():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    images = torch.randint(0, 255, (200, 1, 8, 8), dtype=torch.uint8, generator=g)\n"
        "    return Source(images=images, labels=torch.arange(200) % 4, num_classes=4)\n"
    )
    path = tmp_path / "noise.toml"
    path.write_text(
        'name = "n"\n[data]\nname = "noise:noise"\n[model]\nname = "mlp"\nwidths = [64]\n[optimizer]\nname = "adamw"\n'
        "lr = 0.01\n[training]\nepochs = 12\nbatch_size = 16\n"
    )
    metrics = final.train(
        final.prepare(path), tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing
    )
    assert metrics is not None
    validation = [one["validation_loss"] for one in metrics["history"]]
    assert metrics["overfits_since"] == int(np.argmin(validation)) + 1
    assert [value for _, value in scalars(tmp_path / "run")["overfitting"]][-1] == 1.0
    assert math.isfinite(json.loads((tmp_path / "run" / "metrics.json").read_text())["test_loss"])
