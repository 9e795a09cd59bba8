"""The weights at the best report of a user's own loop: what a checkpoint holds, also after a stop, a break or a kill."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

import hpo
from hpo.errors import CheckpointError
from hpo.study.results import best
from hpo.study.study import Study
from hpo.train import checkpoint
from hpo.worker.signals import StopSignal
from tests.integration.processes import rows
from tests.support.trials import MakeStudy
from tests.support.user_loops import EVERY_EPOCH, killed, trials, work

CURVE = [3.0, 1.0, 2.0, 1.0, 2.0]  # to be minimized


def filled(
    curve: list[float] = CURVE,
    *,
    stop_at: int | None = None,
    leave_at: int | None = None,
    first_step: int = 0,
    every: int = 1,
    returned: Callable[[], Any] = lambda: 0.0,
) -> Callable[[optuna.Trial], Any]:
    """Return an objective whose weights are the number of the epoch, counted from 0, and change after the report.

    Args:
        curve: the values that it reports.
        stop_at: the epoch in which its worker is told to stop, for the first time.
        leave_at: the epoch in which it leaves the loop.
        first_step: the step of epoch 0.
        every: how many epochs it reports once.
        returned: makes what it returns.
    """
    stops = [stop_at]

    def objective(trial: Any) -> Any:
        model = nn.Linear(2, 1, bias=False)
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for epoch in hpo.epochs(trial, len(curve), model=model, average=average, optimizer=optimizer):
            nn.init.constant_(model.weight, float(epoch))
            average.update_parameters(model)
            if epoch in stops:
                stops.remove(epoch)
                trial.client.stopping.request()
            if (epoch + 1) % every == 0:
                trial.report(curve[epoch], epoch + first_step)
            if epoch == leave_at:
                break
            nn.init.constant_(model.weight, epoch + 0.5)
        nn.init.constant_(model.weight, 99.0)
        return returned()

    return objective


def kept(study: Study) -> dict[str, Any]:
    """Return the state in the checkpoint of a study's only trial."""
    (found,) = best(study)
    assert found.checkpoint is not None
    return checkpoint.load(found.checkpoint)


def in_use(study: Study) -> dict[str, float]:
    """Return the one weight of each object that is read from that checkpoint."""
    (found,) = best(study)
    assert found.checkpoint is not None
    weights = hpo.load_weights(found.checkpoint)
    return {
        name: next(one for key, one in state.items() if "weight" in key)[0, 0].item() for name, state in weights.items()
    }


@pytest.mark.parametrize("stop_at", [None, 0, 1, 3])
def test_the_weights_of_the_first_best_report_come_along(make_study: MakeStudy, stop_at: int | None) -> None:
    study, stopping = make_study(trials=1, recovery={"checkpoint_every": "1h"}), StopSignal()
    objective = filled(stop_at=stop_at)
    work(study, objective, stopping)
    assert rows(study)[0].settled == (stop_at is None)
    if stop_at is not None:
        work(study, objective)
    state = kept(study)
    assert (state["best"]["step"], state["best"]["value"], best(study)[0].receipt) == (1, 1.0, {"best_step": 1})
    assert in_use(study) == {"model": 1.0, "average": 0.5}  # the average of 0 and 1
    assert state["objects"]["model"]["weight"].tolist() == [[4.5, 4.5]]
    assert (state["epoch"], state["has_ended"]) == (5, True)


@pytest.mark.parametrize(("first_step", "every", "step", "weight"), [(1, 1, 2, 1.0), (0, 2, 1, 1.0), (1, 5, 5, 4.0)])
def test_the_best_step_is_counted_as_the_loop_reports_it(
    make_study: MakeStudy, first_step: int, every: int, step: int, weight: float
) -> None:
    study = make_study(trials=1)
    work(study, filled(first_step=first_step, every=every))
    assert kept(study)["best"]["step"] == step
    assert in_use(study)["model"] == weight


def test_a_loop_by_hand_keeps_them_too(make_study: MakeStudy) -> None:
    """Also those of a report that no later `hpo.save` holds."""
    study = make_study(trials=1)

    def objective(trial: optuna.Trial) -> float:
        model = nn.Linear(2, 1, bias=False)
        for epoch in range(hpo.resume(trial, model=model), 4):
            nn.init.constant_(model.weight, float(epoch))
            trial.report(-float(epoch), epoch)
            if epoch == 1:
                hpo.save(trial, epoch=2)
        return 0.0

    work(study, objective)
    assert kept(study)["best"]["step"] == 3
    assert in_use(study) == {"model": 3.0}


def test_with_several_objectives_or_without_a_report_the_last_weights_stand(make_study: MakeStudy) -> None:
    several = make_study(name="several", trials=1, direction=None, objectives={"score": "maximize", "cost": "minimize"})
    work(several, filled(returned=lambda: (1.0, 2.0)))
    silent = make_study(name="silent", trials=1)
    work(silent, filled(every=99))
    assert "best" not in kept(several)
    assert kept(silent)["best"] is None
    for study in (several, silent):
        (found,) = best(study)
        assert hpo.load_weights(found.checkpoint).keys() == {"model", "average", "optimizer"}
        assert hpo.load_weights(found.checkpoint)["model"]["weight"].tolist() == [[4.5, 4.5]]
        assert found.receipt == {}


class Deadly:
    """A value that kills its process when it is read, once."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __float__(self) -> float:
        if not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 7.0


@pytest.mark.parametrize("leave_at", [2, None])
def test_a_trial_killed_after_its_loop_starts_over(make_study: MakeStudy, tmp_path: Path, leave_at: int | None) -> None:
    """Its checkpoint is recorded and its end is not. It does not go on after the `break`."""
    study = make_study(trials=1, recovery=EVERY_EPOCH)
    objective = filled(leave_at=leave_at, returned=lambda: Deadly(tmp_path / "killed"))
    assert killed(study, objective)
    assert rows(study)[0].checkpoint_epoch == (4 if leave_at is None else leave_at)
    assert not killed(study, objective)
    ended = len(CURVE) if leave_at is None else leave_at + 1
    (trial,) = trials(study)
    assert (trial.value, trial.intermediate_values) == (7.0, dict(enumerate(CURVE[:ended])))
    assert rows(study)[0].attempt == 3  # killed, started over, ended
    state = kept(study)
    assert (state["has_ended"], state["best"]["step"]) == (True, 1)
    assert in_use(study)["model"] == 1.0


def test_a_break_at_the_best_epoch_keeps_the_weights_from_before_it(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    work(study, filled(leave_at=1))
    assert kept(study)["best"]["step"] == 1
    assert in_use(study)["model"] == 1.0


def test_the_best_report_may_come_after_the_loop(make_study: MakeStudy) -> None:
    study = make_study(trials=1)

    def objective(trial: optuna.Trial) -> float:
        model = nn.Linear(2, 1, bias=False)
        for epoch in hpo.epochs(trial, 2, model=model):
            nn.init.constant_(model.weight, float(epoch))
            trial.report(5.0 + epoch, epoch)
        nn.init.constant_(model.weight, 9.0)
        trial.report(1.0, 2)
        return 1.0

    work(study, objective)
    assert (best(study)[0].receipt, kept(study)["best"]["step"]) == ({"best_step": 2}, 2)
    assert in_use(study) == {"model": 9.0}


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Let the disk take no file of more than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_no_trial_and_leaves_the_checkpoint_before(
    make_study: MakeStudy, caplog: pytest.LogCaptureFixture
) -> None:
    """It is full from the third epoch on. The worker stops in the fifth, when nothing can be saved either."""
    study, seen, stopping = make_study(trials=1, recovery=EVERY_EPOCH), [], StopSignal()

    def objective(trial: optuna.Trial) -> float:
        model = nn.Linear(1000, 1000)  # 4 MB
        for epoch in hpo.epochs(trial, 6, model=model):
            nn.init.constant_(model.weight, float(epoch))
            seen.append(epoch)
            if len(seen) == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if len(seen) == 5:
                stopping.request()
            trial.report(torch.rand(()).item(), epoch)
        return 0.0

    with full_disk(2**33):
        work(study, objective, stopping)
        (file,) = study.trial_folder(0).iterdir()
        assert checkpoint.load(file)["epoch"] == 2
    assert caplog.text.count("no checkpoint of epoch") == 1  # told once
    assert "File too large" in caplog.text
    assert work(study, objective) == 0
    assert seen == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    undisturbed = make_study(name="undisturbed", trials=1)
    work(undisturbed, objective)
    assert trials(study)[0].intermediate_values == trials(undisturbed)[0].intermediate_values


def test_a_file_that_no_loop_has_saved_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "other.pt", {"model": {}})
    with pytest.raises(
        CheckpointError, match=r"other\.pt holds no objects of hpo\.epochs; give the file that `hpo export` names"
    ):
        hpo.load_weights(tmp_path / "other.pt")
