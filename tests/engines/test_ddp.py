"""Trials on two processes that train together with torch.distributed, by gloo on the CPU."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import psutil
import pytest
from optuna.trial import TrialState

from hpo.launch.local import Fleet
from hpo.study.study import Study
from hpo.worker.signals import StopSignal
from tests.integration.processes import failures
from tests.support.trials import MakeStudy
from tests.support.waiting import wait_for
from tests.worker.test_command import only, work

pytestmark = [pytest.mark.engines, pytest.mark.parametrize("storage_kind", ["sqlite"], indirect=True)]
EPOCHS = 5
DDP = """
import hashlib, json, os, pathlib, signal, time
import optuna, torch
import torch.distributed as dist
from torch import nn
import hpo
HERE = pathlib.Path(__file__).parent
RANK = int(os.environ.get("RANK", "-1"))  # the worker imports this file too
def note(**said):
    with (HERE / f"seen-{RANK}.jsonl").open("a") as file:
        file.write(json.dumps(said) + "\\n")
def train(config, trial):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    rows = torch.Generator().manual_seed(RANK)
    for epoch in hpo.epochs(trial, config["epochs"], model=model.module, optimizer=optimizer, rows=rows):
        loss = model(torch.randn(64, 8, generator=rows)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        weights = torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])
        note(epoch=epoch, lr=config["lr"], weights=hashlib.sha256(weights.numpy().tobytes()).hexdigest())
        at(epoch)
        trial.report(mean.item(), epoch)
        if trial.should_prune():
            note(pruned=epoch)
            raise optuna.TrialPruned
    dist.destroy_process_group()
    return mean.item()
"""
PLAIN = "def at(epoch):\n    pass\n"
KILLED = """
def at(epoch):
    if epoch == 2 and RANK == 1 and not (HERE / "killed").exists():
        (HERE / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""
WAITING = """
def at(epoch):
    while epoch == 2 and not (HERE / "go").exists():
        time.sleep(0.02)
"""


def ranked(make_study: MakeStudy, text: str, **document: Any) -> Study:
    space = {"lr": {"low": 0.01, "high": 0.1, "log": True}, "epochs": EPOCHS}
    settings = {
        "train": "ranked.py:train",
        "space": space,
        "processes_per_trial": 2,
        "direction": "minimize",
        **document,
    }
    study = make_study(trials=1, objective=None, **settings)
    (study.code_folder / "ranked.py").write_text(text)
    return study


def seen(study: Study, rank: int) -> list[dict[str, Any]]:
    file = study.code_folder / f"seen-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def epochs(study: Study, rank: int) -> list[int]:
    return [said["epoch"] for said in seen(study, rank) if "epoch" in said]


EVERY = {"checkpoint_every": "0s"}


def test_a_killed_rank_ends_all_and_the_trial_goes_on_as_if_undisturbed(make_study: MakeStudy) -> None:
    whole = ranked(make_study, DDP + PLAIN, name="whole", recovery=EVERY, pruner={"name": "none"})
    work(whole)
    assert epochs(whole, 0) == epochs(whole, 1) == [*range(EPOCHS)]
    assert seen(whole, 0) == seen(whole, 1)  # equal weights after every epoch
    assert only(whole).state is TrialState.COMPLETE
    (whole.code_folder / "seen-0.jsonl").unlink()
    (whole.code_folder / "seen-1.jsonl").unlink()
    sys.modules.pop("ranked")

    study = ranked(make_study, DDP + KILLED, name="killed", recovery=EVERY, pruner={"name": "none"})
    work(study)
    (failure,) = failures(study)
    assert (failure.kind, failure.attempt) == ("lost_worker", 1)
    assert failure.message.startswith("rank 1 was killed by SIGKILL")
    assert epochs(study, 0)[-3:] == epochs(study, 1)[-3:] == [2, 3, 4]
    assert epochs(study, 1) == [0, 1, 2, 2, 3, 4]
    assert only(study).state is TrialState.COMPLETE
    assert (only(study).value, only(study).intermediate_values) == (only(whole).value, only(whole).intermediate_values)


def test_both_ranks_are_parked_and_pruned_at_the_same_epoch(make_study: MakeStudy) -> None:
    study = ranked(make_study, DDP + WAITING, pruner={"name": "threshold", "upper": 100.0, "n_warmup_steps": 0})
    stopping = StopSignal()

    def park() -> None:
        wait_for(lambda: [epochs(study, rank)[-1:] for rank in (0, 1)] == [[2], [2]])
        stopping.request()
        (study.code_folder / "go").touch()

    thread = threading.Thread(target=park)
    thread.start()
    work(study, stopping)
    thread.join()
    assert epochs(study, 0) == epochs(study, 1) == [0, 1, 2]
    assert only(study).state is TrialState.RUNNING
    assert failures(study) == []
    (study.code_folder / "ranked.py").write_text(
        DDP.replace("mean.item(), epoch", "mean.item() + 999 * (epoch == 4), epoch") + PLAIN
    )
    work(study)
    assert epochs(study, 0) == epochs(study, 1) == [0, 1, 2, 3, 4]
    assert [seen(study, rank)[-1] for rank in (0, 1)] == [{"pruned": 4}] * 2
    assert (only(study).state, max(only(study).intermediate_values)) == (TrialState.PRUNED, 4)


RETURNS_AFTER_THE_LOOP = """
import os, pathlib, time
import hpo
HERE = pathlib.Path(__file__).parent
def train(config, trial):
    value = -1.0
    for epoch in hpo.epochs(trial, config["epochs"], state={}):
        value = float(epoch)
        trial.report(value, epoch)
        (HERE / f"at-{os.environ['RANK']}-{epoch}").touch()
        while epoch == 4 and not (HERE / "go").exists():
            time.sleep(0.02)
    return value
"""


def test_a_trial_that_is_to_be_parked_in_its_last_epoch_is_completed(make_study: MakeStudy) -> None:
    """Parked there, it would go on without an epoch to train, and return the value from before its loop."""
    study = ranked(make_study, RETURNS_AFTER_THE_LOOP, pruner={"name": "none"})
    stopping = StopSignal()

    def park() -> None:
        wait_for(lambda: all((study.code_folder / f"at-{rank}-4").exists() for rank in (0, 1)))
        stopping.request()
        (study.code_folder / "go").touch()

    thread = threading.Thread(target=park)
    thread.start()
    work(study, stopping)
    thread.join()
    assert (only(study).state, only(study).value) == (TrialState.COMPLETE, 4.0)


SILENT = """
import os, pathlib, time
HERE = pathlib.Path(__file__).parent
def train(config, trial):
    saved = pathlib.Path(os.environ["HPO_CHECKPOINT_DIR"]) / f"rank-{os.environ['RANK']}"
    start = int(saved.read_text()) if saved.exists() else 0
    for epoch in range(start, config["epochs"]):
        trial.report(float(epoch), epoch)
        saved.write_text(str(epoch + 1))
        (HERE / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        if epoch == 2 and os.environ["RANK"] == "1" and not (HERE / "silent").exists():
            (HERE / "silent").touch()
            time.sleep(3600)
    return 7.0
"""


def test_a_silent_rank_ends_all_and_the_trial_goes_on(make_study: MakeStudy) -> None:
    """With checkpoints of the training's own."""
    recovery, retries = {"rank_timeout": "10s", "grace": "5s"}, {"lost_worker": {"retries": 9}}
    study = ranked(make_study, SILENT, recovery=recovery, failures=retries, pruner={"name": "none"})
    work(study)
    assert {failure.kind for failure in failures(study)} == {"lost_worker"}
    first = "no rank has printed or reported anything for 10 s (recovery.rank_timeout): rank "
    assert all(failure.message.startswith(first) for failure in failures(study))
    trial = only(study)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 7.0)
    assert trial.intermediate_values == {epoch: float(epoch) for epoch in range(EPOCHS)}


def test_a_killed_worker_leaves_no_rank(make_study: MakeStudy) -> None:
    study = ranked(make_study, SILENT)
    fleet = Fleet(study, 1, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    try:
        wait_for((study.code_folder / "silent").exists)
        pids = [int((study.code_folder / f"pid-{rank}").read_text()) for rank in (0, 1)]
        assert all(map(psutil.pid_exists, pids))
        os.kill(fleet.slots[0].pid, signal.SIGKILL)
        wait_for(lambda: not any(is_at_work(pid) for pid in pids))
    finally:
        fleet.end()


def is_at_work(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
