"""An Optuna objective as people write them, with nothing of hpo in it: it also runs under `study.optimize`."""

import optuna
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 15


def load_loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    rows = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, validation = (TensorDataset(images[part], labels[part]) for part in rows)
    return DataLoader(train, batch_size, shuffle=True), DataLoader(validation, 512)


def objective(trial: optuna.Trial) -> float:
    torch.manual_seed(trial.number)
    width = trial.suggest_int("width", 16, 128, log=True)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    optimizer = getattr(torch.optim, trial.suggest_categorical("optimizer", ["Adam", "SGD"]))(model.parameters(), lr=lr)
    train, validation = load_loaders(batch_size=64)
    accuracy = 0.0
    for epoch in range(EPOCHS):
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        with torch.no_grad():
            right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in validation)
        accuracy = right / len(validation.dataset)
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy
