"""What an outage kept from being recorded is taken up by the next attempt, as if there had been no outage."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo import claiming, handover, reaping, results, studyfile, worker
from hpo import study as studies
from hpo.errors import LostLease, StorageError
from hpo.failures import Failure, Kind
from hpo.lease import Lease
from hpo.ledger import Checkpoint, Claim, Ledger, Report
from hpo.objective import declared
from hpo.signals import StopSignal
from hpo.spec import StudySpec
from hpo.storage import Storage
from hpo.study import Study
from hpo.tables import hpo_failures, hpo_trials, trial_system_attributes
from hpo.train.loop import EpochResult, Run
from hpo.trial import LeasedTrial
from tests.test_objective import DOCUMENT

MakeStudy = Callable[..., Study]
EPOCHS = 6


@pytest.fixture
def make_digits(place: Storage, tmp_path: Path) -> MakeStudy:
    def make(name: str, **changes: Any) -> Study:
        training = {"epochs": EPOCHS, "batch_size": 64}
        recovery = {"outage_patience": "1s", **changes.pop("recovery", {})}
        document = {**DOCUMENT, "name": name, "budget": {"trials": 1}, "training": training, "recovery": recovery}
        spec = studyfile.resolve(StudySpec.from_document({**document, **changes}), tmp_path)
        spec = spec.model_copy(update={"checkpoints": str(tmp_path / "checkpoints")})
        return studies.create_or_join(place, spec, code_folder=tmp_path, code_digest="")

    return make


def row_of(study: Study) -> Any:
    with study.storage.engine.connect() as connection:
        return connection.execute(sa.select(hpo_trials).where(hpo_trials.c.study_uid == study.uid)).one()


# --- in training ------------------------------------------------------------------------------------------------------


class Weather:
    """Counts the epochs that are trained, and takes the storage away after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[int] = []
        self.cut_after: int | None = None
        self.is_cut = False
        self.stopping: StopSignal | None = None  # asked to stop two epochs into the outage, if there is one
        finish = Run._finish_epoch

        def finish_epoch(run: Run, started: float) -> EpochResult:
            result = finish(run, started)
            self.trained.append(result.epoch)
            self.is_cut = self.is_cut or result.epoch == self.cut_after
            return result

        monkeypatch.setattr(Run, "_finish_epoch", finish_epoch)
        for name in ("report", "record_checkpoint", "renew"):
            self._let_fail(monkeypatch, name)

    def _let_fail(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(Ledger, name)

        def method(ledger: Ledger, *arguments: object) -> object:
            if self.is_cut:
                raise sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))
            return real(ledger, *arguments)

        monkeypatch.setattr(Ledger, name, method)

    def clear(self) -> None:
        self.is_cut, self.cut_after = False, None


class Asked(StopSignal):
    """A request to stop that comes when a condition is met, asked for before every batch."""

    def __init__(self, when: Callable[[], bool]) -> None:
        super().__init__()
        self._when = when

    def __call__(self) -> bool:
        return self.received is not None or self._when()


@pytest.fixture
def weather(monkeypatch: pytest.MonkeyPatch) -> Weather:
    return Weather(monkeypatch)


def work(study: Study, stopping: StopSignal | None = None) -> int:
    return worker.work(study, declared(study, study.code_folder), study.ledger("w"), stopping or StopSignal())


def in_the_epoch_after(epoch: int, weather: Weather, batches: int) -> StopSignal:
    """Ask to stop so many batches after the end of this epoch."""
    since: list[bool] = []

    def when() -> bool:
        if weather.trained and weather.trained[-1] >= epoch:
            since.append(True)
        return len(since) > batches

    return Asked(when)


def story(study: Study) -> tuple[dict[str, list[float]], dict[int, float], float | None, TrialState]:
    """Return everything that a trial's training leaves in the database, but for its times."""
    (trial,) = study.optuna.get_trials(deepcopy=False)
    raw = dict(results.best(study, number=0)[0].curves)
    del raw["seconds"]
    return raw, trial.intermediate_values, trial.value, trial.state


def notes(study: Study) -> list[str]:
    return sorted(note.name for note in study.trial_folder(0).glob(handover.PATTERN))


def until_patience_ends(study: Study, weather: Weather, cut_after: int) -> None:
    """Train until the storage has failed for too long; no epoch ends after that."""
    weather.cut_after = cut_after
    weather.trained.clear()

    def hold_up() -> bool:  # asked before every batch: makes the training outlast the worker's patience
        if weather.is_cut:
            pytest.MonkeyPatch()  # nothing is patched; see below
        return False

    with pytest.raises(StorageError, match="the storage has failed for 1 s"):
        work(study, Asked(hold_up))
    weather.clear()
