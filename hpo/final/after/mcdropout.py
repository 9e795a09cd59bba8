"""Monte Carlo dropout: estimates a model's uncertainty from many passes with active dropout (Gal & Ghahramani 2016)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hpo import data
from hpo.errors import StudyError
from hpo.files import atomic_write
from hpo.final.after.raw import batches
from hpo.models import Dropout, use_generator
from hpo.spec.seeds import derive
from hpo.train import devices
from hpo.train.inputs import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Doubt:
    """The uncertainty of a model on N rows, in float64. Entropies are in nats, from 0 to log(classes)."""

    passes: int
    mean: Tensor  # [N, classes], mean class probabilities over the passes
    spread: Tensor  # [N, classes], their standard deviation over the passes, with n - 1
    entropy: Tensor  # [N], of the mean: total uncertainty
    mutual_information: Tensor  # [N], entropy minus the passes' mean entropy: the uncertainty that more data can reduce

    def summary(self, labels: Tensor) -> dict[str, float]:
        """Return means over all rows, and accuracy and loss of the mean probabilities, for a report."""
        right = self.mean.argmax(1) == labels
        return {
            "passes": self.passes,
            "accuracy": right.double().mean().item(),
            "loss": F.nll_loss(self.mean.clamp_min(torch.finfo(torch.float64).tiny).log(), labels).item(),
            "spread": self.spread.gather(1, self.mean.argmax(1, keepdim=True)).mean().item(),
            "entropy": self.entropy.mean().item(),
            "mutual_information": self.mutual_information.mean().item(),
            "entropy_of_right": _mean(self.entropy[right]),
            "entropy_of_wrong": _mean(self.entropy[~right]),
        }


@torch.no_grad()
def sample(model: nn.Module, inputs: data.Inputs, *, passes: int, seed: int, batch: int) -> Doubt:
    """Run a model `passes` times with active dropout. All other modules are in eval mode.

    The memory does not grow with the number of passes. The random numbers depend on the seed and on `batch`.

    Args:
        model: the model, which takes raw inputs.
        inputs: raw inputs of N rows.
        passes: the number of passes, at least 2.
        seed: the seed of the dropout masks.
        batch: the number of rows at once.

    Raises StudyError if the model has no dropout with p above 0.
    """
    drops = [module for module in model.modules() if isinstance(module, Dropout | _DropoutNd) and module.p > 0]
    if not drops:
        raise StudyError(
            "--mc-dropout: the model has no dropout module with p above 0; train one with dropout, or remove --mc-dropout"
        )
    model.eval()
    for module in drops:
        module.train()
    use_generator(model, torch.Generator(data.some(inputs).device).manual_seed(derive(seed, "mc dropout", 0)))
    try:
        with devices.forked_random(data.some(inputs).device):  # torch's own dropout draws from the global generators
            torch.manual_seed(derive(seed, "mc dropout", 1))
            found = [_of_batch(model, some, passes) for some in batches(inputs, batch)]
    finally:
        use_generator(model, None)
        model.eval()
    mean, spread, entropy, expected = (torch.cat(of_all) for of_all in zip(*found, strict=True))
    return Doubt(
        passes=passes, mean=mean, spread=spread, entropy=entropy, mutual_information=(entropy - expected).clamp_min(0.0)
    )


def _of_batch(model: nn.Module, inputs: Batch, passes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, spread, entropy of the mean, and mean entropy, accumulated pass by pass (Welford 1962)."""
    mean = squares = expected = torch.zeros((), dtype=torch.float64, device=data.some(inputs).device)
    for count in range(1, passes + 1):
        probabilities = model(inputs).double().softmax(1)
        step = probabilities - mean
        mean = mean + step / count
        squares = squares + step * (probabilities - mean)
        expected = expected + (_entropy(probabilities) - expected) / count
    return mean, (squares / (passes - 1)).sqrt(), _entropy(mean), expected


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(1)
    return entropy


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else 0.0


def write(path: Path, doubt: Doubt, part: data.Split) -> None:
    """Write a CSV file with a line for each row: label, predicted class, entropies, and mean and spread of each class."""
    classes = range(doubt.mean.shape[1])
    row = "image" if data.some(part.inputs).dtype == torch.uint8 else "row"
    heads = [row, "label", "predicted", "entropy", "mutual_information"]
    heads += [f"{what}_{one}" for what in ("mean", "spread") for one in classes]
    with atomic_write(path) as written, written.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        writer.writerows(_rows(doubt, part))


def _rows(doubt: Doubt, part: data.Split) -> Iterator[list[Any]]:
    columns = [
        part.targets[:, None],
        doubt.mean.argmax(1, keepdim=True),
        doubt.entropy[:, None],
        doubt.mutual_information[:, None],
        doubt.mean,
        doubt.spread,
    ]
    for row, (label, predicted, *numbers) in enumerate(torch.cat([c.double() for c in columns], 1).tolist()):
        yield [row, int(label), int(predicted), *(f"{number:.6g}" for number in numbers)]
