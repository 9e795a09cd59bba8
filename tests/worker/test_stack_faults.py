"""What befalls one trial of a stack, or its memory, its device or the storage: it costs the other trials nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
import torch

from hpo.errors import Outage, StorageError
from hpo.queue import reaper
from hpo.queue.ledger import Ledger
from hpo.spec import seeds
from hpo.storage.tables import hpo_trials
from hpo.study import results
from hpo.study import study as studies
from hpo.train.epoch import EpochResult
from hpo.train.loop import Loop
from hpo.train.stack.stack import Stack
from hpo.worker import loop as worker_loop
from hpo.worker.attempt import Attempt
from hpo.worker.client import QueueClient
from hpo.worker.objective import Declared
from tests.support.declared import DOCUMENT, curves, never, work
from tests.support.rows import failures, rows, states
from tests.support.trials import MakeStudy, refused


def test_a_trial_that_diverges_leaves_the_others_bit_for_bit(make_digits: MakeStudy) -> None:
    calm, wild = make_digits(5, name="calm"), make_digits(5, name="wild", optimizer=WILD)
    for study in (calm, wild):
        for lr in (0.01, 0.02, 1e-3 if study is calm else 1e30, 0.03, 0.05):
            study.optuna.enqueue_trial({"optimizer.name": "sgd", "optimizer.lr": lr, "optimizer.sgd.momentum": 0.5})
        assert work(studies.join(study.storage, study.name)) == 0
    assert states(wild) == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    left, right = curves(calm), curves(wild)
    assert all(left[number] == right[number] for number in (0, 1, 3, 4))
    assert [row.outcome for row in rows(wild)].count("diverged") == 1


WILD = {**DOCUMENT["optimizer"], "lr": {"low": 1e-3, "high": 1e31, "log": True}}


def test_the_guilty_trial_of_a_step_is_found(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """After another exception amid a step the guilty trial is found alone."""
    real = Stack.train_epoch

    def train_epoch(stack: Stack, stop: Callable[[], bool] = never) -> list[EpochResult]:
        if any(run.seed == guilty for run in stack.runs):
            raise RuntimeError("a broken step")
        return real(stack, stop)

    def train_alone(loop: Loop, stop: Callable[[], bool] = never) -> list[EpochResult]:
        if loop.runs[0].seed == guilty:
            raise RuntimeError("a broken step")
        return real_alone(loop, stop)

    real_alone = Loop.train_epoch
    monkeypatch.setattr(Stack, "train_epoch", train_epoch)
    monkeypatch.setattr(Loop, "train_epoch", train_alone)
    study = make_digits(4)
    guilty = seeds.of_trial(study.spec.seed, 2)
    assert work(study) == 0
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert [failure.kind for failure in failures(study)] == ["exception"]
    assert "a broken step" in rows(study)[2].reason


def test_a_stack_that_runs_out_of_memory_is_made_smaller_for_good(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Stack.train_epoch

    def train_epoch(stack: Stack, stop: Callable[[], bool] = never) -> list[EpochResult]:
        if len(stack.runs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(stack, stop)

    monkeypatch.setattr(Stack, "train_epoch", train_epoch)
    study = make_digits(6, slots=4)
    codes = [work(study)]
    while codes[-1] == worker_loop.RECYCLE:
        codes.append(work(study))
    assert codes == [worker_loop.RECYCLE, 0]
    assert states(study) == ["COMPLETE"] * 6
    assert failures(study) == []  # no trial's fault
    assert [results.best(study, number=n)[0].receipt["accumulation"] for n in range(6)] == [1] * 6


def test_no_memory_for_a_stack_is_no_trial_s_fault(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Stack.__init__

    def init(stack: Stack, forward: Any, first: Any, slots: int, **options: Any) -> None:
        if slots > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        real(stack, forward, first, slots, **options)

    monkeypatch.setattr(Stack, "__init__", init)
    study = make_digits(6)
    assert [work(study), work(study)] == [worker_loop.RECYCLE, 0]
    assert states(study) == ["COMPLETE"] * 6
    assert failures(study) == []
    receipts = [results.best(study, number=number)[0].receipt for number in range(6)]
    assert {(receipt["executor"], receipt["accumulation"]) for receipt in receipts} == {("stack", 1)}


def test_a_cuda_error_counts_for_all_and_leaves_nobody_behind(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Stack.train_epoch

    def broken(*anything: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def train_epoch(stack: Stack, stop: Callable[[], bool] = never) -> list[EpochResult]:
        if len(stack.runs) > 2:
            patched.setattr("hpo.train.stack.stack.own_tensors", broken)  # as everything on that device from now on
            broken()
        return real(stack, stop)

    study = make_digits(4)
    with monkeypatch.context() as patched:
        patched.setattr(Stack, "train_epoch", train_epoch)
        assert work(study) == worker_loop.RECYCLE
    assert [failure.kind for failure in failures(study)] == ["cuda_error"] * 4
    assert [row.lease_until for row in rows(study)] == [None] * 4
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 4


def test_a_spoiled_process_claims_nothing_more(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(*anything: object, **settings: object) -> None:
        built.append(1)
        raise RuntimeError("CUDA error: uncorrectable ECC error")

    monkeypatch.setattr(Declared, "_run_of", build)
    study = make_digits(40)
    assert work(study) == worker_loop.RECYCLE
    assert len(built) == 1


@pytest.mark.both
def test_a_trial_that_was_lost_leaves_the_others_in_training(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_digits(4, training={"epochs": 6, "batch_size": 64})
    real, taken = Stack.train_epoch, []

    def train_epoch(stack: Stack, stop: Callable[[], bool] = never) -> list[EpochResult]:
        if not taken and len(stack.runs) == 4 and stack.runs[0].epoch == 1:  # a heartbeat may cut the epoch short
            taken.append(2)
            with study.storage.engine.begin() as connection:  # as a take-over does
                connection.execute(
                    sa.update(hpo_trials)
                    .where(hpo_trials.c.study_uid == study.uid)
                    .where(hpo_trials.c.trial_id == study.optuna.trials[2]._trial_id)
                    .values(attempt=2, worker="thief", lease_until=None)
                )
        return real(stack, stop)

    monkeypatch.setattr(Stack, "train_epoch", train_epoch)
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 4
    assert [row.attempt for row in rows(study)] == [1, 1, 3, 1]
    assert [failure.kind for failure in failures(study)] == ["lease_lost"]


def test_a_storage_that_is_away_for_too_long_costs_no_trial_its_place(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_digits(4, training={"epochs": 9, "batch_size": 64}, recovery={"checkpoint_every": "1h"})
    real, clients = Stack.train_epoch, []
    begin = QueueClient.__init__

    def init(client: QueueClient, *arguments: Any) -> None:
        begin(client, *arguments)
        clients.append(client)

    def train_epoch(stack: Stack, stop: Callable[[], bool] = never) -> list[EpochResult]:
        if len(stack.runs) == 4 and stack.runs[0].epoch == 3:
            for write in ("report", "renew_all"):  # the heartbeat must not find the storage back
                patched.setattr(Ledger, write, refused)
            clients[0].calls._failing_since = time.monotonic() - 1e6
        return real(stack, stop)

    with monkeypatch.context() as patched:
        patched.setattr(QueueClient, "__init__", init)
        patched.setattr(Stack, "train_epoch", train_epoch)
        with pytest.raises(StorageError):
            work(study)
    assert [len(list(study.trial_folder(number).glob("*handover.json"))) for number in range(4)] == [1] * 4
    reaper.release_leases_of(study.ledger("launcher"), "w")
    assert work(study) == 0
    whole = make_digits(4, name="whole", training={"epochs": 9, "batch_size": 64})
    work(whole)
    assert curves(study) == curves(whole)


def test_an_outage_as_a_slot_is_filled_costs_no_place(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that goes away as a slot is filled costs no trial its place."""
    epochs = {"epochs": {"choices": [2, 9]}, "batch_size": 64}
    study = make_digits(6, training=epochs, recovery={"checkpoint_every": "1h"})
    real = Attempt.open

    def open_attempt(attempt: Attempt) -> bool:
        if attempt.lease.claim.number == 5:
            raise Outage("the storage has failed for 600 s")
        return real(attempt)

    with monkeypatch.context() as patched:
        patched.setattr(Attempt, "open", open_attempt)
        with pytest.raises(StorageError):
            work(study)
    left = [row for row in rows(study) if not row.settled]
    assert len(left) > 1
    assert [row.checkpoint_epoch is not None for row in left] == [True] * (len(left) - 1) + [
        False
    ]  # the last had begun
    reaper.release_leases_of(study.ledger("launcher"), "w")
    assert work(study) == 0
    whole = make_digits(6, name="whole", training=epochs)
    work(whole)
    assert curves(study) == curves(whole)
