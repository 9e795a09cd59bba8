"""Where local workers come from: forked from a server that has loaded torch once, so that N start in the time of one.

The server is Python's own (multiprocessing's forkserver). It opens no GPU, no connection and no file, runs nothing of the
user's, and ends with the process that started it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, util
from multiprocessing.process import BaseProcess
from pathlib import Path

from hpo.worker.signals import ORDER

CONTEXT = multiprocessing.get_context("forkserver")
ANY = ["hpo.launch.preload", "hpo.cli.run", "hpo.worker.loop", "hpo.study.resolve"]
#: For a declared study. Not for an objective of the user's own, which may have something to say to torch before it loads it.
DECLARED = ["hpo.worker.objective", "sklearn.datasets", "sklearn.model_selection"]
COMPILER = ["torch._dynamo"]  # which torch's own steps of an optimizer load, and those of a stack do not
#: Of the server. Some libraries read it when they are loaded; a training sets its own number of threads.
SETTINGS = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FOLDER = "HPO_SERVER_FOLDER"  # in the server's environment: its socket's folder, which it removes if its starter cannot
LONGEST_FOLDER = 64  # bytes of a path; the server's socket lies in it, and the path of a socket has 107 at most


def warm_up(executor: str | None) -> None:
    """Start the server, if there is none yet, and let it load what workers need; do not wait for it.

    Args:
        executor: which a declared study asks for; None for an objective of the user's own.
    """
    declared = [] if executor is None else DECLARED + COMPILER if executor == "loop" else DECLARED
    CONTEXT.set_forkserver_preload(ANY + declared)
    with _as_the_server_needs_it():
        forkserver.ensure_running()


@contextmanager
def _as_the_server_needs_it() -> Iterator[None]:
    """Wherever a server may be started: its environment, and a folder for its socket."""
    environment, folder = {**os.environ}, tempfile.gettempdir()
    os.environ.update(SETTINGS)
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        tempfile.tempdir = "/tmp"  # multiprocessing makes a folder of its own in it
    if multiprocessing.parent_process() is None:  # else the folder is that process's, which goes on to use it
        os.environ[FOLDER] = util.get_temp_dir()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = folder


def start(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> BaseProcess:
    """Start `hpo worker ARGUMENTS` in a session of its own; what it says goes to the end of the log.

    A server that was killed is started again. Raises EOFError or OSError if it is killed just now.
    """
    worker = CONTEXT.Process(target=_be_a_worker, args=([*arguments], {**environment}, str(log), os.getcwd()))
    with _as_the_server_needs_it():
        worker.start()
    return worker


def ask(worker: BaseProcess) -> None:
    """Ask a worker to park its trials and leave."""
    assert worker.pid is not None
    with suppress(ProcessLookupError):
        os.kill(worker.pid, ORDER)


def kill(worker: BaseProcess) -> None:
    """Kill a worker, even one that outlives its server, of which multiprocessing knows nothing any more."""
    assert worker.pid is not None
    with suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)


def ids() -> frozenset[int]:
    """Return the process ids of the server, if there is one."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return frozenset() if server is None else frozenset({server})


def _be_a_worker(arguments: list[str], environment: dict[str, str], log: str, folder: str) -> None:
    gc.freeze()  # what the server has loaded is no garbage; each look through it took 0.3 s and copied its memory
    os.setsid()  # a Ctrl-C in the terminal reaches only the parent
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
    _let_the_server_end()
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed()  # else every worker would draw what the others draw
    command = ["worker", *arguments, "--parent", str(os.getppid())]  # the server, which ends with whoever started it
    starter = multiprocessing.parent_process()
    if starter is None or not starter.is_alive():
        return
    sys.argv = ["hpo", *command]
    sys.orig_argv = [sys.executable, "-P", "-m", "hpo", *command]  # for a process that starts afresh
    runpy.run_module("hpo", run_name="__main__", alter_sys=True)


def _let_the_server_end() -> None:
    """Let go of the pipe by which the server knows that it is needed: it ends with `hpo run`, and so do its workers then.

    multiprocessing hands the pipe to each of its processes, for children of their own.
    """
    server = forkserver._forkserver
    os.close(server._forkserver_alive_fd)  # type: ignore[attr-defined]
    server._forkserver_alive_fd = None  # type: ignore[attr-defined]
