"""A training loop of one's own whose trials go on after a kill: `hpo.epochs` in the place of `range`."""

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import hpo

EPOCHS = 15


def load_loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    rows = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, validation = random_split(rows, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(validation, 512)


def objective(trial: optuna.Trial) -> float:
    width = trial.suggest_int("width", 16, 128, log=True)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    train, validation = load_loaders(batch_size=64)
    state = {"best": 0.0}
    for epoch in hpo.epochs(trial, EPOCHS, model=model, optimizer=optimizer, scheduler=scheduler, state=state):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in validation)
        state["best"] = max(state["best"], right / len(validation.dataset))
        trial.report(right / len(validation.dataset), epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return state["best"]
