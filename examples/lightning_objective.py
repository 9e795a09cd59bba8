"""A LightningModule whose trials report, are pruned, and go on after a kill. The file also runs under `study.optimize`.

Needs `pip install --editable '.[lightning]'`.
"""

import lightning
import optuna
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hpo.integrations.lightning import HpoCallback

EPOCHS = 15


class Classifier(lightning.LightningModule):
    def __init__(self, width: int, dropout: float, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10))

    def training_step(self, batch, _index):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, _index):
        images, labels = batch
        right = (self.net(images).argmax(1) == labels).float().mean()
        self.log("val_acc", right, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def load_loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    rows = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, validation = (TensorDataset(images[part], labels[part]) for part in rows)
    return DataLoader(train, batch_size, shuffle=True), DataLoader(validation, 512)


def objective(trial: optuna.Trial) -> float:
    callback = HpoCallback(trial, monitor="val_acc")
    model = Classifier(
        width=trial.suggest_int("width", 16, 128, log=True),
        dropout=trial.suggest_float("dropout", 0.0, 0.5),
        lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True),
    )
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[callback],
    )
    loaders = load_loaders(trial.suggest_categorical("batch_size", [32, 64, 128]))
    trainer.fit(model, *loaders, ckpt_path=callback.ckpt_path)
    return trainer.callback_metrics["val_acc"].item()
