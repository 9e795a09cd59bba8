"""Loads the output folder of `hpo train`: the model with its weights, and its data without the test split."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpo.errors import StudyError
from hpo.files import read_json
from hpo.final import train as final
from hpo.final.after.deployed import Deployed
from hpo.final.after.extras import quietly
from hpo.final.after.raw import first
from hpo.final.train import FinalTraining
from hpo.models import use_generator
from hpo.text import command, quoted
from hpo.train import checkpoint, validation
from hpo.train.inputs import Batch

CALIBRATION = 256  # training rows that a step gets


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished training. Its model is in eval mode, on the device of this process."""

    folder: Path
    training: FinalTraining
    metrics: dict[str, Any]  # as `hpo train` wrote them
    model: nn.Module
    weights_sha256: str

    @property
    def batch(self) -> int:
        """The batch size, as in the validation of the training."""
        return validation.batch_size(self.training.accumulation)

    def copy(self) -> nn.Module:
        """Return a copy of the model that may be modified."""
        return copy.deepcopy(self.model)

    def deployed(self, model: nn.Module) -> Deployed:
        """Return a model that takes raw inputs and gives values in original units."""
        return Deployed(model, self.training.splits)

    def calibration(self) -> Batch:
        """Return standardised training inputs [N, ...] for the steps, N = 256 at most."""
        inputs = first(self.training.splits.train.inputs, CALIBRATION)
        return self.deployed(self.model).to(self.training.device).normalised(inputs)


def load(folder: Path, code_folder: Path | None = None) -> Trained:
    """Load a folder of a finished `hpo train`.

    Args:
        folder: the output folder of `hpo train`.
        code_folder: the folder of the user's code; found as in `hpo train` by default.

    Raises StudyError if the folder holds no finished training, or if its data or code have changed.
    """
    metrics = _metrics(folder)
    training = final.prepare(folder / final.CONFIG, seed=metrics["receipt"]["seed"], code_folder=code_folder)
    if training.identity != metrics["identity"]:
        raise StudyError(f"{folder / final.CONFIG}: is not the config that {folder / final.METRICS} was made from")
    if metrics["receipt"]["data_digest"] != training.splits.digest:
        raise StudyError(
            f"{folder}: the data of {training.config.data.name} has changed since the training; train again"
        )
    weights = folder / final.WEIGHTS
    model = training.run().model
    try:
        model.load_state_dict(checkpoint.load(weights))
    except RuntimeError as error:
        raise StudyError(f"{weights}: does not fit the model that its config builds now: {error}") from None
    use_generator(model, None)  # a generator cannot be copied, and a model in eval mode draws nothing
    return Trained(
        folder=folder,
        training=training,
        metrics=metrics,
        model=model.eval(),
        weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
    )


def _metrics(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise StudyError(f"{folder}: no such folder; `hpo train best.toml -o {quoted(folder)}` makes one")
    if (folder / final.CHECKPOINT).exists():
        again = f"`{command('train', folder / final.CONFIG, options=f'-o {quoted(folder)}')}`"
        if (folder.parent / final.SEVERAL).exists():
            again = f"the same `hpo train --seeds` as before, with -o {quoted(folder.parent)},"
        raise StudyError(f"{folder}: its training is not finished; {again} continues it")
    if (folder / final.SEVERAL).exists():
        raise StudyError(f"{folder}: holds trainings with several seeds; name one of them, such as {folder / 'seed-1'}")
    if not (folder / final.METRICS).exists():
        raise StudyError(f"{folder}: holds no training of `hpo train`, since it has no {final.METRICS}")
    if not (folder / final.WEIGHTS).is_file():
        raise StudyError(
            f"{folder}: has no {final.WEIGHTS}; an objective of your own saves none, so `hpo after` cannot use it"
        )
    metrics = read_json(folder / final.METRICS)
    made = metrics.get("receipt")
    if "identity" not in metrics or not isinstance(made, dict) or not {"seed", "data_digest"} <= made.keys():
        raise StudyError(
            f"{folder / final.METRICS}: was changed after `hpo train` wrote it; restore it, or train again"
        )
    return metrics


def on_cpu(model: Deployed) -> Deployed:
    """Return a copy on the CPU, so that an exported file does not need the GPU of the training."""
    with quietly():  # torch 2.11 warns when it copies a graph
        return copy.deepcopy(model).to(torch.device("cpu"))
