"""A training as people write it: a function of a config. Its ranges stand in own_training.toml."""

from typing import Any

import optuna
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import hpo


def train(config: dict[str, Any], trial: optuna.Trial) -> float:
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    images, held_out = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    labels, held_out_labels = (torch.tensor(part) for part in parts[2:])
    width = config["model"]["width"]
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(config["model"]["dropout"]), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), **config["optimizer"])
    accuracy = 0.0
    for epoch in hpo.epochs(trial, config["epochs"], model=model, optimizer=optimizer):
        model.train()
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(held_out).argmax(1) == held_out_labels).float().mean().item()
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy
