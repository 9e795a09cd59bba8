"""Studies that declare their training: scikit-learn's digits in a small perceptron, worked on in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpo.spec.study_file import StudySpec
from hpo.storage.connect import Storage
from hpo.study import resolve, results
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.worker import loop as worker_loop
from hpo.worker.objective import declared
from hpo.worker.signals import StopSignal

DOCUMENT: dict[str, Any] = {
    "name": "digits",
    "executor": "loop",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [8], "dropout": {"low": 0.0, "high": 0.5}},
    "training": {"epochs": 3, "batch_size": 64},
    "optimizer": {
        "name": {"choices": ["sgd", "adamw"]},
        "lr": {"low": 1e-3, "high": 1e-1, "log": True},
        "sgd": {"momentum": {"low": 0.0, "high": 0.9}},
    },
    "schedule": {"name": {"choices": ["constant", "cosine", "onecycle"]}},
    "sampler": {"name": "random"},
    "pruner": {"name": "none"},
}


def made(place: Storage, folder: Path, document: dict[str, Any]) -> Study:
    """Make a study of this document, its code and its checkpoints in the folder."""
    resolved = resolve.resolve(StudySpec.from_document(document), folder)
    resolved = resolved.model_copy(update={"checkpoints": str(folder / "checkpoints")})
    digest = resolve.digest_code(resolved, folder)
    return studies.create_or_join(place, resolved, code_folder=folder, code_digest=digest)


def work(study: Study, stopping: StopSignal | None = None, name: str = "w") -> int:
    """Do a worker's work in this process until there is no more; return its exit code."""
    return worker_loop.work(study, declared(study, study.code_folder), study.ledger(name), stopping or StopSignal())


def quiet(result: object) -> None:
    """Show no progress."""


def nothing() -> None:
    """Record no opening."""


class Asked(StopSignal):
    """A request to stop that comes when it has been asked for so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def __call__(self) -> bool:
        self._left -= 1
        return self.received is not None or self._left < 0


def never() -> bool:
    return False


def curves(study: Study) -> dict[int, dict[str, tuple[float, ...]]]:
    """Return every trial's curves by number, but for the time that epochs took."""
    numbers = [t.number for t in study.optuna.get_trials(deepcopy=False) if t.state.is_finished()]
    found = {number: results.best(study, number=number)[0].curves for number in numbers}
    return {n: {k: tuple(v) for k, v in curves.items() if k != "seconds"} for n, curves in found.items()}
