"""Loaded first by the server that workers are forked from: signals wait there for the workers to take them.

A terminal, or Slurm's notice, signals every process of a group. The server must outlive that, or nobody would learn how
its workers ended; and a signal to a worker that is just being made waits until `StopSignal` is there to hear it.
"""

import atexit
import os
import shutil
import signal
import time

from hpo.worker.signals import HEARD

STARTER_SECONDS = 1.0  # that a starter may take to be gone, whose end shows in its pipe first


def _tidy(server: int, starter: int, folder: str) -> None:
    """Remove the folder of the server's socket, if whoever started the server did not live to do it."""
    deadline = time.monotonic() + STARTER_SECONDS
    while os.getpid() == server and time.monotonic() < deadline:
        if os.getppid() != starter:
            shutil.rmtree(folder, ignore_errors=True)
            return
        time.sleep(0.01)


signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
if (folder := os.environ.get("HPO_SERVER_FOLDER")) is not None:
    atexit.register(_tidy, os.getpid(), os.getppid(), folder)
