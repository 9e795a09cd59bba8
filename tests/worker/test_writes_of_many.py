"""Trials that come and go together: what befalls one of them, or the storage, between two of the writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import Outage, SpecError, StorageError
from hpo.queue import reaper
from hpo.queue.ledger import Ledger
from hpo.spec.training import TrainConfig
from hpo.storage.tables import hpo_trials
from hpo.study.study import Study
from hpo.train.epoch import EpochResult
from hpo.train.stack.stack import Stack
from hpo.worker.attempt import Attempt
from hpo.worker.objective import Declared
from tests.support.declared import curves, never, work
from tests.support.rows import failures, rows, states
from tests.support.trials import AN_OUTAGE, MakeStudy


def of_number(study: Study, number: int) -> list[Any]:
    return [failure.kind for failure in failures(study) if failure.trial_id == study.optuna.trials[number]._trial_id]


def take_over(study: Study, number: int) -> None:
    """Let another worker have had a trial, which is parked by now."""
    with study.storage.engine.begin() as connection:
        of_trial = hpo_trials.c.trial_id == study.optuna.trials[number]._trial_id
        stolen = sa.update(hpo_trials).where(hpo_trials.c.study_uid == study.uid, of_trial)
        connection.execute(stolen.values(attempt=hpo_trials.c.attempt + 1, worker="thief", lease_until=None))


def before(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[list[int]], object]) -> None:
    """Have something happen before a write of the ledger's; it is told of which trials, by number."""
    real = getattr(Ledger, name)

    def method(ledger: Ledger, told: Any) -> Any:
        act([one.claim.number for one in told])
        return real(ledger, told)

    monkeypatch.setattr(Ledger, name, method)


@pytest.mark.both
def test_one_lost_before_it_is_written_is_dropped(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is lost between proposing and writing is dropped and nothing of it is written."""
    study = make_digits(4)
    seen: list[Any] = []

    def steal(numbers: list[int]) -> None:
        if 2 in numbers and not seen:
            assert len(numbers) > 1
            take_over(study, 2)
            seen.append(study.optuna.trials[2].params)

    built, real = [], Declared.build

    def build(training: Declared, attempt: Attempt) -> None:
        built.append((attempt.number, attempt.lease.claim.attempt))
        real(training, attempt)

    monkeypatch.setattr(Declared, "build", build)
    before(monkeypatch, "write_suggested", steal)
    assert work(study) == 0
    assert seen == [{}]
    assert (2, 1) not in built
    assert states(study) == ["COMPLETE"] * 4
    assert [row.attempt for row in rows(study)] == [1, 1, 3, 1]
    assert [failure.kind for failure in failures(study)] == ["lease_lost"]


def test_one_whose_suggestions_the_database_refuses_fails_alone(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(numbers: list[int]) -> None:
        if 2 in numbers:
            raise sa.exc.DataError("INSERT", {}, Exception("value too long"))

    before(monkeypatch, "write_suggested", refuse)
    study = make_digits(4)
    assert work(study) == 0
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert of_number(study, 2) == ["exception"]
    assert len(failures(study)) == 1


@pytest.mark.parametrize("part", ["propose", "build", "receipt_of"])
def test_one_of_several_that_cannot_be_begun_fails_alone(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    real = getattr(Declared, part)

    def broken(training: Declared, attempt: Attempt) -> Any:
        if attempt.number == 2:
            raise ValueError("not this one")
        return real(training, attempt)

    monkeypatch.setattr(Declared, part, broken)
    study = make_digits(6)
    assert work(study) == 0
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert of_number(study, 2) == ["exception"]
    assert all(row.settled for row in rows(study))


def test_what_is_refused_as_a_whole_has_its_parameters(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainConfig.from_tree

    def from_tree(tree: Any) -> TrainConfig:
        if tree["model"]["dropout"] == 0.125:
            raise SpecError("optimizer.momentum = 0.9: would be overwritten")
        return real(tree)

    monkeypatch.setattr(TrainConfig, "from_tree", from_tree)
    study = make_digits(3)
    study.optuna.enqueue_trial({"model.dropout": 0.25})
    study.optuna.enqueue_trial({"model.dropout": 0.125})
    assert work(study) == 0
    assert states(study) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.optuna.trials[1].params["model.dropout"] == 0.125
    assert study.optuna.trials[1].params.keys() >= {"optimizer.lr", "schedule.name"}


def test_one_that_another_program_ends_as_several_end_is_left_as_it_is(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_digits(4)

    def end_one(numbers: list[int]) -> None:
        if 2 in numbers:
            assert len(numbers) > 1
            study.optuna.tell(2, state=TrialState.FAIL)

    before(monkeypatch, "finish_all", end_one)
    assert work(study) == 0
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert [row.outcome for row in rows(study)] == ["complete", "complete", "ended elsewhere", "complete"]
    assert [failure.kind for failure in failures(study)] == ["lease_lost"]


WRITES_OF_MANY = ["write_suggested", "record_receipts", "finish_all"]


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("name", WRITES_OF_MANY)
def test_a_storage_that_fails_once_in_a_write_of_many_costs_nothing(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch, name: str, answered: bool
) -> None:
    """It fails before the write, or after it, when only the answer is lost."""
    study, failed, real = make_digits(4), [], getattr(Ledger, name)

    def method(ledger: Ledger, told: Any) -> Any:
        fails = len(told) > 1 and not failed
        found = real(ledger, told) if answered or not fails else None
        if fails:
            failed.append(1)
            raise AN_OUTAGE
        return found

    monkeypatch.setattr(Ledger, name, method)
    assert work(study) == 0
    assert failed
    assert states(study) == ["COMPLETE"] * 4
    assert failures(study) == []
    assert [row.attempt for row in rows(study)] == [1] * 4
    monkeypatch.undo()
    whole = make_digits(4, name="whole")
    work(whole)
    assert curves(study) == curves(whole)


@pytest.mark.parametrize("name", WRITES_OF_MANY)
def test_an_outage_in_a_write_of_many_costs_no_trial(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A storage that stays away in a write of many costs no trial anything."""

    def refuse(numbers: list[int]) -> None:
        if len(numbers) > 1:
            raise Outage("the storage has failed for 600 s")

    study = make_digits(4)
    with monkeypatch.context() as patched:
        before(patched, name, refuse)
        with pytest.raises(StorageError):
            work(study)
    assert [row.settled for row in rows(study)] == [False] * 4
    reaper.release_leases_of(study.ledger("launcher"), "w")
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 4
    assert failures(study) == []
    whole = make_digits(4, name="whole")
    work(whole)
    assert curves(study) == curves(whole)
    assert [t.params for t in study.optuna.trials] == [t.params for t in whole.optuna.trials]


def test_a_written_failure_is_not_ended_twice(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose failure is written before the storage goes away amid the ends is not ended twice."""
    real = Stack.train_epoch

    def train_epoch(stack: Stack, stop: Callable[[], bool] = never) -> list[EpochResult]:
        found = real(stack, stop)
        is_bad = len(found) == 4 and stack.runs[0].finished
        return [dataclasses.replace(found[0], train_loss=float("nan")), *found[1:]] if is_bad else found

    def refuse(numbers: list[int]) -> None:
        if len(numbers) > 1:
            raise Outage("the storage has failed for 600 s")

    study = make_digits(4, failures={"diverged": {"retries": 1}})
    with monkeypatch.context() as patched:
        patched.setattr(Stack, "train_epoch", train_epoch)
        before(patched, "finish_all", refuse)
        with pytest.raises(StorageError):
            work(study)
    assert [(failure.kind, failure.verdict) for failure in failures(study)] == [("diverged", "retry")]
    (bad,) = [row for row in rows(study) if row.lease_until is None]
    assert bad.checkpoint_epoch is None  # it goes on from where it stood before it diverged
    assert not list(study.trial_folder(bad.trial_id - rows(study)[0].trial_id).glob("*handover.json"))
    reaper.release_leases_of(study.ledger("launcher"), "w")
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 4
    assert len(failures(study)) == 1


def test_one_whose_kept_report_is_refused_fails(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last epoch is reported while the storage is away: only as they end is it known what the database takes."""
    study, away, real = make_digits(4), [True], Ledger.report

    def report(ledger: Ledger, reports: Any, **settings: Any) -> Any:
        if away and any(one.step == 3 for one in reports) and len(reports) > 1:
            away.clear()
            raise AN_OUTAGE
        if any((one.claim.number, one.step) == (0, 3) for one in reports):
            raise sa.exc.DataError("INSERT", {}, Exception("integer out of range"))
        return real(ledger, reports, **settings)

    monkeypatch.setattr(Ledger, "report", report)
    monkeypatch.setattr("hpo.worker.heartbeat.TICK_SECONDS", 60.0)  # else it may be the heartbeat that learns of it
    assert work(study) == 0
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert of_number(study, 0) == ["exception"]
