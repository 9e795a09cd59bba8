"""Trials as workers make them, in a study without a training: begun, reported, ended, at times of the test's choice."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import LostLease
from hpo.queue import claiming, reaper
from hpo.queue.finish import End
from hpo.queue.ledger import Ledger
from hpo.queue.models import Claim
from hpo.queue.report import Report
from hpo.queue.start import TrialReceipt
from hpo.spec.failures import Failure, Kind
from hpo.spec.study_file import StudySpec
from hpo.storage import sql
from hpo.storage.connect import Storage
from hpo.storage.retry import Retry
from hpo.storage.tables import hpo_trials, trials
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.worker import attempt
from hpo.worker.client import QueueClient
from hpo.worker.lease import Lease
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial, Taken

MakeStudy = Callable[..., Study]  # what the fixture make_study is
AN_OUTAGE = sa.exc.OperationalError("UPDATE", {}, Exception("the server closed the connection"))
START = 1_700_000_000.0  # seconds since 1970; when the first trial starts, in tests that look at times


def make(place: Storage, tmp_path: Path, **document: Any) -> Study:
    base = {"name": "demo", "objective": "x.py:f", "direction": "maximize", "budget": {"trials": 10}}
    spec = StudySpec.from_document({**base, "checkpoints": str(tmp_path / "checkpoints"), **document})
    return studies.create_or_join(place, spec, code_folder=tmp_path, code_digest="")


def claim_one(ledger: Ledger) -> Claim | claiming.Idle:
    """Take up a trial."""
    found = claiming.claim_many(ledger, 1)
    return found if isinstance(found, claiming.Idle) else found[0]


def begin(demo: Study, worker: str = "w") -> tuple[Ledger, Claim, LeasedTrial]:
    ledger = demo.ledger(worker)
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    demo.optuna.get_trials(deepcopy=False)
    return ledger, claim, opened(demo, ledger, claim)


def opened(study: Study, ledger: Ledger, claim: Claim) -> LeasedTrial:
    """Return a claimed trial that has reported nothing and that Optuna sees as it reports."""
    return LeasedTrial(study.optuna, *held(ledger, claim), None, [], study.spec.goals, shifts=False)


def client_of(ledger: Ledger, retry: Retry | None = None, stopping: StopSignal | None = None) -> QueueClient:
    """Return the client of a worker that retries nothing and is not asked to stop, where nothing else is given."""
    return QueueClient(ledger, retry or Retry(0.0), stopping or StopSignal())


def held(ledger: Ledger, claim: Claim, retry: Retry | None = None) -> tuple[QueueClient, Lease]:
    """Hold a claim by a client of its own, as a worker does that trains one trial at a time."""
    client = client_of(ledger, retry)
    return client, client.hold(claim)


def taken(ledger: Ledger) -> Claim:
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    return claim


def said(lease: Lease, step: int) -> Report:
    """Return a report whose value is its step."""
    return Report(claim=lease.claim, step=step, value=float(step), metrics={"value": float(step)})


def reap(study: Study) -> int:
    with sql.writing(study.storage.engine) as connection:
        return reaper.reap(connection, study.ledger("reaper"))


def refused(*arguments: object, **settings: object) -> Any:
    """Stand in for a method of the ledger while the storage is away."""
    raise AN_OUTAGE


def trial_of(study: Study, number: int) -> FrozenTrial:
    return study.optuna.get_trials(deepcopy=False)[number]


def row_of(study: Study, claim: Claim) -> Any:
    """Return the ledger's row of a trial."""
    with study.storage.engine.connect() as connection:
        return connection.execute(
            sa.select(hpo_trials).where(hpo_trials.c.study_uid == study.uid, hpo_trials.c.trial_id == claim.trial_id)
        ).one()


def run(
    demo: Study, *curve: float, state: TrialState = TrialState.COMPLETE, kind: Kind | None = None, reason: str = ""
) -> None:
    """Run a trial to its end: by a failure of this kind, else in this state."""
    _, _, trial = begin(demo)
    for step, value in enumerate(curve, start=1):
        trial.report(value, step)
    if kind is not None:
        attempt.fail(trial, Failure(kind=kind, message=reason))
    else:
        end_trial(trial, state, curve[-1], reason=reason or None)


def end_trial(trial: LeasedTrial, state: TrialState, value: float | None, *, reason: str | None = None) -> None:
    """End a trial as its worker does; LostLease if it is in other hands."""
    write_end(trial.client.ledger, attempt.ending(trial, state, value, reason=reason))


def finish_claim(
    ledger: Ledger,
    claim: Claim,
    state: TrialState,
    value: float | None,
    *,
    outcome: str,
    reason: str | None = None,
) -> None:
    """End a trial in the ledger alone; LostLease if the claim fell."""
    write_end(ledger, End(claim=claim, state=state, value=value, outcome=outcome, reason=reason))


def write_end(ledger: Ledger, end: End) -> None:
    if ledger.finish_all([end]):
        raise LostLease(f"trial {end.claim.number}")


def record_receipt(ledger: Ledger, claim: Claim, receipt: dict[str, Any], stack_key: str | None = None) -> None:
    """Record what a trial is made from; LostLease if the claim fell."""
    if ledger.record_receipts([TrialReceipt(claim=claim, receipt=receipt, stack_key=stack_key)]):
        raise LostLease(f"trial {claim.number}")


def suggested(trial: LeasedTrial, take: Callable[[LeasedTrial], Taken]) -> Taken:
    """Let a trial be given parameters as a declared one is, and write them; LostLease if it is in other hands."""
    taken, given = trial.suggested(take)
    if trial.client.ledger.write_suggested([given]):
        raise LostLease(f"trial {trial.number}")
    return taken


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
    end_trial(trial, TrialState.COMPLETE, 0.5)
    return demo
