"""HpoCallback in Lightning's own trainer: reports, prunes, saves, resumes to the undisturbed curve, parks."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn

import hpo
from hpo.study.results import best
from hpo.worker.signals import StopSignal
from tests.integration.processes import failures, rows
from tests.support.trials import MakeStudy
from tests.support.user_loops import EVERY_EPOCH, killed, once, record, trials, work

EPOCHS = 6

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
]


@pytest.fixture(scope="module", autouse=True)
def training() -> ModuleType:
    """The training, imported before a worker is forked. Its modules are no garbage, which each training collects."""
    pytest.importorskip("lightning")
    from tests.callbacks import lightning_training

    gc.collect()
    gc.freeze()
    return lightning_training


def trained(trial: optuna.Trial, **options: Any) -> Any:
    from tests.callbacks import lightning_training

    return lightning_training.trained(trial, **options)


def objective(**options: Any) -> Callable[[optuna.Trial], float]:
    return lambda trial: trained(trial, **options).callback_metrics["val_loss"].item()


@pytest.mark.parametrize(
    "style", [{}, {"is_plateau": True}, {"patience": 1}], ids=["schedule", "plateau", "early stopping"]
)
def test_a_training_resumes_to_the_undisturbed_curve(
    make_study: MakeStudy, tmp_path: Path, style: dict[str, Any]
) -> None:
    """Killed before the first checkpoint, in the middle, and in the last epoch."""
    undisturbed = make_study(name="undisturbed", trials=2)
    work(undisturbed, objective(**style))
    last = [max(trial.intermediate_values) for trial in trials(undisturbed)]
    moments = [(0, 0), (0, min(3, last[0])), (1, last[1])]
    seen = tmp_path / "seen"
    kill = once(tmp_path, *moments)

    def hook(number: int, epoch: int) -> None:
        with seen.open("a") as file:
            file.write(f"{number}.{epoch} ")
        kill(number, epoch)

    study = make_study(trials=2, recovery=EVERY_EPOCH, failures={"lost_worker": {"retries": 9}})
    for _ in moments:
        assert killed(study, objective(hook=hook, **style))
    assert not killed(study, objective(hook=hook, **style))
    assert record(study) == record(undisturbed)
    whole = [f"{number}.{epoch}" for number in (0, 1) for epoch in range(last[number] + 1)]
    assert sorted(seen.read_text().split()) == sorted([*whole, *(f"{number}.{epoch}" for number, epoch in moments)])


def test_a_trial_parks_after_the_epoch_in_which_its_worker_is_told_to_stop(make_study: MakeStudy) -> None:
    """Also if the worker got SIGTERM, for which Lightning would leave amid the epoch."""
    study, seen, stopping = make_study(trials=1, recovery={"checkpoint_every": "1h"}), [], StopSignal()

    def hook(_: int, epoch: int) -> None:
        seen.append(epoch)
        if seen == [0, 1]:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: stopping.request())
    try:
        work(study, objective(hook=hook), stopping)
    finally:
        signal.signal(signal.SIGTERM, before)
    (row,) = rows(study)
    assert (row.settled, row.lease_until, row.checkpoint_epoch) == (False, None, 1)
    assert work(study, objective(hook=hook)) == 0
    assert seen == list(range(EPOCHS))
    assert sorted(trials(study)[0].intermediate_values) == list(range(EPOCHS))
    assert failures(study) == []


def test_the_pruner_ends_a_trial_and_the_best_weights_are_kept(make_study: MakeStudy, training: ModuleType) -> None:
    pruner = {"name": "threshold", "upper": 1e6, "n_warmup_steps": 2}
    study = make_study(trials=2, pruner=pruner, recovery={"keep_checkpoints": 1})

    def scaled(trial: optuna.Trial) -> float:
        return objective(hparams={"scale": 1e9 if trial.number else 1.0})(trial)

    work(study, scaled)
    assert [(trial.state, len(trial.intermediate_values)) for trial in trials(study)] == [
        (TrialState.COMPLETE, EPOCHS),
        (TrialState.PRUNED, 3),
    ]
    (found,) = best(study)
    assert found.checkpoint is not None
    state, weights = torch.load(found.checkpoint, weights_only=True), hpo.load_weights(found.checkpoint)["lightning"]
    curve = trials(study)[0].intermediate_values
    assert (state["epoch"], state["best"]["step"]) == (EPOCHS, min(curve, key=curve.__getitem__))
    assert state["objects"]["lightning"].keys() == weights.keys()
    training.Module(0.1, is_plateau=False).load_state_dict(weights)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"check_val_every_n_epoch": 2}, [1, 3, 5]),
        ({"val_check_interval": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"limit_val_batches": 0, "monitor": "train_loss"}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=["every second epoch", "twice an epoch", "never"],
)
def test_each_epoch_with_a_validation_is_reported_once_under_plain_optuna_too(
    options: dict[str, Any], steps: list[int]
) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda trial: bool(trained(trial, **options)), n_trials=1)
    assert sorted(study.trials[0].intermediate_values) == steps


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Attribute 'head' is an instance of `nn.Module`")
@pytest.mark.parametrize(
    ("use", "said"),
    [
        (
            objective(monitor="val_acc"),
            "no such metric was logged in epoch 0 (logged: train_loss, val_loss); call self.log",
        ),
        (objective(with_path=False), "trainer.fit was not given ckpt_path=callback.ckpt_path"),
        (objective(fits=2), "HpoCallback is in its second trainer.fit"),
        (objective(hparams={"head": nn.Linear(2, 2)}), "['lightning']['hyper_parameters']['head'] is Linear("),
    ],
    ids=["no metric", "no path", "twice", "what needs pickle"],
)
def test_wrong_use_fails_the_trial(make_study: MakeStudy, use: Callable[[optuna.Trial], Any], said: str) -> None:
    study = make_study(trials=1)
    work(study, use)
    assert said in failures(study)[0].message
