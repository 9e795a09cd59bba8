"""A training on several processes, as torchrun starts it: DistributedDataParallel, one process for each GPU or core."""

from typing import Any

import optuna
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hpo


def train(config: dict[str, Any], trial: optuna.Trial) -> float:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    images, held_out = (torch.tensor(part, dtype=torch.float32, device=device) for part in parts[:2])
    labels, held_out_labels = (torch.tensor(part, device=device) for part in parts[2:])
    net = nn.Sequential(nn.Linear(64, config["width"]), nn.ReLU(), nn.Linear(config["width"], 10)).to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    accuracy = 0.0
    for epoch in hpo.epochs(trial, config["epochs"], model=net, optimizer=optimizer):
        for rows in torch.randperm(len(labels)).split(64):  # the same on all ranks, since they have the same seed
            own = rows[rank::world]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[own]), labels[own]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (net(held_out).argmax(1) == held_out_labels).float().mean().item()
        trial.report(accuracy, epoch)  # on all ranks; rank 0's counts
        if trial.should_prune():  # the same answer on all ranks
            raise optuna.TrialPruned
    dist.destroy_process_group()
    return accuracy
