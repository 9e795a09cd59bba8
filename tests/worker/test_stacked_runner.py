"""Several trials of a declared study in training together: each comes to what it comes to alone, whoever comes and goes."""

from __future__ import annotations

import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.errors import Parked
from hpo.final import train as final
from hpo.queue import claiming
from hpo.queue.finish import End
from hpo.spec import space
from hpo.spec.training import TrainConfig
from hpo.study import control, export, results
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.train.build import assemble, executor
from hpo.train.build.executor import Choice
from hpo.train.epoch import EpochResult
from hpo.train.run import Run
from hpo.train.stack import select
from hpo.train.stack.stack import Stack
from hpo.worker import attempt as attempts
from hpo.worker.attempt import Attempt
from hpo.worker.objective import Declared
from hpo.worker.signals import StopSignal
from hpo.worker.stacked_runner import StackedRunner
from hpo.worker.trial import LeasedTrial
from tests.support.declared import DOCUMENT, Asked, curves, never, work
from tests.support.rows import failures, rows, states
from tests.support.trials import MakeStudy

CPU = torch.device("cpu")


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
