"""Several trials of a declared study in training together: each comes to what it comes to alone, whatever befalls the others."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from optuna.trial import TrialState
from torch import nn

from hpo.errors import Outage, Parked, SpecError, StorageError
from hpo.final import train as final
from hpo.queue import claiming, reaper
from hpo.queue.finish import End
from hpo.queue.ledger import Ledger
from hpo.spec import seeds, space
from hpo.spec.training import TrainConfig
from hpo.storage.connect import Storage
from hpo.storage.tables import hpo_failures, hpo_trials
from hpo.study import control, export, results
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.train.build import assemble, executor
from hpo.train.build.executor import Choice
from hpo.train.epoch import EpochResult
from hpo.train.loop import Loop
from hpo.train.run import Run
from hpo.train.stack import architecture, select, sizing
from hpo.train.stack.stack import Stack
from hpo.worker import attempt as attempts
from hpo.worker import loop as worker_loop
from hpo.worker.attempt import Attempt
from hpo.worker.client import QueueClient
from hpo.worker.objective import Declared
from hpo.worker.signals import StopSignal
from hpo.worker.stacked_runner import StackedRunner
from hpo.worker.trial import LeasedTrial
from tests.support.declared import DOCUMENT, made, work
from tests.support.trials import AN_OUTAGE, MakeStudy, refused

CPU = torch.device("cpu")


@pytest.fixture
def make_digits(place: Storage, tmp_path: Path) -> MakeStudy:
    def make(trials: int, *, slots: int = 4, **changes: Any) -> Study:
        own = {"executor": "stack", "slots": slots, "budget": {"trials": trials}}
        return made(place, tmp_path, {**DOCUMENT, **own, **changes})

    return make


def never() -> bool:
    return False


class Asked(StopSignal):
    """A request to stop that comes when it has been asked for so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def __call__(self) -> bool:
        self._left -= 1
        return self.received is not None or self._left < 0


def states(study: Study) -> list[str]:
    return [trial.state.name for trial in study.optuna.get_trials(deepcopy=False)]


def curves(study: Study) -> dict[int, dict[str, tuple[float, ...]]]:
    """Return every trial's curves by number, but for the time that epochs took."""
    numbers = [t.number for t in study.optuna.get_trials(deepcopy=False) if t.state.is_finished()]
    found = {number: results.best(study, number=number)[0].curves for number in numbers}
    return {n: {k: tuple(v) for k, v in curves.items() if k != "seconds"} for n, curves in found.items()}


def alone(study: Study, number: int) -> Iterator[EpochResult]:
    """Train a trial of the study again in a stack of one."""
    result = results.best(study, number=number)[0]

    def pick(path: str, parameter: space.Parameter) -> Any:
        value = result.params[path]
        if isinstance(parameter, space.Choices):
            return parameter.options[[space.encode(option) for option in parameter.options].index(value)]
        return value

    config = TrainConfig.from_tree(space.pin(study.spec.tree, pick))
    splits = assemble.load_splits(config, study.spec.split_seed, study.code_folder, CPU)
    run = assemble.build_run(config, splits, result.receipt["seed"], study.code_folder, CPU)
    return executor.train(Choice(executor="stack", slots=1, why="").build(run), run, lambda: False)


def rows(study: Study) -> list[Any]:
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_trials).order_by(hpo_trials.c.trial_id)))


def failures(study: Study) -> list[Any]:
    with study.storage.engine.connect() as connection:
        return list(connection.execute(sa.select(hpo_failures)))


def test_every_trial_of_a_stack_has_the_very_curve_that_it_has_alone(make_digits: MakeStudy) -> None:
    study = make_digits(10)
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 10
    for number, found in curves(study).items():
        again = list(alone(study, number))
        assert found["validation_loss"] == tuple(epoch.validation_loss for epoch in again)
        assert found["train_loss"] == tuple(epoch.train_loss for epoch in again)
    assert {results.best(study, number=n)[0].receipt["executor"] for n in range(10)} == {"stack"}
    assert [row.attempt for row in rows(study)] == [1] * 10


def test_slots_are_filled_again_and_no_more_than_k_are_taken(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = Stack.train_epoch

    def train_epoch(stack: Stack, stop: Callable[[], bool] = never) -> list[EpochResult]:
        seen.append(len(stack.runs))
        return real(stack, stop)

    monkeypatch.setattr(Stack, "train_epoch", train_epoch)
    study = make_digits(10, slots=4, training={"epochs": {"low": 1, "high": 4}, "batch_size": 64})
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 10
    assert [seen.pop(0) for _ in range(select.STEPS)] == [2] * select.STEPS  # the check of the stack itself
    epochs = sum(len(trial.intermediate_values) for trial in study.optuna.trials)
    assert sum(seen) == epochs  # nothing was trained twice
    assert max(seen) == 4
    assert seen[: len(seen) // 2] == [4] * (len(seen) // 2)  # full for as long as there are trials


@pytest.mark.parametrize("asked", [9, 40, 75])
def test_a_stopped_stack_goes_on_bit_for_bit(
    make_digits: MakeStudy, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was stopped amid an epoch goes on bit for bit in another stack."""
    monkeypatch.setattr("hpo.worker.stacked_runner.LOOK_SECONDS", 0.0)
    whole = make_digits(6, name="whole")
    work(whole)
    broken = make_digits(6, name="broken")
    assert work(broken, Asked(asked)) == 0
    parked = [row for row in rows(broken) if row.study_uid == broken.uid and not row.settled]
    assert parked
    assert all(row.lease_until is None for row in parked)
    assert work(broken, name="other") == 0
    assert states(broken) == ["COMPLETE"] * 6
    assert curves(broken) == curves(whole)


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


def test_trials_of_another_architecture_wait_and_none_is_dropped(make_digits: MakeStudy) -> None:
    study = make_digits(12, slots=3, model={"name": "mlp", "widths": {"choices": [[8], [6], [5]]}, "dropout": 0.1})
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 12
    assert max(row.attempt for row in rows(study)) == 2  # once to be asked, once to be trained
    assert len({row.stack_key for row in rows(study)}) == 3
    assert failures(study) == []
    other = make_digits(12, name="other", executor="loop", model=study.spec.model)
    work(other)
    assert [t.params for t in study.optuna.trials] == [t.params for t in other.optuna.trials]  # random: by number


def test_no_more_than_k_trials_wait(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_digits(24, slots=2, model={"name": "mlp", "widths": {"choices": [[8], [6], [5], [4]]}, "dropout": 0.1})
    most = 0
    real = StackedRunner.advance

    def advance(runner: StackedRunner) -> list[Any]:
        nonlocal most
        waiting = [row for row in rows(study) if not row.settled and row.lease_until is None]
        most = max(most, len(waiting))
        return real(runner)

    monkeypatch.setattr(StackedRunner, "advance", advance)
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 24
    assert most == 2


def test_the_pruner_decides_whatever_the_order(make_digits: MakeStudy) -> None:
    """The pruner decides on all trials of an epoch whatever their order."""
    pruner = {"name": "successive_halving", "min_resource": 1, "reduction_factor": 2}
    ended = []
    for name, order in (("one", (0.05, 1e-6, 0.03, 1e-5)), ("other", (1e-5, 0.03, 1e-6, 0.05))):
        study = make_digits(4, name=name, pruner=pruner, optimizer={"name": "sgd", "lr": {"low": 1e-6, "high": 0.1}})
        for lr in order:
            study.optuna.enqueue_trial({"optimizer.lr": lr, "model.dropout": 0.0, "schedule.name": "constant"})
        work(studies.join(study.storage, name))
        ended.append({t.params["optimizer.lr"]: t.state.name for t in study.optuna.trials})
    assert ended[0] == ended[1]
    assert set(ended[0].values()) == {"PRUNED", "COMPLETE"}


def test_one_trial_is_ended_by_a_person_and_the_others_train_on(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_digits(4, training={"epochs": 30, "batch_size": 64}, recovery={"lease": "1s"})
    real = Stack.train_epoch

    def train_epoch(stack: Stack, stop: Callable[[], bool] = never) -> list[EpochResult]:
        if stack.runs[0].epoch == 2 and len(stack.runs) == 4:
            assert control.stop_trial(study, 1)
            while not stop():  # until the heartbeat has learned of it
                time.sleep(0.01)
        return real(stack, stop)

    monkeypatch.setattr(Stack, "train_epoch", train_epoch)
    assert work(study) == 0
    assert states(study) == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]
    assert [row.outcome for row in rows(study)] == ["complete", "stopped", "complete", "complete"]
    assert len(study.optuna.trials[1].intermediate_values) == 2


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


def test_models_of_trials_that_wait_are_dropped_at_once(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of other shapes are built, and parked; meanwhile only one of their models is there beside the stack's."""
    living: weakref.WeakSet[Run] = weakref.WeakSet()
    most = 0
    real = Declared.build

    def build(trainer: Declared, attempt: Attempt) -> None:
        nonlocal most
        real(trainer, attempt)
        living.add(attempt.run)
        most = max(most, len(living))

    monkeypatch.setattr(Declared, "build", build)
    widths = [[width] for width in range(3, 8)]
    shapes = {"model": {"name": "mlp", "widths": {"choices": widths}, "dropout": 0.1}}
    study = make_digits(5, slots=5, training={**DOCUMENT["training"], "epochs": 1}, **shapes)
    for width in widths:
        study.optuna.enqueue_trial({"model.widths": width})
    assert work(study) == 0
    assert len({row.stack_key for row in rows(study)}) == 5
    assert most <= 3  # the stack's, the one that is built, and the one before
    assert states(study) == ["COMPLETE"] * 5


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


def test_a_trial_of_a_stack_exports_and_replays_bit_for_bit(make_digits: MakeStudy, tmp_path: Path) -> None:
    study = make_digits(6, slots=3)
    work(study)
    (path,) = export.export(study, tmp_path / "best.toml")
    training = final.prepare(path)
    assert training.executor == "stack"
    assert final.replay(training, lambda result: None) == []


def test_a_trial_of_two_executors_replays_nearly(
    make_digits: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that was trained by two executors replays within the tolerance."""
    monkeypatch.setattr("hpo.worker.stacked_runner.LOOK_SECONDS", 0.0)
    study = make_digits(2, slots=2)
    assert work(study, Asked(60)) == 0
    loop = make_digits(2, executor="loop")
    assert work(loop) == 0
    (path,) = export.export(study, tmp_path / "best.toml", number=0)
    training = final.prepare(path)
    assert training.executor == "stack+loop"
    assert not training.repeats_exactly
    assert final.replay(training, lambda result: None) == []


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


def test_auto_leaves_a_sampler_that_learns_some_generations(make_digits: MakeStudy) -> None:
    spec = make_digits(1, slots=64).spec
    wide = Choice(executor="stack", slots=64, why="measured")
    auto = spec.model_copy(update={"slots": "auto"})
    learns = auto.model_copy(update={"sampler": {"name": "tpe"}})
    assert executor.spread(wide, learns, budget=64, fleet=2).slots == 8
    assert executor.spread(wide, auto, budget=64, fleet=2).slots == 32
    assert executor.spread(wide, spec, budget=1000, fleet=2).slots == 64
    assert executor.spread(wide, learns, budget=3, fleet=2).slots == 1


def test_a_model_whose_first_architectures_lose_is_not_measured_further(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sizing, "SLOW_STEP_SECONDS", 0.0)  # each measured step is slow, so the loop wins
    caplog.set_level("INFO")
    widths = {"choices": [[4], [5], [6], [7], [8]]}
    grid = {
        "model": {"name": "mlp", "widths": widths},
        "sampler": {"name": "grid"},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    fast = {"training": {"epochs": 1, "batch_size": 512}, "schedule": {"name": "constant"}}
    study = make_digits(5, executor="auto", slots="auto", **grid, **fast)
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 5
    measured = [line for line in caplog.messages if line.startswith("measuring how many trials")]
    told = [line for line in caplog.messages if "no stack of the first 3 architectures of mlp was faster" in line]
    assert (len(measured), len(told)) == (3, 2)


def test_a_model_that_cannot_be_stacked_is_trained_by_the_loop(make_digits: MakeStudy, tmp_path: Path) -> None:
    """A model that cannot be stacked is trained by the loop and check says why."""
    (tmp_path / "odd.py").write_text(ODD)
    study = make_digits(2, model={"name": "odd:odd"})
    assert work(study) == 0
    assert states(study) == ["COMPLETE"] * 2
    assert {results.best(study, number=n)[0].receipt["executor"] for n in range(2)} == {"loop"}
    config = TrainConfig.from_tree(space.middle(study.spec.tree, {}))
    splits = assemble.load_splits(config, 0, tmp_path, CPU)
    choice = executor.choose(study.spec, config, splits, tmp_path, CPU)
    assert (choice.executor, choice.slots) == ("loop", 1)
    assert "cannot be trained as one model" in choice.why


ODD = """
import torch
from optuna.trial import TrialState
from torch import nn

class Odd(nn.Module):
    def __init__(self, inputs, num_classes):
        super().__init__()
        self.layer = nn.Linear(inputs, num_classes)

    def forward(self, images):
        logits = self.layer(images.flatten(1))
        return logits if logits.sum().item() < 1e9 else -logits

def odd(input_shape, num_classes):
    return Odd(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
"""


@pytest.mark.both
def test_trials_opened_together_get_the_suggestions_of_a_look_each(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look at the study and one write for all of them, or for each: what TPE's liar knows of the others is the same."""
    sampler = {"name": "tpe", "n_startup_trials": 4, "group": True}
    one = make_digits(12, slots=6, name="one", sampler=sampler)
    work(one)
    real = StackedRunner.take
    with monkeypatch.context() as patched:
        patched.setattr(StackedRunner, "take", lambda runner, leases: [real(runner, [lease]) for lease in leases])
        each = make_digits(12, slots=6, name="each", sampler=sampler)
        work(each)
    assert [t.params for t in one.optuna.trials] == [t.params for t in each.optuna.trials]


@pytest.mark.parametrize("executor", ["loop", "stack"])
def test_a_finished_trial_of_a_dead_worker_is_not_trained_on(
    make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch, executor: str
) -> None:
    """A trial whose worker was gone before it could say that it has finished is not trained on."""
    study = make_digits(2, executor=executor)
    real, gone = attempts.ending, []

    def ending(trial: LeasedTrial, *arguments: Any, **settings: Any) -> End:
        if not gone:
            gone.append(trial.number)
            raise Parked("as if the worker had been killed here")
        return real(trial, *arguments, **settings)

    monkeypatch.setattr(attempts, "ending", ending)
    assert work(study) == 0
    assert gone
    assert states(study) == ["COMPLETE"] * 2
    assert [sorted(trial.intermediate_values) for trial in study.optuna.trials] == [[1, 2, 3]] * 2


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


def test_after_a_request_to_stop_no_trial_is_begun(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping, built, real = StopSignal(), [], Declared._run_of

    def build(training: Declared, *arguments: Any, **settings: Any) -> Any:
        built.append(1)
        stopping.request()
        return real(training, *arguments, **settings)

    monkeypatch.setattr(Declared, "_run_of", build)
    study = make_digits(40, slots=16)
    assert work(study, stopping) == 128 + signal.SIGTERM
    assert (len(built), len(states(study))) == (1, 1)
    assert rows(study)[0].lease_until is None


def test_code_that_was_edited_is_checked_anew(
    make_digits: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are the same, and what their forward does with them is not."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    executor_of = []
    for name, line in (
        ("one", "pass"),
        ("two", "x = x * (1.0 if self.training else 2.0) if x.sum().item() < 1e9 else x"),
    ):
        (tmp_path / "edited.py").write_text(EDITED.format(line=line))
        for loaded in [module for module in sys.modules if "edited" in module]:
            del sys.modules[loaded]
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        study = make_digits(2, name=name, model={"name": "edited:net"})
        work(study)
        executor_of.append(results.best(study)[0].receipt["executor"])
    assert executor_of == ["stack", "loop"]


EDITED = """
from optuna.trial import TrialState
from torch import nn

class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 8), nn.Linear(8, classes)

    def forward(self, images):
        x = self.first(images.flatten(1)).relu()
        {line}
        return self.last(x)

def net(input_shape, num_classes):
    return Net(input_shape[0] * input_shape[1] * input_shape[2], num_classes)
"""


def test_any_attribute_makes_another_architecture() -> None:
    """Models that differ in any attribute are of different architectures."""

    class Net(nn.Module):
        def __init__(self, skips: list[int]) -> None:
            super().__init__()
            self._skips = skips
            self.layer = nn.Linear(4, 4)

    assert architecture.digest(Net([0, 2])) == architecture.digest(Net([0, 2]))
    assert architecture.digest(Net([0, 2])) != architecture.digest(Net([2, 0]))


def test_a_free_slot_does_not_ask_each_epoch(make_digits: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with a free slot and nothing to claim does not ask each epoch."""
    asked, real = [], claiming.claim_many

    def claim_many(*arguments: Any, **settings: Any) -> Any:
        asked.append(1)
        return real(*arguments, **settings)

    monkeypatch.setattr(claiming, "claim_many", claim_many)
    study = make_digits(2, slots=4, training={"epochs": 80, "batch_size": 64})
    assert work(study) == 0
    assert len(asked) < 30  # of 80 epochs


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


# --- trials that come and go together: what befalls one of them, or the storage, between two of the writes --------------


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
