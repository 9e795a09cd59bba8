"""A training with Lightning's own trainer. Tests import it when they run: Lightning takes 3 s, in each test process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning
import numpy as np
import optuna
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hpo.integrations.lightning import HpoCallback

EPOCHS = 6
Hook = Callable[[int, int], None]


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
