"""What is searched in the comparisons: one study file for each task, which is our side and the table for all others.

The rivals read epochs, batch size and choices from the file; the ranges they spell out themselves, and whoever compares
checks that all sides drew from the same ones. `studies/` has the files, but for the demo's.
"""

from __future__ import annotations

import argparse
import copy
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STUDY_FILES = {
    "digits": ROOT / "examples" / "digits.toml",
    "mlp28": ROOT / "benchmarks" / "studies" / "mlp28.toml",
    "cnn28": ROOT / "benchmarks" / "studies" / "cnn28.toml",
    "resnet18": ROOT / "benchmarks" / "studies" / "resnet18.toml",
    "table": ROOT / "benchmarks" / "studies" / "table.toml",
    "keypoints": ROOT / "benchmarks" / "studies" / "keypoints.toml",
}
TRIALS = {"digits": 512}  # of a comparison, where the file says otherwise
TRIALS_OF_RAY = {"digits": 96, "mlp28": 64}  # likewise against Ray, which starts a process for each
PRUNERS: dict[str, dict[str, Any]] = {
    "asha": {"name": "successive_halving", "min_resource": 1, "reduction_factor": 3},
    "median": {"name": "median", "n_startup_trials": 5, "n_warmup_steps": 3, "n_min_trials": 3},
    "none": {"name": "none"},
}
METRICS = ("accuracy", "loss")
SAMPLERS: dict[str, dict[str, Any]] = {"tpe": {"name": "tpe"}, "random": {"name": "random"}}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One study that all sides search."""

    name: str
    document: dict[str, Any]  # the study file

    @property
    def data(self) -> str:
        """The source by its short name: digits, grey28, colour32."""
        return str(self.document["data"]["name"]).rpartition(":")[2]

    @property
    def images(self) -> int | None:
        """How many images or rows are made; None for those that are there."""
        images: int | None = self.document["data"].get(self._counted)
        return images

    @property
    def _counted(self) -> str:
        return "rows" if "rows" in self.document["data"] else "images"

    @property
    def metric(self) -> str:
        """What is judged on the validation part: accuracy, loss."""
        return str(self.document["metric"])

    @property
    def maximizes(self) -> bool:
        return self.metric != "loss"

    @property
    def epochs(self) -> int:
        return int(self.document["training"]["epochs"])

    @property
    def batch_size(self) -> int:
        return int(self.document["training"]["batch_size"])

    @property
    def optimizers(self) -> list[str]:
        return list(self.document["optimizer"]["name"]["choices"])

    @property
    def schedules(self) -> list[str]:
        return list(self.document["schedule"]["name"]["choices"])

    @property
    def trials(self) -> int:
        return int(self.document["budget"]["trials"])

    def judged_by(self, metric: str | None) -> Task:
        """Return the task with another metric; None keeps it."""
        return Task(name=self.name, document=self.document | {"metric": metric or self.metric})

    def resized(self, *, trials: int | None, epochs: int | None, images: int | None) -> Task:
        """Return the task with other sizes; None keeps one, and data that is there keeps its own."""
        document = copy.deepcopy(self.document)
        document["budget"]["trials"] = trials or self.trials
        document["training"]["epochs"] = epochs or self.epochs
        if self.images:
            document["data"][self._counted] = images or self.images
        return Task(name=self.name, document=document)

    @property
    def flags(self) -> list[str]:
        """The arguments that say this task to a script that took `add_arguments`."""
        images = ["--images", str(self.images)] if self.images else []
        sizes = ["--trials", str(self.trials), "--epochs", str(self.epochs), *images]
        return ["--task", self.name, "--metric", self.metric, *sizes]


def load(name: str) -> Task:
    """Read a task."""
    return Task(name=name, document=tomllib.loads(STUDY_FILES[name].read_text()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a rival's script be told its task and how to search it."""
    parser.add_argument("--task", choices=sorted(STUDY_FILES), default="digits")
    add_sizes(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pruner", choices=sorted(PRUNERS), default="asha")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="tpe")
    parser.add_argument("--metric", choices=METRICS, help="what is judged; default: the task's own")
    parser.add_argument("--loader-workers", type=int, default=0, help="processes of each DataLoader")
    parser.add_argument("--default-threads", action="store_true", help="leave torch its thread on every core")


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Let a task's sizes be changed."""
    parser.add_argument("--trials", type=int, help="of the study in all; default: the task's own number")
    parser.add_argument("--epochs", type=int, help="of a full trial; default: the task's own number")
    parser.add_argument("--images", type=int, help="of a task that makes them; default: the task's own number")


def chosen(given: argparse.Namespace, trials: Mapping[str, int] = TRIALS) -> Task:
    """Return the task that the arguments name, in the sizes that they say; `trials` by task where they say none."""
    sizes = {"trials": given.trials or trials.get(given.task), "epochs": given.epochs, "images": given.images}
    return load(given.task).resized(**sizes).judged_by(given.metric)
