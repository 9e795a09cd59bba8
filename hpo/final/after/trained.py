"""What `hpo train` left in its folder, taken up again: the model with its weights and its data; the test part stays shut."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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

CALIBRATION = 256  # training images that a step may look at


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished training of a folder: its model in eval mode, on the device that this process trains on."""

    folder: Path
    training: FinalTraining
    metrics: dict[str, Any]  # as `hpo train` wrote them
    model: nn.Module
    weights_sha256: str

    @property
    def batch(self) -> int:
        """How many images the model is shown at once, as in training's validation."""
        return validation.batch_size(self.training.accumulation)

    def copy(self) -> nn.Module:
        """Return a model of one's own to change."""
        return copy.deepcopy(self.model)

    def deployed(self, model: nn.Module) -> Deployed:
        """Return a model with this training's normalisation in front."""
        splits = self.training.splits
        return Deployed(model, splits.mean, splits.std)

    def calibration(self) -> Tensor:
        """Return normalised images of the training part, for steps that must see some."""
        images = first(self.training.splits.train.images, CALIBRATION)
        return self.deployed(self.model).to(images.device).normalised(images)


def load(folder: Path, code_folder: Path | None = None) -> Trained:
    """Take up a folder that `hpo train` has finished.

    Raises StudyError if there is no such training, if it is not finished, or if data or code are no longer the ones that it
    was trained with.
    """
    metrics = _metrics(folder)
    training = final.prepare(folder / final.CONFIG, seed=metrics["receipt"]["seed"], code_folder=code_folder)
    if training.identity != metrics["identity"]:
        raise StudyError(f"{folder / final.CONFIG}: is not the config that {folder / final.METRICS} was made from")
    if metrics["receipt"]["data_digest"] != training.splits.digest:
        raise StudyError(
            f"{folder}: {training.config.data.name} gives other images than it was trained on; train again"
        )
    weights = folder / final.WEIGHTS
    model = training.run().model
    try:
        model.load_state_dict(checkpoint.load(weights))
    except RuntimeError as error:
        raise StudyError(f"{weights}: does not fit the model that its config builds now: {error}") from None
    use_generator(model, None)  # a generator cannot be copied, and an evaluated model draws nothing
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
        again = command("train", folder / final.CONFIG, options=f"-o {quoted(folder)}")
        raise StudyError(f"{folder}: its training is not finished; `{again}` goes on")
    if not (folder / final.METRICS).exists():
        raise StudyError(f"{folder}: holds no training of `hpo train`, for it has no {final.METRICS}")
    if not (folder / final.WEIGHTS).is_file():
        raise StudyError(f"{folder}: has no {final.WEIGHTS}; an objective of your own leaves none to go on with")
    metrics = read_json(folder / final.METRICS)
    made = metrics.get("receipt")
    if "identity" not in metrics or not isinstance(made, dict) or not {"seed", "data_digest"} <= made.keys():
        raise StudyError(f"{folder / final.METRICS}: is not as `hpo train` wrote it; restore it, or train again")
    return metrics


def on_cpu(model: Deployed) -> Deployed:
    """Return a copy on the CPU, so that an exported file does not ask for the GPU that it was made on."""
    with quietly():  # a graph's copy, in torch 2.11
        return copy.deepcopy(model).to(torch.device("cpu"))
