"""Trials as workers make them, in a study without a training: begun, reported, ended, at times of the test's choice."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from hpo import claiming, study
from hpo.claim import Claim
from hpo.db import sql
from hpo.db.tables import trials
from hpo.failures import Failure, Kind
from hpo.lease import Lease
from hpo.ledger import Ledger
from hpo.spec import StudySpec
from hpo.storage import Storage
from hpo.study import Study
from hpo.trial import LeasedTrial

START = 1_700_000_000.0  # seconds since 1970; when the first trial starts, in tests that look at times


def make(place: Storage, tmp_path: Path, **document: Any) -> Study:
    base = {"name": "demo", "objective": "x.py:f", "direction": "maximize", "budget": {"trials": 10}}
    spec = StudySpec.from_document({**base, "checkpoints": str(tmp_path / "checkpoints"), **document})
    return study.create_or_join(place, spec, code_folder=tmp_path, code_digest="")


def begin(demo: Study, worker: str = "w") -> tuple[Ledger, Claim, LeasedTrial]:
    ledger = demo.ledger(worker)
    claim = claiming.claim(ledger)
    assert isinstance(claim, Claim)
    demo.optuna.get_trials(deepcopy=False)
    return ledger, claim, LeasedTrial(demo.optuna, Lease(ledger, claim), None)


def run(
    demo: Study, *curve: float, state: TrialState = TrialState.COMPLETE, kind: Kind | None = None, reason: str = ""
) -> None:
    """Run a trial to its end: by a failure of this kind, else in this state."""
    _, _, trial = begin(demo)
    for step, value in enumerate(curve, start=1):
        trial.report(value, step)
    if kind is not None:
        trial.fail(Failure(kind=kind, message=reason))
    else:
        trial.finish(state, curve[-1], reason=reason or None)


def set_times(demo: Study, number: int, start: float, end: float | None = None) -> None:
    def utc(seconds: float | None) -> datetime | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)

    with sql.writing(demo.storage.engine) as connection:
        connection.execute(
            trials.update()
            .where(trials.c.number == number, trials.c.study_id == demo.study_id)
            .values(datetime_start=utc(start), datetime_complete=utc(end))
        )


def with_a_list_chosen(place: Storage, tmp_path: Path) -> Study:
    """Return a study with one finished trial, whose parameter is a list among the choices of a declared space."""
    demo = make(
        place,
        tmp_path,
        objective=None,
        direction=None,
        data={"name": "digits"},
        model={"name": "mlp", "widths": {"choices": [[32], [64, 32]]}},
        optimizer={"name": "sgd", "lr": 0.1},
    )
    _, _, trial = begin(demo)
    trial.suggest_categorical("model.widths", ["[32]", "[64,32]"])
    trial.finish(TrialState.COMPLETE, 0.5)
    return demo
