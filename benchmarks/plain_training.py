"""How a trial is trained without `hpo`: what the scripts for Optuna alone and for Ray Tune share.

Written in the manner of PyTorch's tutorials and Optuna's own example (optuna-examples, pytorch/pytorch_simple.py):
DataLoaders, torch's own modules and optimizers with their defaults, `loss.item()` at each step. The digits are
TensorDatasets; made images are a Dataset that transforms one sample at a time, PIL -> ToTensor -> Normalize, as
torchvision's own data sets do. The layers are those of `models/`, the split is the same.

Where such a script leaves a choice, the faster one is taken: no worker processes for the DataLoaders on a CPU whose
cores are all training already, one torch thread a process, the data read once a process where the framework allows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from benchmarks import bench_data, bench_parts
from benchmarks.tasks import Task

if TYPE_CHECKING:
    import optuna  # a GPU machine may be without it, where `gpu.py` trains one configuration

HELD_OUT = 0.15  # of all images, for validation and again for the test part that is left alone

Config = dict[str, Any]
Labelled = Dataset[tuple[Any, Any]]  # Any: an image and a class; tensors, or what a DataLoader makes tensors of


class Diverged(ArithmeticError):
    """The training loss is no finite number."""


class Images(Dataset[tuple[Tensor, int]]):
    """Images that are transformed one by one as they are asked for."""

    def __init__(self, images: bench_data.Images, labels: bench_data.Labels, transform: transforms.Compose) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index].squeeze())  # PIL wants grey images without a channel axis
        return self.transform(image), int(self.labels[index])


@dataclass(frozen=True, kw_only=True)
class Data:
    """The parts that a search may see."""

    train: Labelled
    valid: Labelled
    shape: tuple[int, ...]  # of an input; of an image: channels, height, width
    outputs: int = bench_data.CLASSES


def get_data(task: Task, seed: int) -> Data:
    """Return the training and the validation part, normalised with the training part's mean and deviation."""
    if task.images is None:
        return get_digits(seed)
    if task.data in bench_data.OTHERS:
        return get_numbers(task.data, task.images, seed)
    return get_images(task.data, task.images, seed)


def get_digits(seed: int) -> Data:
    """Return scikit-learn's digits as two tensors a part."""
    images, targets = load_digits(return_X_y=True)
    train, valid = split(targets, seed)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    x = (x - x[train].mean()) / x[train].std(correction=0)
    y = torch.tensor(targets, dtype=torch.int64)
    return Data(train=TensorDataset(x[train], y[train]), valid=TensorDataset(x[valid], y[valid]), shape=(1, 8, 8))


def get_images(name: str, count: int, seed: int) -> Data:
    """Return made images, transformed sample by sample."""
    images, targets = bench_data.read(name, count)
    train, valid = split(targets, seed)
    pixels = images[train] / 255
    mean, std = pixels.mean(axis=(0, 1, 2)).tolist(), pixels.std(axis=(0, 1, 2)).tolist()
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    height, width, channels = images.shape[1:]
    return Data(
        train=Images(images[train], targets[train], transform),
        valid=Images(images[valid], targets[valid], transform),
        shape=(channels, height, width),
    )


def get_numbers(name: str, count: int, seed: int) -> Data:
    """Return made inputs with numbers to predict, as two tensors a part; targets are standardised, too."""
    inputs, targets = bench_data.read(name, count)
    train, valid = split(np.zeros(count, dtype=np.int64), seed)
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets)
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2)
        x = (x - x[train].mean()) / x[train].std(correction=0)
    else:
        x = (x - x[train].mean(0)) / x[train].std(0, correction=0)
    y = (y - y[train].mean(0)) / y[train].std(0, correction=0)
    parts = [TensorDataset(x[rows], y[rows]) for rows in (train, valid)]
    return Data(train=parts[0], valid=parts[1], shape=tuple(x.shape[1:]), outputs=y.shape[1])


def split(targets: bench_data.Labels, seed: int) -> tuple[bench_data.Labels, bench_data.Labels]:
    """Return the rows of the training and of the validation part."""
    held_out = math.ceil(HELD_OUT * len(targets))
    rest, _ = train_test_split(np.arange(len(targets)), test_size=held_out, stratify=targets, random_state=seed)
    rest.sort()
    train, valid = train_test_split(rest, test_size=held_out, stratify=targets[rest], random_state=seed)
    return train, valid


def suggest(trial: optuna.Trial, task: Task) -> Config:
    """Draw a trial's configuration."""
    config: Config = {"dropout": trial.suggest_float("dropout", 0.0, 0.5)}
    config["optimizer"] = trial.suggest_categorical("optimizer", task.optimizers)
    config["lr"] = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    config["weight_decay"] = trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True)
    if config["optimizer"] == "sgd":
        config["momentum"] = trial.suggest_float("momentum", 0.0, 0.95)
    config["schedule"] = trial.suggest_categorical("schedule", task.schedules)
    return config


def get_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler, with the settings that `hpo` gives it."""
    import optuna

    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)


def define_model(task: Task, config: Config, data: Data) -> nn.Module:
    """Build the task's model from torch's own modules."""
    shape = data.shape
    options = task.document["model"]
    if options["name"] == "mlp":
        return define_mlp(options["widths"], config["dropout"], shape, data.outputs)
    channels, height, width = shape
    if task.name == "resnet18":
        return bench_parts.resnet18((channels, height, width), data.outputs, dropout=config["dropout"])
    return define_cnn(options["channels"], config["dropout"], (channels, height, width))


def define_mlp(widths: list[int], p: float, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build the layers of `models/mlp.py`."""
    layers: list[nn.Module] = [nn.Flatten()]
    in_features = math.prod(shape)
    for out_features in widths:
        layers.append(nn.Linear(in_features, out_features, bias=False))
        layers.append(nn.BatchNorm1d(out_features))
        layers.append(nn.ReLU())
        layers.append(nn.Dropout(p))
        in_features = out_features
    layers.append(nn.Linear(in_features, outputs))
    return nn.Sequential(*layers)


def define_cnn(channels: list[int], p: float, shape: tuple[int, int, int]) -> nn.Module:
    """Build the layers of `models/cnn.py`."""
    layers: list[nn.Module] = []
    in_channels, height, width = shape
    for out_channels in channels:
        layers.append(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(out_channels))
        layers.append(nn.ReLU())
        layers.append(nn.MaxPool2d(2))
        in_channels, height, width = out_channels, height // 2, width // 2
    layers += [nn.Flatten(), nn.Dropout(p), nn.Linear(in_channels * height * width, bench_data.CLASSES)]
    return nn.Sequential(*layers)


def define_optimizer(config: Config, model: nn.Module) -> optim.Optimizer:
    """Build the sampled optimizer; what is not sampled stays as torch has it."""
    lr, weight_decay = config["lr"], config["weight_decay"]
    if config["optimizer"] == "sgd":
        return optim.SGD(model.parameters(), lr=lr, weight_decay=weight_decay, momentum=config["momentum"])
    if config["optimizer"] == "rmsprop":
        return optim.RMSprop(model.parameters(), lr=lr, weight_decay=weight_decay)
    return optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)


def define_scheduler(config: Config, optimizer: optim.Optimizer, steps: int) -> optim.lr_scheduler.LRScheduler | None:
    """Build the sampled schedule over so many optimizer steps; None keeps the learning rate."""
    if config["schedule"] == "cosine":
        return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if config["schedule"] == "onecycle":
        max_lr = optimizer.param_groups[0]["lr"]
        return optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=steps, cycle_momentum=False)
    return None


def train(
    config: Config, task: Task, data: Data, loader_workers: int = 0, device: torch.device | None = None
) -> Iterator[float]:
    """Train one trial, yielding the validation metric after each epoch; Diverged after one whose loss is not finite."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {"num_workers": loader_workers, "persistent_workers": loader_workers > 0}
    settings["pin_memory"] = device.type == "cuda"
    train_loader = DataLoader(data.train, batch_size=task.batch_size, shuffle=True, drop_last=True, **settings)
    valid_loader = DataLoader(data.valid, batch_size=task.batch_size, **settings)
    model = define_model(task, config, data).to(device)
    optimizer = define_optimizer(config, model)
    scheduler = define_scheduler(config, optimizer, task.epochs * len(train_loader))

    for _ in range(task.epochs):
        model.train()
        train_loss = 0.0
        for images, target in train_loader:
            images, target = images.to(device), target.to(device)
            optimizer.zero_grad()
            loss = loss_of(model(images), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            train_loss += loss.item()

        model.eval()
        total, seen = 0.0, 0
        with torch.no_grad():
            for images, target in valid_loader:
                images, target = images.to(device), target.to(device)
                total += measure(task.metric, model(images), target).item()
                seen += len(target)
        yield total / seen
        if not math.isfinite(train_loss):
            raise Diverged


def loss_of(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of classes, or the squared error of numbers, averaged over the numbers of a row."""
    if target.is_floating_point():
        losses = F.mse_loss(output, target, reduction="none").mean(1)
        return losses.mean() if reduction == "mean" else losses.sum()
    return F.cross_entropy(output, target, reduction=reduction)


def measure(metric: str, output: Tensor, target: Tensor) -> Tensor:
    """Return the sum of a batch's losses, or the number of its images that are classified correctly."""
    if metric == "loss":
        return loss_of(output, target, "sum")
    return output.argmax(dim=1).eq(target).sum()
