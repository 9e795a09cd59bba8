"""Ray: a driver process on this machine keeps an actor for each worker in a cluster.

The driver belongs to no terminal. Actors end with it, and their workers park. It follows the study's database, so whatever
changes a launch needs no word with it. Only the driver imports the module `ray`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from hpo.errors import LaunchError
from hpo.launch.engines.engine import HPO, Engine, Request
from hpo.launch.engines.ray_cluster import MISSING
from hpo.launch.logs import launched_name
from hpo.queue.launches import Handle
from hpo.worker import descendants

DRIVER = (*HPO[:-1], "hpo.launch.engines.ray_driver")
SLOT = "SLOT"  # in a plan, for the number of a slot
CONNECT_SECONDS = 120.0  # for which a driver is waited for until it has reached its cluster, or started one
#: Starts the driver without waiting for it, and prints its process id. $0 is the log.
START = '"$@" >>"$0" 2>&1 </dev/null & echo $!'
SCRIPT = """\
#!/bin/sh
# A driver for {workers} of {storage}. Run it on a node of the cluster, or hand it to the cluster:
#   ray job submit --address http://HEAD:8265 --working-dir . -- sh THIS_FILE
# HPO_STORAGE must be in its environment. With token authentication, so must RAY_AUTH_MODE and RAY_AUTH_TOKEN.
: "${{HPO_STORAGE:?set it to the URL of the storage, then run this again}}"
exec {driver}
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a driver is told on its command line. Nothing here is secret."""

    study: str
    launch: int | None  # None without a record in the database: all slots are wanted
    first: int  # slot
    last: int
    command: list[str]  # of a worker, without the interpreter; SLOT stands for the slot
    folder: str  # in which the workers begin
    log: str | None  # of a worker, with SLOT; None for Ray's own logs
    state: str | None  # the file in which the driver says what its slots do
    grace: float
    address: str | None
    gpus: float | None  # of a worker; None for one if the cluster has any
    cpus: float
    resources: dict[str, float]
    environment: list[str]  # names of variables of the driver that workers get too

    @classmethod
    def read(cls, words: str) -> Plan:
        return cls(**json.loads(words))

    @property
    def words(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def check(request: Request) -> None:
    """Raise LaunchError for what Ray cannot do."""
    gpus = request.section.gpus_per_worker
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise LaunchError(
            f"launch.gpus_per_worker = {gpus:g}: Ray gives a part of one GPU, or whole GPUs; use {int(gpus)} or {int(gpus) + 1}"
        )


def render(request: Request) -> str:
    """Return a shell script that runs the driver."""
    count = len(request.slots)
    return SCRIPT.format(
        workers=f"{count} worker{'s' * (count > 1)} of study {request.study!r}",
        storage=request.storage,
        driver=shlex.join([*DRIVER, _plan(request).words]),
    )


def submit(request: Request) -> list[Handle]:
    """Start a driver, and wait until it has reached its cluster."""
    if importlib.util.find_spec("ray") is None:
        raise LaunchError(MISSING)
    plan = _plan(request)
    assert request.logs is not None
    assert plan.state is not None
    said = Path(plan.state).with_suffix(".log")
    Path(plan.state).unlink(missing_ok=True)  # of a launch of this number that was refused
    with descendants.letting_go():
        started = subprocess.run(
            ["/bin/sh", "-c", START, str(said), *DRIVER, plan.words],
            env={**os.environ, **request.environment},
            stdout=subprocess.PIPE,
            start_new_session=True,
            check=True,
        )
    driver = psutil.Process(int(started.stdout))
    about = {"host": platform.node(), "pid": driver.pid, "began": driver.create_time(), "state": plan.state}
    _wait_for(driver, Path(plan.state), said)
    return [{**about, "first": plan.first, "last": plan.last}]


def present(handles: Sequence[Handle]) -> Mapping[int, str] | None:
    """Return what the drivers on this machine say of their slots. None if one is on another machine."""
    if any(handle["host"] != platform.node() for handle in handles):
        return None
    found: dict[int, str] = {}
    for handle in handles:
        if _driver(handle) is not None:
            with suppress(OSError, ValueError):
                states = json.loads(Path(handle["state"]).read_text())["slots"]
                found |= {int(slot): state for slot, state in states.items()}
    return found


def cancel(handles: Sequence[Handle]) -> None:
    """Ask the drivers on this machine to end. Others see in the database that their launch was recalled."""
    for handle in handles:
        driver = _driver(handle)
        if driver is not None:
            driver.send_signal(signal.SIGTERM)


def dismiss(handles: Sequence[Handle], slots: Collection[int]) -> None:
    """Do nothing: a driver sees in the database which slots are retired, and drops those that wait."""
    del handles, slots


def _plan(request: Request) -> Plan:
    section, options = request.section, request.section.ray
    log = state = None
    if request.logs is not None and request.launch is not None:
        log = str(request.logs / launched_name(request.launch, SLOT))
        state = str(request.logs / f"driver-launch-{request.launch}-{request.slots.start}.json")
    return Plan(
        study=request.study,
        launch=request.launch,
        first=request.slots.start,
        last=request.slots.stop - 1,
        command=request.worker(SLOT, hpo=HPO[1:]),
        folder=str(request.folder),
        log=log,
        state=state,
        grace=request.grace,
        address=options.address,
        gpus=section.gpus_per_worker,
        cpus=options.cpus_per_worker,
        resources=options.resources,
        environment=options.environment,
    )


def _wait_for(driver: psutil.Process, state: Path, said: Path) -> None:
    """Wait until a driver has written its first state. Raises LaunchError with its words if it ends before."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while not state.exists():
        if not descendants.is_alive(driver.pid):
            raise LaunchError(*_last_words(said))
        if time.monotonic() > deadline:
            driver.terminate()
            raise LaunchError(f"the driver has not reached its cluster within {CONNECT_SECONDS:.0f} s (log: {said})")
        time.sleep(0.1)


def _last_words(said: Path) -> list[str]:
    """Return the error with which a driver has ended, without what Ray itself has printed before."""
    lines = said.read_text(errors="replace").splitlines()[-12:]
    first = next((index for index, line in enumerate(lines) if line.startswith("error: ")), 0)
    return [line.removeprefix("error: ") for line in lines[first:]] or ["the driver ended without a word"]


def _driver(handle: Handle) -> psutil.Process | None:
    """Return the driver's process; None if it has ended or is on another machine."""
    if handle["host"] != platform.node():
        return None
    with suppress(psutil.Error):
        process = psutil.Process(handle["pid"])
        if process.create_time() == handle["began"] and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


ENGINE = Engine(
    spans_hosts=True, check=check, render=render, submit=submit, present=present, cancel=cancel, dismiss=dismiss
)
