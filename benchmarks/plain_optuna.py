"""The demo study without `hpo`: one of the processes that a user of Optuna alone starts by hand on one SQLite file.

Written in the manner of Optuna's own PyTorch example (optuna-examples, pytorch/pytorch_simple.py): DataLoaders over
TensorDatasets, torch's own modules and optimizers with their defaults, a report and a question to the pruner after each
epoch. It searches the space of examples/digits.toml on the same split, with the same layers, batches and steps.

Where the example leaves a choice, the faster one is taken: the data is loaded once per process, not once per trial, and
the processes share the trials by a callback rather than by half each, so neither waits long for the other at the end.

    python benchmarks/plain_optuna.py --storage sqlite:///plain.db --study digits --trials 64 &
    python benchmarks/plain_optuna.py --storage sqlite:///plain.db --study digits --trials 64 --process 1 &
    wait
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import optuna
import torch
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPOCHS = 20
BATCH_SIZE = 32
WIDTHS = (64, 32)
CLASSES = 10
HELD_OUT = 270  # of 1797 images, for validation and again for the test part that is left alone
TAKEN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def get_digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the validation part, normalised with the training part's mean and deviation."""
    images, targets = load_digits(return_X_y=True)
    rest, _ = train_test_split(np.arange(len(targets)), test_size=HELD_OUT, stratify=targets, random_state=seed)
    rest.sort()
    train, valid = train_test_split(rest, test_size=HELD_OUT, stratify=targets[rest], random_state=seed)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    x = (x - x[train].mean()) / x[train].std(correction=0)
    y = torch.tensor(targets, dtype=torch.int64)
    return TensorDataset(x[train], y[train]), TensorDataset(x[valid], y[valid])


def define_model(trial: optuna.Trial) -> nn.Module:
    """Build the layers of `models/mlp.py` from torch's own modules."""
    p = trial.suggest_float("dropout", 0.0, 0.5)
    layers: list[nn.Module] = [nn.Flatten()]
    in_features = 64
    for out_features in WIDTHS:
        layers.append(nn.Linear(in_features, out_features, bias=False))
        layers.append(nn.BatchNorm1d(out_features))
        layers.append(nn.ReLU())
        layers.append(nn.Dropout(p))
        in_features = out_features
    layers.append(nn.Linear(in_features, CLASSES))
    return nn.Sequential(*layers)


def define_optimizer(trial: optuna.Trial, model: nn.Module) -> optim.Optimizer:
    """Build the sampled optimizer; what is not sampled stays as torch has it."""
    name = trial.suggest_categorical("optimizer", ["sgd", "rmsprop", "adamw"])
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    weight_decay = trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True)
    if name == "sgd":
        momentum = trial.suggest_float("momentum", 0.0, 0.95)
        return optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay, momentum=momentum)
    if name == "rmsprop":
        return optim.RMSprop(model.parameters(), lr=lr, weight_decay=weight_decay)
    return optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)


def define_scheduler(
    trial: optuna.Trial, optimizer: optim.Optimizer, steps: int
) -> optim.lr_scheduler.LRScheduler | None:
    """Build the sampled schedule over so many optimizer steps; None keeps the learning rate."""
    name = trial.suggest_categorical("schedule", ["constant", "cosine", "onecycle"])
    if name == "cosine":
        return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if name == "onecycle":
        max_lr = optimizer.param_groups[0]["lr"]
        return optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=steps, cycle_momentum=False)
    return None


def objective(trial: optuna.Trial, train: TensorDataset, valid: TensorDataset) -> float:
    """Train one trial and return its last validation accuracy."""
    train_loader = DataLoader(train, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    valid_loader = DataLoader(valid, batch_size=BATCH_SIZE)
    model = define_model(trial).to(DEVICE)
    optimizer = define_optimizer(trial, model)
    scheduler = define_scheduler(trial, optimizer, EPOCHS * len(train_loader))

    accuracy = 0.0
    for epoch in range(EPOCHS):
        model.train()
        train_loss = 0.0
        for images, target in train_loader:
            images, target = images.to(DEVICE), target.to(DEVICE)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            train_loss += loss.item()

        model.eval()
        correct = 0
        with torch.no_grad():
            for images, target in valid_loader:
                images, target = images.to(DEVICE), target.to(DEVICE)
                pred = model(images).argmax(dim=1)
                correct += pred.eq(target).sum().item()
        accuracy = correct / len(valid)

        trial.report(accuracy, epoch)
        if not math.isfinite(train_loss) or trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def main() -> None:
    """Take part in the study until its trials are used up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--study", required=True)
    parser.add_argument("--trials", type=int, required=True, help="of the study in all")
    parser.add_argument("--process", type=int, default=0, help="a number of its own for each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pruner", choices=["median", "none"], default="median")
    parser.add_argument("--default-threads", action="store_true", help="leave torch its thread on every core")
    given = parser.parse_args()

    if not given.default_threads:
        torch.set_num_threads(1)
    torch.manual_seed(1000 * given.seed + given.process)
    train, valid = get_digits(given.seed)
    study = optuna.create_study(
        study_name=given.study,
        storage=given.storage,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, seed=1000 * given.seed + given.process
        ),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3, n_min_trials=3)
        if given.pruner == "median"
        else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    study.optimize(lambda trial: objective(trial, train, valid), callbacks=[MaxTrialsCallback(given.trials, TAKEN)])
    print(f"best {study.best_value:.4f} by trial {study.best_trial.number} of {len(study.trials)}")


if __name__ == "__main__":
    main()
