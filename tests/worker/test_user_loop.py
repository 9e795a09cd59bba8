"""A user's own training loop with `hpo.epochs`: where it resumes, when it saves, and what it refuses."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import hpo
from hpo.errors import StorageError
from hpo.queue import reaper
from hpo.queue.ledger import Ledger
from hpo.study.results import best
from hpo.study.study import Study
from hpo.worker.signals import StopSignal
from tests.integration.processes import curves, failures, rows
from tests.support.trials import MakeStudy, refused
from tests.support.user_loops import EVERY_EPOCH, killed, once, record, trials, work
from tests.support.waiting import wait_for

EPOCHS = 6


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)


def loop(
    *,
    after_report: Callable[[int, int], None] = lambda number, epoch: None,
    first_step: int = 0,
    report_every: int = 1,
    step_first: bool = False,
) -> Callable[[optuna.Trial], float]:
    """Return an objective in plain PyTorch, with shuffling, dropout, a schedule and an average of weights."""

    def objective(trial: optuna.Trial) -> float:
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=trial.suggest_float("lr", 1e-3, 1e-1, log=True))
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
        average = torch.optim.swa_utils.AveragedModel(model)
        drawn = np.random.rand() + random.random()
        state = {"best": float("inf")}
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "average": average, "state": state}
        for epoch in hpo.epochs(trial, EPOCHS, **parts):
            total = 0.0
            for images, labels in data():
                optimizer.zero_grad()
                found = nn.functional.cross_entropy(model(images), labels)
                found.backward()
                optimizer.step()
                average.update_parameters(model)
                total += float(found.detach())
            if step_first:
                scheduler.step()
            total += float(np.random.rand()) + random.random()
            state["best"] = min(state["best"], total)
            if (epoch + 1) % report_every == 0:
                trial.report(total, epoch + first_step)
            after_report(trial.number, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
            if not step_first:
                scheduler.step()
        return state["best"] + 0 * drawn

    return objective


def best_weights(study: Study) -> dict[str, Any]:
    """Return the weights at the best report of the best trial."""
    (found,) = best(study)
    assert found.receipt.keys() == {"best_step"}
    assert found.checkpoint is not None
    return hpo.load_weights(found.checkpoint)


@pytest.mark.both
@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.soak)])
def test_kills_at_random_instants_leave_the_undisturbed_curves(make_study: MakeStudy, times: int) -> None:
    pruner = {"name": "successive_halving", "min_resource": 2}
    settings: dict[str, Any] = {"recovery": EVERY_EPOCH, "pruner": pruner, "sampler": {"name": "random"}}
    settings["failures"] = {"lost_worker": {"retries": 100}}
    undisturbed = make_study(name="undisturbed", trials=8, **settings)
    work(undisturbed, loop())
    assert {trial.state for trial in trials(undisturbed)} == {TrialState.COMPLETE, TrialState.PRUNED}
    draw, kills, kinds = random.Random(0), 0, set()
    while kills < times:  # on a fast machine a study ends before
        study = make_study(name=f"killed {kills} times before", trials=8, **settings)
        while killed(study, loop(), after=draw.uniform(0.05, 0.25) if kills < times else None):
            kills += 1
        assert record(study) == record(undisturbed)
        assert curves(study) == curves(undisturbed)
        kinds |= {row.kind for row in failures(study)}
    assert kinds == {"lost_worker"}
    torch.testing.assert_close(best_weights(study), best_weights(undisturbed), rtol=0, atol=0)


STYLES: dict[str, dict[str, Any]] = {
    "steps from 0": {},
    "steps from 1": {"first_step": 1},
    "scheduler first": {"step_first": True},
    "every fifth": {"report_every": 5},
}


@pytest.mark.parametrize(
    ("style", "epoch"),
    [
        *(pytest.param(STYLES["steps from 0"], epoch, id=f"steps from 0-{epoch}") for epoch in (0, 2, EPOCHS - 1)),
        *(
            pytest.param(style, epoch, id=f"{name}-{epoch}", marks=() if epoch == 2 else pytest.mark.soak)
            for name, style in STYLES.items()
            if style
            for epoch in (0, 2, EPOCHS - 1)
        ),
    ],
)
def test_a_loop_resumes_after_its_last_whole_epoch(
    make_study: MakeStudy, tmp_path: Path, style: dict[str, Any], epoch: int
) -> None:
    """Also before the first checkpoint, and in the last epoch."""
    undisturbed = make_study(name="undisturbed", trials=2)
    work(undisturbed, loop(**style))
    study = make_study(trials=2, recovery=EVERY_EPOCH)
    kill, file = once(tmp_path, (1, epoch)), tmp_path / "seen"

    def after_report(number: int, now: int) -> None:
        with file.open("a") as seen:
            seen.write(f"{number}.{now} ")
        kill(number, now)

    objective = loop(after_report=after_report, **style)
    assert killed(study, objective)
    assert not killed(study, objective)
    assert record(study) == record(undisturbed)
    first, second = ([f"{number}.{now}" for now in range(EPOCHS)] for number in (0, 1))
    assert file.read_text().split() == [*first, *second[: epoch + 1], *second[epoch:]]


def small(trial: optuna.Trial) -> dict[str, Any]:
    model = nn.Linear(2, 1)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=trial.suggest_float("lr", 0.1, 1.0))}


def test_a_trial_parks_after_the_epoch_in_which_its_worker_is_told_to_stop(make_study: MakeStudy) -> None:
    study, seen, stopping = make_study(trials=1, recovery={"checkpoint_every": "1h"}), [], StopSignal()

    def objective(trial: optuna.Trial) -> float:
        for epoch in hpo.epochs(trial, 5, **small(trial)):
            seen.append(epoch)
            if len(seen) == 3:
                stopping.request()
            trial.report(float(epoch), epoch)
            trial.should_prune()
            seen.append("whole")
        return 0.0

    work(study, objective, stopping)
    assert seen == [0, "whole", 1, "whole"]
    (row,) = rows(study)
    assert (row.settled, row.lease_until, row.checkpoint_epoch) == (False, None, 1)
    assert work(study, objective) == 0
    assert seen[4:] == [2, "whole", 3, "whole", 4, "whole"]
    assert trials(study)[0].intermediate_values == {epoch: float(epoch) for epoch in range(5)}
    assert failures(study) == []


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("stop_at", [0, 2])
def test_a_loader_and_a_scaler_with_a_state_of_their_own_resume(make_study: MakeStudy, stop_at: int) -> None:
    """The loader draws from the global random numbers when it is asked for its state."""

    def objective(trial: Any, stop_at: int | None = None) -> float:
        parts = small(trial)
        model, optimizer = parts["model"], parts["optimizer"]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        loader = StatefulDataLoader(TensorDataset(torch.randn(16, 2)), batch_size=4, shuffle=True)
        for epoch in hpo.epochs(trial, 4, **parts, scaler=scaler, loader=loader):
            for (batch,) in loader:
                optimizer.zero_grad()
                loss = model(batch).square().mean()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            if epoch == stop_at:
                trial.client.stopping.request()
            trial.report(float(loss.detach()) + scaler.get_scale() + torch.rand(()).item(), epoch)
        return 0.0

    undisturbed, study = make_study(name="undisturbed", trials=1), make_study(trials=1)
    work(undisturbed, objective)
    work(study, lambda trial: objective(trial, stop_at))
    assert len(trials(study)[0].intermediate_values) == stop_at + 1
    work(study, objective)
    assert record(study) == record(undisturbed)
    assert rows(study)[0].attempt == 2


def test_resume_and_save_are_the_same_by_hand(make_study: MakeStudy, tmp_path: Path) -> None:
    study, kill, file = make_study(trials=1), once(tmp_path, (0, 3)), tmp_path / "seen"

    def objective(trial: optuna.Trial) -> float:
        start = hpo.resume(trial, **small(trial))
        for epoch in range(start, 5):
            with file.open("a") as seen:
                seen.write(f"{epoch} ")
            trial.report(torch.rand(()).item(), epoch + 1)
            if epoch % 2:
                hpo.save(trial, epoch=epoch + 1)
            kill(trial.number, epoch)
        return float(start)

    undisturbed = make_study(name="undisturbed", trials=1)
    assert killed(study, objective)
    assert not killed(study, objective)
    assert file.read_text().split() == ["0", "1", "2", "3", "4"]  # saved in the body, so nothing is trained again
    work(undisturbed, objective)
    assert [trial.intermediate_values for trial in trials(study)] == [
        trial.intermediate_values for trial in trials(undisturbed)
    ]


def test_code_after_the_loop_finds_its_variables_when_it_was_killed_there(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    """The last epoch's checkpoint is recorded when the objective has returned, so some epoch is always left to train."""
    study, kill = make_study(trials=1, recovery=EVERY_EPOCH), once(tmp_path, (0, 99))

    def objective(trial: optuna.Trial) -> float:
        for epoch in hpo.epochs(trial, 4, **small(trial)):
            accuracy = torch.rand(()).item()
            trial.report(accuracy, epoch)
        kill(trial.number, 99)
        return accuracy

    assert killed(study, objective)
    assert not killed(study, objective)
    assert trials(study)[0].value == trials(study)[0].intermediate_values[3]


def cut(patches: pytest.MonkeyPatch) -> None:
    """Take the storage away from a trial that trains."""
    for name in ("report", "record_checkpoint", "renew_all"):
        patches.setattr(Ledger, name, refused)


def test_an_outage_after_the_last_epoch_costs_only_the_epochs_since_the_last_checkpoint(make_study: MakeStudy) -> None:
    study, seen = make_study(trials=1, recovery={**EVERY_EPOCH, "outage_patience": "1s"}), []

    with pytest.MonkeyPatch.context() as patches:

        def objective(trial: optuna.Trial) -> float:
            for epoch in hpo.epochs(trial, 4, **small(trial)):
                seen.append(epoch)
                if seen == [0, 1, 2, 3]:
                    cut(patches)
                trial.report(float(epoch), epoch)
            return 7.0

        with pytest.raises(StorageError, match="the server closed the connection"):
            work(study, objective)
    reaper.release_leases_of(study.ledger("launcher"), "w")
    assert work(study, objective) == 0
    assert seen == [0, 1, 2, 3, 3]
    assert trials(study)[0].intermediate_values == {epoch: float(epoch) for epoch in range(4)}


def test_an_outage_that_lasts_too_long_costs_no_epoch(make_study: MakeStudy) -> None:
    recovery = {"checkpoint_every": "1h", "outage_patience": "1s"}
    study, seen = make_study(trials=1, recovery=recovery), []

    with pytest.MonkeyPatch.context() as patches:

        def objective(trial: Any) -> float:
            for epoch in hpo.epochs(trial, 4, **small(trial)):
                seen.append(epoch)
                if seen == [0, 1]:
                    cut(patches)
                trial.report(float(epoch), epoch)
                if trial.client.calls.is_cut_off:
                    wait_for(lambda: trial.client.calls.failing_seconds > 1.0)
                    trial.should_prune()
            return 7.0

        with pytest.raises(StorageError, match="the storage has failed for 1 s"):
            work(study, objective)
    reaper.release_leases_of(study.ledger("launcher"), "w")
    assert work(study, objective) == 0
    assert seen == [0, 1, 2, 3]
    assert trials(study)[0].intermediate_values == {epoch: float(epoch) for epoch in range(4)}


def test_a_loop_without_epochs_ends(make_study: MakeStudy) -> None:
    study = make_study(trials=1)

    def objective(trial: optuna.Trial) -> float:
        return float(len(list(hpo.epochs(trial, 0, **small(trial)))))

    assert work(study, objective) == 0
    assert (trials(study)[0].value, rows(study)[0].attempt) == (0.0, 1)


def test_the_weights_of_the_best_trial_are_kept(make_study: MakeStudy) -> None:
    study = make_study(trials=3, recovery={"keep_checkpoints": 1})

    def objective(trial: optuna.Trial) -> float:
        parts = small(trial)
        for epoch in hpo.epochs(trial, 2, **parts):
            with torch.no_grad():
                parts["model"].weight.fill_(10.0 * trial.number + epoch)
        return float(abs(trial.number - 1))

    work(study, objective)
    (found,) = best(study)
    assert found.number == 1
    state = torch.load(found.checkpoint, weights_only=True)
    assert state["epoch"] == 2
    assert state["objects"]["model"]["weight"].tolist() == [[11.0, 11.0]]


def test_a_loop_that_is_left_early_and_one_that_is_pruned_end_as_without_checkpoints(make_study: MakeStudy) -> None:
    study = make_study(trials=2, recovery=EVERY_EPOCH)

    def objective(trial: optuna.Trial) -> float:
        for epoch in hpo.epochs(trial, 5, **small(trial)):
            trial.report(float(epoch), epoch)
            if epoch == 2 and trial.number == 0:
                break
            if epoch == 1 and trial.number == 1:
                raise optuna.TrialPruned
        return 7.0

    assert work(study, objective) == 0
    assert [(trial.state, trial.value) for trial in trials(study)] == [
        (TrialState.COMPLETE, 7.0),
        (TrialState.PRUNED, 1.0),
    ]


def test_the_same_objective_runs_under_plain_optuna() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(loop(), n_trials=2)
    assert [sorted(trial.intermediate_values) for trial in study.trials] == [list(range(EPOCHS))] * 2


# --- wrong use --------------------------------------------------------------------------------------------------------


def twice(trial: optuna.Trial) -> None:
    for _ in range(2):
        list(hpo.epochs(trial, 2, **small(trial)))


def after_a_report(trial: optuna.Trial) -> None:
    trial.report(1.0, 0)
    list(hpo.epochs(trial, 2, **small(trial)))


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (twice, "trial 0: hpo.epochs or hpo.resume was called twice; a trial has one loop"),
        (after_a_report, "trial 0: report was called before hpo.epochs or hpo.resume; call it within the loop"),
        (lambda trial: list(hpo.epochs(trial, 2)), "hpo.epochs has nothing to save; give it the loop's objects"),
        (
            lambda trial: list(hpo.epochs(trial, 2, rate=0.1)),
            "rate=float: cannot be saved; give an object with state_dict",
        ),
        (lambda trial: hpo.save(trial, epoch=1), "trial 0: hpo.save was called before hpo.resume"),
        (
            lambda trial: list(hpo.epochs(trial, 2, **small(trial), state={"seen": {1, 2}})),
            "state['objects']['state']['seen'] is {1, 2} of type set; a checkpoint holds tensors and plain Python",
        ),
    ],
    ids=["twice", "after a report", "nothing", "a number", "save alone", "what needs pickle"],
)
def test_wrong_use_fails_the_trial_at_once(
    make_study: MakeStudy, use: Callable[[optuna.Trial], Any], said: str
) -> None:
    study = make_study(trials=1)
    work(study, use)
    assert said in failures(study)[0].message


def test_what_needs_pickle_after_the_first_epoch_costs_no_second_one(make_study: MakeStudy) -> None:
    study, seen = make_study(trials=1, recovery={"checkpoint_every": "1h"}), []

    def objective(trial: optuna.Trial) -> float:
        state: dict[str, Any] = {"best": 0.0}
        for epoch in hpo.epochs(trial, 3, **small(trial), state=state):
            seen.append(epoch)
            state["best"] = np.mean([1.0, 2.0])
        return 0.0

    work(study, objective)
    assert seen == [0]
    assert failures(study)[0].message.startswith(
        "state['objects']['state']['best'] is np.float64(1.5) of type float64;"
    )


def test_a_report_outside_of_its_trial_fails_the_trial_that_makes_it(make_study: MakeStudy) -> None:
    study, begun = make_study(trials=2), []

    def objective(trial: optuna.Trial) -> float:
        begun.append(trial)
        begun[0].report(1.0, trial.number)
        return 1.0

    work(study, objective)
    assert [(trial.state, trial.intermediate_values) for trial in trials(study)] == [
        (TrialState.COMPLETE, {0: 1.0}),
        (TrialState.FAIL, {}),
    ]
    said = "trial 0 is not held here any more; report before its objective returns"
    assert said in failures(study)[0].message


@pytest.mark.parametrize("retries", [0, 1])
def test_a_model_that_changed_between_attempts_starts_over_only_if_failures_are_retried(
    make_study: MakeStudy, tmp_path: Path, retries: int
) -> None:
    study = make_study(trials=1, recovery=EVERY_EPOCH, failures={"exception": {"retries": retries}})
    kill = once(tmp_path, (0, 2))

    def objective(trial: optuna.Trial) -> float:
        width = 3 if (tmp_path / "killed-0-2").exists() else 2
        for epoch in hpo.epochs(trial, 4, model=nn.Linear(2, width)):
            trial.report(1.0 + epoch, epoch)
            kill(trial.number, epoch)
        return 1.0

    assert killed(study, objective)
    assert work(study, objective) == 0
    said = failures(study)[1].message
    assert said.startswith(
        "the checkpoint does not fit model: Error(s) in loading state_dict for Linear: size mismatch"
    )
    assert trials(study)[0].state == (TrialState.COMPLETE if retries else TrialState.FAIL)


def test_what_a_kill_would_lose_is_told(make_study: MakeStudy, caplog: pytest.LogCaptureFixture) -> None:
    study = make_study(trials=1)

    def objective(trial: optuna.Trial) -> float:
        model, criterion, best, history = nn.Linear(2, 1), nn.CrossEntropyLoss(), 0.0, []
        accuracy, names = 0.0, ["a"]
        optimizer = torch.optim.Adam(model.parameters())
        last_layer = next(model.modules())
        assert isinstance(criterion, nn.Module)
        assert isinstance(last_layer, nn.Module)
        for epoch in hpo.epochs(trial, 2, model=model):
            accuracy = float(epoch + 1)  # assigned before it is read
            best = max(best, accuracy)
            history.append(names[0])
        optimizer.zero_grad()
        return best

    with caplog.at_level(logging.WARNING):
        work(study, objective)
    assert [message.split()[0] for message in caplog.messages] == ["optimizer", "best", "history"]
    assert (
        "optimizer is not given to hpo.epochs: after a kill it starts anew; give optimizer=optimizer" in caplog.messages
    )


def test_what_the_first_epoch_had_in_memory_is_freed(make_study: MakeStudy) -> None:
    batches: list[weakref.ref[torch.Tensor]] = []

    def objective(trial: optuna.Trial) -> float:
        scale = 2.0
        for _ in hpo.epochs(trial, 3, **small(trial)):
            batch = scale * torch.zeros(4)
            batches.append(weakref.ref(batch))
            del batch
            assert [found() for found in batches] == [None] * len(batches)
            batch = torch.zeros(4)
            batches.append(weakref.ref(batch))
        del batch
        assert [found() for found in batches] == [None] * 6
        return 0.0

    assert work(make_study(trials=1), objective) == 0
    assert len(batches) == 6


@pytest.mark.parametrize("reports_first", [True, False])
def test_a_report_after_the_save_of_its_epoch_is_told(
    make_study: MakeStudy, caplog: pytest.LogCaptureFixture, reports_first: bool
) -> None:
    study = make_study(trials=1)

    def objective(trial: optuna.Trial) -> float:
        for epoch in range(hpo.resume(trial, **small(trial)), 2):
            if reports_first:
                trial.report(1.0, epoch)
            hpo.save(trial, epoch=epoch + 1)
            if not reports_first:
                trial.report(1.0, epoch)
        return 1.0

    with caplog.at_level(logging.WARNING):
        work(study, objective)
    lost = [f"trial 0: step {step} was reported after hpo.save of its epoch" for step in range(2)]
    assert [message.split(": a kill")[0] for message in caplog.messages] == ([] if reports_first else lost)


def test_random_numbers_are_the_trial_s_own(make_study: MakeStudy) -> None:
    """They are seeded before each attempt, by the study's seed and the trial's number, also without a loop of ours."""
    drawn: list[tuple[float, float, float]] = []

    def objective(trial: optuna.Trial) -> float:
        drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
        return 0.0

    for name in ("one", "two"):
        work(make_study(name=name, trials=2), objective)
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]
