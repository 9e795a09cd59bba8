"""The declared objective in a worker: trials become configs, configs curves, curves rows; parked ones go on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState

from hpo.errors import LostLease, MismatchError, SpecError, StorageError
from hpo.queue import reaper
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.spec import space
from hpo.spec.training import TrainConfig
from hpo.storage.connect import Storage
from hpo.storage.tables import hpo_trials
from hpo.study import results
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.train import loop
from hpo.train.build import assemble
from hpo.worker import loop as worker_loop
from hpo.worker.attempt import open_trial
from hpo.worker.checkpoints import CheckpointManager
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial
from tests.support.declared import DOCUMENT, made, work
from tests.support.trials import claim_one, end_trial, held


@pytest.fixture
def make_digits(place: Storage, tmp_path: Path) -> Callable[..., Study]:
    def make(trials: int, **changes: Any) -> Study:
        return made(place, tmp_path, {**DOCUMENT, "budget": {"trials": trials}, **changes})

    return make


def new_row(study: Study) -> Any:
    with study.storage.engine.connect() as connection:
        return connection.execute(sa.select(hpo_trials).where(hpo_trials.c.study_uid == study.uid)).one()


def curves(study: Study) -> list[list[float]]:
    return [results.best(study, number=t.number)[0].curves["validation_accuracy"] for t in study.optuna.trials]


def test_a_trial_s_config_curve_and_value_reach_the_database(make_digits: Callable[..., Study]) -> None:
    study = make_digits(3)
    assert work(study) == 0
    for trial in study.optuna.trials:
        assert trial.state == TrialState.COMPLETE
        branch = {"optimizer.sgd.momentum"} if trial.params["optimizer.name"] == "sgd" else set()
        always = {"model.dropout", "optimizer.name", "optimizer.lr", "schedule.name"}
        assert trial.params.keys() == always | branch
        raw = results.best(study, number=trial.number)[0].curves
        assert raw.keys() == {"train_loss", "validation_loss", "validation_accuracy", "learning_rate", "seconds"}
        best_so_far = [max(raw["validation_accuracy"][: epoch + 1]) for epoch in range(3)]
        assert trial.intermediate_values == dict(enumerate(best_so_far, start=1))
        assert trial.value == best_so_far[-1]


def test_a_receipt_names_seed_data_versions_and_device(make_digits: Callable[..., Study]) -> None:
    study = make_digits(1)
    work(study)
    receipt = results.best(study)[0].receipt
    assert receipt["device"] == "cpu"
    assert receipt["threads"] == 1
    assert receipt["executor"] == "loop"
    assert len(receipt["data_digest"]) == 64
    assert receipt["versions"].keys() >= {"python", "torch", "optuna", "hpo"}
    assert isinstance(receipt["seed"], int)


@pytest.mark.parametrize("batches", [0, 1, 20, 25, 40])
def test_a_parked_trial_goes_on_to_the_very_curve_of_an_unbroken_one(
    make_digits: Callable[..., Study], batches: int
) -> None:
    whole = make_digits(1, name="whole")
    work(whole)
    broken = make_digits(1, name="broken")
    asked = iter(range(10_000))

    class AfterBatches(StopSignal):
        def __call__(self) -> bool:
            return self.received is not None or next(asked) > batches + 3  # the worker itself asks four times before

    stopping = AfterBatches()
    work(broken, stopping)
    assert [trial.state for trial in broken.optuna.trials] == [TrialState.RUNNING]
    assert len(list(broken.trial_folder(0).glob("*.pt"))) == 1
    assert work(broken) == 0
    assert curves(broken) == curves(whole)
    assert [trial.value for trial in broken.optuna.trials] == [trial.value for trial in whole.optuna.trials]
    assert results.best(broken)[0].attempt == 2
    assert len(list(broken.trial_folder(0).glob("*.pt"))) == 1  # of the best trial the last one stays


def test_a_diverged_trial_is_pruned_at_once_and_says_so(make_digits: Callable[..., Study]) -> None:
    study = make_digits(1, optimizer={"name": "sgd", "lr": {"low": 1e30, "high": 2e30}}, schedule={"name": "constant"})
    work(study)
    (trial,) = study.optuna.trials
    assert trial.state == TrialState.PRUNED
    with study.storage.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_trials)).one()
    assert row.outcome == "diverged"
    assert "loss" in row.reason
    assert len(trial.intermediate_values) == 1


def test_a_hopeless_trial_is_pruned_on_its_validation_curve(make_digits: Callable[..., Study]) -> None:
    study = make_digits(
        4,
        pruner={"name": "percentile", "percentile": 50.0, "n_startup_trials": 2, "n_min_trials": 1},
        optimizer={"name": "sgd", "lr": {"low": 1e-6, "high": 1e-1, "log": True}},
    )
    for lr in (0.1, 0.1, 1e-6, 1e-6):
        study.optuna.enqueue_trial({"optimizer.lr": lr, "model.dropout": 0.0, "schedule.name": "constant"})
    work(studies.join(study.storage, study.name))
    assert [trial.state.name for trial in study.optuna.trials] == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    assert [len(trial.intermediate_values) for trial in study.optuna.trials] == [3, 3, 1, 1]


def test_two_studies_of_one_seed_train_the_same(make_digits: Callable[..., Study]) -> None:
    """Two studies of one seed train the same curves whatever the worker."""
    one, other = make_digits(2, name="one"), make_digits(2, name="other")
    work(one)
    work(other)
    assert curves(one) == curves(other)
    assert curves(one)[0] != curves(one)[1]


def test_other_data_is_refused_before_anything_is_trained(make_digits: Callable[..., Study]) -> None:
    study = make_digits(2)
    studies.check_data(study, "0" * 64)
    with pytest.raises(MismatchError, match="data"):
        work(study)
    assert study.optuna.trials == []


def test_a_model_that_cannot_be_built_is_refused_first(
    make_digits: Callable[..., Study],
) -> None:
    """A model that some trial could not build is refused before anything is trained."""
    study = make_digits(1, model={"name": "cnn", "channels": {"choices": [[4], [4, 4, 4, 4]]}})
    with pytest.raises(SpecError, match="halves an image of 8x8 pixels 4 times"):
        work(study)
    assert study.optuna.trials == []


def test_optuna_s_own_tools_read_the_trials(make_digits: Callable[..., Study]) -> None:
    study = make_digits(6)
    work(study)
    importances = optuna.importance.get_param_importances(study.optuna, params=["optimizer.lr", "model.dropout"])
    assert importances.keys() == {"optimizer.lr", "model.dropout"}


def test_a_checkpoint_that_cannot_be_read_costs_epochs(make_digits: Callable[..., Study]) -> None:
    """A checkpoint that cannot be read costs the epochs and not the trial."""
    study = make_digits(1)
    asked = iter(range(10_000))

    class AfterBatches(StopSignal):
        def __call__(self) -> bool:
            return self.received is not None or next(asked) > 42

    work(study, AfterBatches())
    (file,) = study.trial_folder(0).glob("*.pt")
    file.write_bytes(b"not a checkpoint")
    assert work(study) == 0
    (trial,) = study.optuna.trials
    assert trial.state == TrialState.COMPLETE
    whole = make_digits(1, name="whole")
    work(whole)
    assert curves(study) == curves(whole)


def test_a_worker_that_slept_leaves_the_new_checkpoint(make_digits: Callable[..., Study], tmp_path: Path) -> None:
    """A worker that slept through a take-over leaves the new owner's checkpoint."""
    study = make_digits(1)
    old, new = study.ledger("old"), study.ledger("new")

    def open_at(ledger: Ledger) -> LeasedTrial:
        claim = claim_one(ledger)
        assert isinstance(claim, Claim)
        study.optuna.get_trials(deepcopy=False)
        return open_trial(study, *held(ledger, claim))

    config = TrainConfig.from_tree(space.middle(study.spec.tree, {}))
    splits = assemble.load_splits(config, 0, tmp_path, torch.device("cpu"))

    def saver_of(trial: LeasedTrial) -> CheckpointManager:
        run = assemble.build_run(config, splits, 0, tmp_path, torch.device("cpu"))
        return CheckpointManager(study, run, trial)

    slow = saver_of(open_at(old))
    slow.save(1)
    old.park(slow.trial.lease.claim)
    fast = saver_of(open_at(new))
    fast.save(2)
    with pytest.raises(LostLease):
        slow.save(3)
    recorded = new_row(study).checkpoint_path
    assert recorded in [str(file) for file in study.trial_folder(0).glob("*.pt")]


def test_an_outage_at_a_receipt_is_no_failure(
    make_digits: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage error as a receipt is written is not the trial's failure."""
    study = make_digits(1, recovery={"outage_patience": "1s"})

    def broken(self: Ledger, *arguments: object) -> None:
        raise sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "record_receipts", broken)
        with pytest.raises(StorageError, match="closed the connection"):
            work(study)
    reaper.release_leases_of(study.ledger("launcher"), "w")
    assert work(study) == 0
    assert [trial.state for trial in study.optuna.trials] == [TrialState.COMPLETE]


GREEDY = """
import torch
from torch import nn

class Greedy(nn.Module):
    def __init__(self, inputs, num_classes):
        super().__init__()
        self.layer = nn.Linear(inputs, num_classes)

    def forward(self, images):
        if self.training and len(images) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.layer(images.flatten(1))

def greedy(input_shape, num_classes, *, unused: int = 0):
    return Greedy(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
"""


def test_out_of_memory_makes_micro_batches_smaller(make_digits: Callable[..., Study], tmp_path: Path) -> None:
    """A trial that runs out of memory is tried in smaller micro batches of the same batch."""
    (tmp_path / "greedy.py").write_text(GREEDY)
    study = make_digits(1, model={"name": "greedy:greedy"}, training={"epochs": 2, "batch_size": 64})
    codes = []
    while not codes or codes[-1] == worker_loop.RECYCLE:
        codes.append(work(study))
    assert codes == [worker_loop.RECYCLE, worker_loop.RECYCLE, 0]  # 64 rows at once, 32, 16
    (result,) = results.best(study)
    assert (result.attempt, result.receipt["accumulation"]) == (3, 4)
    config = TrainConfig.from_tree(space.pin(study.spec.tree, lambda path, parameter: result.params[path]))
    cpu = torch.device("cpu")
    splits = assemble.load_splits(config, 0, tmp_path, cpu)
    run = assemble.build_run(config, splits, result.receipt["seed"], tmp_path, cpu, accumulation=4)
    assert [epoch.validation_accuracy for epoch in loop.train(run)] == result.curves["validation_accuracy"]


def test_a_trial_that_trains_for_too_long_is_pruned_with_what_it_has(make_digits: Callable[..., Study]) -> None:
    budget = {"trials": 1, "trial_timeout": "1s"}
    study = make_digits(1, training={"epochs": 100_000, "batch_size": 64}, budget=budget)
    work(study)
    (trial,) = study.optuna.trials
    assert trial.state == TrialState.PRUNED
    assert trial.value == max(trial.intermediate_values.values())
    assert new_row(study).outcome == "time_limit"


def test_time_trained_before_a_pause_counts_towards_the_limit(make_digits: Callable[..., Study]) -> None:
    budget = {"trials": 1, "trial_timeout": "10s"}
    study = make_digits(1, training={"epochs": 100_000, "batch_size": 64}, budget=budget)

    class AfterAnEpoch(StopSignal):
        def __call__(self) -> bool:
            return bool(study.optuna.trials and study.optuna.trials[0].intermediate_values)

    work(study, AfterAnEpoch())
    claim = claim_one(study.ledger("w"))
    assert isinstance(claim, Claim)
    study.optuna.get_trials(deepcopy=False)
    left = open_trial(study, *held(study.ledger("w"), claim)).lease.seconds_left
    assert left is not None
    assert 0.0 < left < 10.0


def test_the_best_trials_keep_their_last_checkpoint_and_no_other_does(make_digits: Callable[..., Study]) -> None:
    study = make_digits(6, recovery={"keep_checkpoints": 2, "checkpoint_every": "0s"})
    work(study)
    ranked = sorted(study.optuna.trials, key=lambda trial: (-(trial.value or 0.0), trial.number))
    kept = sorted(folder.name for folder in study.checkpoints.glob("trial-*"))
    assert kept == sorted(f"trial-{trial.number:06d}" for trial in ranked[:2])
    best = results.best(study)[0]
    assert best.checkpoint is not None
    assert torch.load(best.checkpoint, weights_only=True)["epoch"] == 3


def test_a_checkpoint_on_a_disk_that_takes_none_costs_no_trial(
    make_digits: Callable[..., Study], caplog: pytest.LogCaptureFixture
) -> None:
    study = make_digits(1, recovery={"checkpoint_every": "0s"})
    study.trial_folder(0).touch()  # a file where the folder should be
    assert work(study) == 0
    assert [trial.state for trial in study.optuna.trials] == [TrialState.COMPLETE]
    assert caplog.text.count("no checkpoint of epoch") == 1  # told once


@pytest.mark.both
@pytest.mark.parametrize("pruner", ["median", "successive_halving"])  # hyperband: the name decides on the bracket
def test_a_trial_that_goes_on_from_a_checkpoint_is_judged_by_no_value_after_it(
    make_digits: Callable[..., Study], pruner: str
) -> None:
    """One curve in two studies: unbroken, and lost after a fine epoch that the checkpoint does not hold."""
    settings = {"name": pruner} | ({"n_startup_trials": 2, "n_min_trials": 1} if pruner == "median" else {})
    curve = [0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]

    def attempt(study: Study, values: list[float], first: int) -> tuple[Ledger, LeasedTrial, list[bool]]:
        ledger = study.ledger("w")
        claim = claim_one(ledger)
        assert isinstance(claim, Claim)
        study.optuna.get_trials(deepcopy=False)
        trial = open_trial(study, *held(ledger, claim))
        decisions = []
        for step, value in enumerate(values, start=first):
            trial.write(trial.reporting(step, value, {"validation_accuracy": value}))
            decisions.append(trial.pruner_says_stop())
        return ledger, trial, decisions

    def with_history(name: str) -> Study:
        study = make_digits(9, name=name, pruner=settings, value="last", training={"epochs": 9, "batch_size": 64})
        study = studies.join(study.storage, name)
        for height in (0.3, 0.4, 0.6, 0.7):
            _, trial, _ = attempt(study, [height] * 9, 1)
            end_trial(trial, TrialState.COMPLETE, height)
        return study

    _, _, unbroken = attempt(with_history("unbroken"), curve, 1)
    broken = with_history("broken")
    ledger, lost, before = attempt(broken, curve[:2], 1)
    assert lost.client.record_checkpoint(lost.lease, Checkpoint(epoch=2, path="/c.pt", digest="d"))
    for step in (3, 4, 5, 6, 7):  # values that would have passed every rung
        lost.write(lost.reporting(step, 0.99, {"validation_accuracy": 0.99}))
        lost.pruner_says_stop()
    reaper.fail_leases_of(ledger, "w", "killed")
    _, trial, after = attempt(broken, curve[2:], 3)
    assert before + after == unbroken
    assert trial.curve == curve
