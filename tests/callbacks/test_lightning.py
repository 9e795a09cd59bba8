"""HpoCallback in Lightning's own trainer: reports, prunes, saves, resumes to the undisturbed curve, parks."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import Callback, EarlyStopping

import hpo
from hpo.integrations.lightning import HpoCallback
from hpo.study.results import best
from hpo.worker.signals import StopSignal
from tests.integration.processes import failures, rows
from tests.support.trials import MakeStudy
from tests.support.user_loops import EVERY_EPOCH, killed, once, record, trials, work

EPOCHS = 6
Hook = Callable[[int, int], None]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
]


def data(*, shuffle: bool) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=shuffle)


class Module(lightning.LightningModule):
    """A network with dropout, batch statistics, and a schedule: by epochs, or by the validation's loss."""

    def __init__(self, lr: float, *, is_plateau: bool, **hparams: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.noise = torch.zeros(())
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_epoch_start(self) -> None:
        self.noise = torch.rand(()) / 10 + np.random.rand() / 10 + random.random() / 10

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.hparams.get("scale", 1.0) * self.loss(batch) + self.noise, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        if self.hparams["is_plateau"]:
            schedule: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_loss"}
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])]


class At(Callback):
    """Calls a function at the end of each validation."""

    def __init__(self, number: int, hook: Hook) -> None:
        self.number, self.hook = number, hook

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.hook(self.number, trainer.current_epoch)


def trained(
    trial: optuna.Trial,
    *,
    hook: Hook = lambda number, epoch: None,
    monitor: str = "val_loss",
    is_plateau: bool = False,
    patience: int | None = None,
    with_path: bool = True,
    fits: int = 1,
    hparams: dict[str, Any] | None = None,
    **options: Any,
) -> lightning.Trainer:
    callback = HpoCallback(trial, monitor)
    module = Module(trial.suggest_float("lr", 1e-3, 1e-1, log=True), is_plateau=is_plateau, **hparams or {})
    stoppers = [] if patience is None else [EarlyStopping("val_loss", patience=patience)]
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, *stoppers, At(trial.number, hook)],
        **options,
    )
    for _ in range(fits):
        path = callback.ckpt_path if with_path else None
        trainer.fit(module, data(shuffle=True), data(shuffle=False), ckpt_path=path)
    return trainer


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


def test_the_pruner_ends_a_trial_and_the_best_weights_are_kept(make_study: MakeStudy) -> None:
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
    Module(0.1, is_plateau=False).load_state_dict(weights)


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
