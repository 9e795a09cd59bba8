"""Workers on a real Ray cluster of several nodes: driven, shared GPUs, killed and drained nodes, a killed driver.

One cluster serves all tests. Its GPUs are invented.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpo.queue import launches
from hpo.storage.connect import connect
from hpo.study import study as studies
from tests.engines import needed
from tests.support.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.engines
OBJECTIVE = """
import os, time

def objective(trial):
    x = trial.suggest_float("x", -1, 1)
    trial.set_user_attr("gpu", os.environ.get("CUDA_VISIBLE_DEVICES"))
    trial.set_user_attr("worker", os.getpid())
    for step in range(1, 4):
        time.sleep(0.2)
        trial.report(x * x / step, step)
    return x * x
"""
STUDY = """
name = "own"
objective = "mine.py:objective"
direction = "minimize"
sampler = {{ name = "random" }}
pruner = {{ name = "none" }}
[budget]
trials = {trials}
[recovery]
lease = "6s"
grace = "10s"
[launch]
on = "ray"
workers = 4
gpus_per_worker = 0.5
"""


class RayNodes:
    """The cluster, in a process of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.ray_nodes", "2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.address = self._heard()

    def order(self, what: str, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {number}\n")
        self.process.stdin.flush()
        assert self._heard() == "done"

    def _heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A cluster with one node, which has two GPUs."""
    needed.module("ray", "ray")
    cluster = RayNodes()
    daemons = psutil.Process(cluster.process.pid).children(recursive=True)
    yield cluster
    cluster.process.communicate(timeout=PATIENCE)
    assert cluster.process.returncode == 0
    assert psutil.wait_procs(daemons, timeout=PATIENCE)[1] == []


class Launched:
    """A study on Postgres, whose workers are launched from a command line."""

    def __init__(self, folder: Path, address: str, url: str, trials: int) -> None:
        self.folder = folder
        self.environment = {**os.environ, "HPO_STORAGE": url}
        self._address = address
        (folder / "mine.py").write_text(OBJECTIVE)
        (folder / "study.toml").write_text(STUDY.format(trials=trials))
        self.place = connect(url, create=True)

    def launch(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = ["launch", "study.toml", "--set", f"ray.address={self._address}", *options]
        return subprocess.run(
            [sys.executable, "-P", "-m", "hpo", *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )

    @property
    def trials(self) -> list[Any]:
        study = studies.join(self.place, "own")
        return list(study.optuna.get_trials(deepcopy=False))

    def count(self, state: str) -> int:
        return sum(trial.state.name == state for trial in self.trials)

    def driver(self, launch: int) -> psutil.Process:
        study = studies.join(self.place, "own")
        found = launches.of_study(self.place.engine, study.uid)[launch - 1]
        return psutil.Process(found.handles[0]["pid"])

    def log(self, launch: int) -> str:
        return (studies.join(self.place, "own").logs / f"driver-launch-{launch}-0.log").read_text()

    def wait_for(self, condition: Callable[[], bool], launch: int = 1) -> None:
        """Wait for something that happens while a launch's driver lives."""
        wait_for(lambda: condition() or not _is_alive(self.driver, launch))
        assert condition(), self.log(launch)

    def wait_for_end(self, launch: int) -> None:
        """Wait until a launch's driver and all its workers have ended."""
        wait_for(lambda: not _is_alive(self.driver, launch))


def _is_alive(driver: Any, launch: int) -> bool:
    try:
        return bool(driver(launch).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@contextmanager
def launched(folder: Path, nodes: RayNodes, url: str, trials: int) -> Iterator[Launched]:
    study = Launched(folder, nodes.address, url, trials)
    try:
        yield study
    finally:
        study.place.close()


def test_two_workers_share_a_gpu_and_a_new_driver_takes_over_from_a_killed_one(
    nodes: RayNodes, tmp_path: Path, postgres_url: str
) -> None:
    with launched(tmp_path, nodes, postgres_url, trials=24) as study:
        first = study.launch()
        assert first.returncode == 0, first.stderr
        study.wait_for(lambda: len({trial.user_attrs.get("worker") for trial in study.trials if trial.user_attrs}) == 4)
        places = {(trial.user_attrs["worker"], trial.user_attrs["gpu"]) for trial in study.trials if trial.user_attrs}
        assert sorted(gpu for _, gpu in places) == ["0", "0", "1", "1"]
        workers = [psutil.Process(worker) for worker, _ in places]
        study.driver(1).kill()
        assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []
        assert study.count("COMPLETE") < 24
        second = study.launch()
        assert second.returncode == 0, second.stderr
        study.wait_for_end(2)
        assert study.count("COMPLETE") == 24
        assert study.log(2).splitlines()[-1].endswith("leaving with exit code 0")


def test_a_killed_node_and_a_drained_one_cost_no_trial(nodes: RayNodes, tmp_path: Path, postgres_url: str) -> None:
    for _ in range(2):
        nodes.order("add", 1)
    with launched(tmp_path, nodes, postgres_url, trials=48) as study:
        done = study.launch()
        assert done.returncode == 0, done.stderr
        study.wait_for(lambda: study.count("COMPLETE") >= 4)
        nodes.order("kill", 0)
        nodes.order("drain", 1)
        study.wait_for_end(1)
        assert [trial.number for trial in study.trials] == [*range(48)]
        assert study.count("COMPLETE") == 48
        said = study.log(1)
        assert said.count("its node is gone, or cannot be reached; another worker starts") >= 1
        assert said.count("is draining; the worker parks its trials") >= 1
        assert said.count("has parked its trials; it goes on elsewhere") >= 1
        assert said.splitlines()[-1].endswith("leaving with exit code 0")


def test_workers_for_which_no_node_is_large_enough_wait_until_they_are_called_back(
    nodes: RayNodes, tmp_path: Path, postgres_url: str
) -> None:
    with launched(tmp_path, nodes, postgres_url, trials=4) as study:
        done = study.launch("--gpus-per-worker", "64")
        assert done.returncode == 0, done.stderr
        study.wait_for(
            lambda: "4 of 4 workers wait for a place: each needs 64 GPU and 1 CPU, and no node" in study.log(1)
        )
        joined = studies.join(study.place, "own")
        launches.recall(study.place.engine, joined.study_id, joined.uid)
        study.wait_for_end(1)
        assert study.log(1).splitlines()[-1].endswith("leaving with exit code 0")
        assert study.trials == []


def test_a_node_without_hpo_is_given_up_with_the_reason(nodes: RayNodes, tmp_path: Path, postgres_url: str) -> None:
    nodes.order("bare", 1)
    with launched(tmp_path, nodes, postgres_url, trials=4) as study:
        done = study.launch("--workers", "1", "--set", "ray.resources={bare=1}")
        assert done.returncode == 0, done.stderr
        study.wait_for_end(1)
        said = study.log(1)
        assert (
            said.count("the actor could not begin: ModuleNotFoundError: No module named 'hpo'; every node needs") == 3
        )
        assert said.splitlines()[-1].endswith("leaving with exit code 1")


def test_an_address_without_a_cluster_is_an_error_and_records_nothing(
    nodes: RayNodes, tmp_path: Path, postgres_url: str
) -> None:
    with launched(tmp_path, nodes, postgres_url, trials=4) as study:
        done = study.launch("--set", "ray.address=127.0.0.1:1")
        assert done.returncode == 2
        assert "launch.ray.address: no cluster was reached at address '127.0.0.1:1'" in done.stderr
        assert launches.of_study(study.place.engine, studies.join(study.place, "own").uid) == []
