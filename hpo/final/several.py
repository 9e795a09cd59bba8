"""One config trained with several seeds, each in a folder of its own, and one opening of the test split for all of them.

All trainings are finished before the test split is opened. Until the common result is written, each training's checkpoint stays.
So a call that was killed at any moment is repeated by the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hpo.analysis.verdict import mean
from hpo.errors import StudyError
from hpo.files import read_json, write_json
from hpo.final import train as final
from hpo.final.train import CHECKPOINT, METRICS, SEVERAL, FinalTraining
from hpo.spec import seeds
from hpo.spec.metrics import bounds, of_test
from hpo.study.interval import IMAGES_KEY, TASK_KEY, TEST_IMAGES_KEY
from hpo.train.epoch import EpochResult


@dataclass(frozen=True, kw_only=True)
class SeveralSeeds:
    """A config that is ready to train with several seeds."""

    first: FinalTraining  # it gives the seed from which all seeds are derived
    count: int

    @cached_property
    def trainings(self) -> Sequence[FinalTraining]:
        """The trainings. None has the trial's own seed, since the trial was chosen with it."""
        found = (seeds.derive(self.first.seed, "final", place) for place in range(self.count))
        return [replace(self.first, seed=seed) for seed in found]

    @property
    def names(self) -> list[str]:
        """The trainings' folders, within the common one."""
        return [f"seed-{place}" for place in range(1, self.count + 1)]

    @property
    def identity(self) -> str:
        """The SHA-256 of the identities of all trainings."""
        made_of = [training.identity for training in self.trainings]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def finished(several: SeveralSeeds, folder: Path) -> dict[str, Any] | None:
    """Return the common result if the folder holds these trainings finished, else None."""
    metrics = read_json(folder / METRICS) if (folder / METRICS).exists() else {}
    if metrics.get("identity") != several.identity:
        return None
    _remove_checkpoints(several, folder)
    return metrics


def train(
    several: SeveralSeeds,
    folder: Path,
    *,
    stop: Callable[[], bool],
    began: Callable[[FinalTraining, int], None],
    progress: Callable[[EpochResult], None],
    before_test: Callable[[], None],
) -> dict[str, Any] | None:
    """Train with each seed, then test all models at once. Return the common result, None if stopped.

    Args:
        several: the trainings.
        folder: the common output folder.
        stop: asked after each batch; true stops the training.
        began: called when a training begins or goes on, with its place from 1.
        progress: called after each epoch.
        before_test: called once, just before the test split is opened.

    Raises StudyError if the folder holds anything else, and what `final.train` raises.
    """
    _open_folder(several, folder)
    folders = [folder / name for name in several.names]
    for place, (training, home) in enumerate(zip(several.trainings, folders, strict=True), start=1):
        if final.is_fitted(training, home):
            continue
        began(training, place)
        if final.fit(training, home, stop=stop, progress=progress) is None:
            return None
    before_test()
    test = final.open_test(several.first)
    results = [
        final.finish(final.resumed(training, home), test)
        for training, home in zip(several.trainings, folders, strict=True)
    ]
    metrics = _common(several, results)
    write_json(folder / METRICS, metrics)
    _remove_checkpoints(several, folder)
    return metrics


def test_means(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the means of the test metrics, for the study's ledger."""
    return {key: found["value"] for key, found in metrics["means"].items() if key.startswith("test_")}


def _open_folder(several: SeveralSeeds, folder: Path) -> None:
    """Make the folder, or raise StudyError if it holds anything but these trainings."""
    final.refuse_another_split(several.first)
    marked = read_json(folder / SEVERAL) if (folder / SEVERAL).exists() else None
    if marked is None and any((folder / name).exists() for name in (CHECKPOINT, METRICS)):
        raise StudyError(f"{folder}: holds another training; name another folder with -o")
    if marked is not None and marked.get("identity") != several.identity:
        raise StudyError(
            f"{folder}: holds {marked.get('seeds')} trainings of another config or seed, or another number of them; "
            "name another folder with -o"
        )
    final.open_folder(several.first, folder)
    if marked is None:
        write_json(folder / SEVERAL, {"identity": several.identity, "seeds": several.count})


def _remove_checkpoints(several: SeveralSeeds, folder: Path) -> None:
    for name in several.names:
        (folder / name / CHECKPOINT).unlink(missing_ok=True)


def _common(several: SeveralSeeds, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of each training, and their means with intervals by Student's t, cut at the metrics' bounds."""
    metric = several.first.spec.metric
    averaged = {"value": metric} | {f"test_{name}": name for name in of_test(results[0], metric)}
    return {
        "identity": several.identity,
        "trainings": [
            {"folder": name, "seed": result["receipt"]["seed"], "epoch": result["epoch"]}
            | {key: result[key] for key in averaged}
            for name, result in zip(several.names, results, strict=True)
        ],
        "means": {
            key: asdict(mean([result[key] for result in results], bounds(name))) for key, name in averaged.items()
        },
        **{key: results[0][key] for key in (TASK_KEY, TEST_IMAGES_KEY, IMAGES_KEY)},
        "receipt": results[0]["receipt"],
    }
