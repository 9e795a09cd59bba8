"""Starts local workers by forking a server that has imported torch once. So N workers start in the time of one.

The server is a forkserver of multiprocessing, apart from the one that user code may start. It opens no GPU, no connection and no
file, and runs no user code. It ends with the process that started it. On Linux it adopts what killed workers leave running.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

from hpo.worker import descendants
from hpo.worker.signals import ORDER

CONTEXT = multiprocessing.get_context("forkserver")
SERVER = forkserver.ForkServer()
#: Held while a worker starts, so that it is not taken for an orphan, and so that one call at a time changes this process.
_starting = threading.Lock()
_workers: set[int] = set()  # process ids
ANY = ["hpo.launch.preload", "hpo.cli.run", "hpo.worker.loop", "hpo.study.resolve"]
#: Preloaded for a declared study only. A user's own objective may set options of torch before it imports torch.
DECLARED = ["hpo.worker.objective"]
MEASURES = ["torchmetrics.functional"]  # for metrics that must be asked for; its import takes seconds in each worker
COMPILER = ["torch._dynamo"]  # the steps of torch's optimizers import it, the steps of a stack do not
#: Environment of the server. Some libraries read it at import. A training sets its own number of threads.
SETTINGS = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FOLDER = (
    "HPO_SERVER_FOLDER"  # environment variable: the folder of the server's socket, removed if the starter was killed
)
LONGEST_FOLDER = 64  # bytes of the temporary folder's path; the path of the socket in it has 107 bytes at most


def warm_up(executor: str | None, *, measures: bool = False) -> None:
    """Start the server, if it does not run, and let it import what workers need. Does not wait for it.

    Args:
        executor: the `executor` of a declared study; None for a user's own objective.
        measures: whether metrics beside accuracy and loss are measured.
    """
    declared = [] if executor is None else DECLARED + COMPILER if executor == "loop" else DECLARED
    declared = declared + MEASURES if declared and measures else declared
    SERVER.set_forkserver_preload(ANY + declared)
    with _starting, _as_the_server_needs_it():
        SERVER.ensure_running()


@contextmanager
def _as_the_server_needs_it() -> Iterator[None]:
    """Set the server's environment and the folder of its socket. Needed around each call that may start a server.

    multiprocessing's start method is restored afterwards, since user code may set it.
    """
    folder, method = tempfile.gettempdir(), multiprocessing.get_start_method(allow_none=True)
    before = {name: os.environ.get(name) for name in (*SETTINGS, FOLDER)}
    os.environ.update(SETTINGS)
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        tempfile.tempdir = "/tmp"  # multiprocessing creates its own folder in it
    if multiprocessing.parent_process() is None:  # else the folder belongs to the parent, which still uses it
        os.environ[FOLDER] = util.get_temp_dir()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = folder
        multiprocessing.set_start_method(method, force=True)


@contextmanager
def _from_our_server() -> Iterator[None]:
    """Start processes from our server. multiprocessing knows one server, which belongs to user code."""
    theirs = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = SERVER.connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = theirs


@contextmanager
def _without_the_script() -> Iterator[None]:
    """Hide the script that this process runs. multiprocessing would run it once more in each worker."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def start(arguments: Sequence[str], own: Mapping[str, str], log: Path) -> BaseProcess:
    """Start `hpo worker ARGUMENTS` in a new session. Its output is appended to the log.

    A killed server is started again. Raises EOFError or OSError if the server is killed during the call.

    Args:
        own: what the worker's environment has beside that of this process, or in its place.
    """
    with _starting:
        environment = {**os.environ, **own}
        worker = CONTEXT.Process(target=_be_a_worker, args=([*arguments], environment, str(log), os.getcwd()))
        with _as_the_server_needs_it(), _from_our_server(), _without_the_script():
            worker.start()
        _workers.add(pid_of(worker))
    return worker


def forget(worker: BaseProcess) -> None:
    """Take note that a worker has ended. Another process may get its id."""
    _workers.discard(pid_of(worker))


def pid_of(worker: BaseProcess) -> int:
    assert worker.pid is not None
    return worker.pid


def ask(worker: BaseProcess) -> None:
    """Ask a worker to park its trials and leave."""
    with suppress(ProcessLookupError):
        os.kill(pid_of(worker), ORDER)


def kill(worker: BaseProcess) -> None:
    """Kill a worker. By its process id, since multiprocessing cannot signal a worker whose server is gone."""
    with suppress(ProcessLookupError):
        os.kill(pid_of(worker), signal.SIGKILL)


def end_orphans(*, may_wait: bool = True) -> None:
    """Kill what the server has adopted, with its descendants. It began in workers that were killed.

    Args:
        may_wait: wait while a worker starts. Else nothing is done then.
    """
    if not _starting.acquire(blocking=may_wait):
        return
    try:
        for server in ids():
            descendants.end(of=server, but=_workers)
    finally:
        _starting.release()


def ids() -> frozenset[int]:
    """Return the process id of the server as a set, empty without a server."""
    server = SERVER._forkserver_pid  # type: ignore[attr-defined]
    return frozenset() if server is None else frozenset({server})


def _be_a_worker(arguments: list[str], environment: dict[str, str], log: str, folder: str) -> None:
    gc.freeze()  # the server's objects are no garbage; each collection over them took 0.3 s and copied their memory
    gc.enable()
    os.setsid()  # a Ctrl-C in the terminal then reaches only the parent
    os.environ.clear()
    os.environ.update(environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.close(said)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # as in a process of its own
    _let_the_server_end()
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed()  # else all workers would draw the same numbers
    command = ["worker", *arguments, "--parent", str(os.getppid())]  # the server, which ends with its starter
    starter = multiprocessing.parent_process()
    if starter is None or not starter.is_alive():
        return
    sys.argv = ["hpo", *command]
    sys.orig_argv = [sys.executable, "-P", "-m", "hpo", *command]  # for a restart of this process
    runpy.run_module("hpo", run_name="__main__", alter_sys=True)


def _let_the_server_end() -> None:
    """Close the pipe that keeps the server alive, so that the server, and then the workers, end with `hpo run`.

    multiprocessing hands the pipe to each of its processes, so that they can start children.
    """
    server = forkserver._forkserver
    os.close(server._forkserver_alive_fd)  # type: ignore[attr-defined]
    server._forkserver_alive_fd = None  # type: ignore[attr-defined]
