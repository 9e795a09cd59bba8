"""The first module that the fork server imports. It blocks signals in the server, and lets it adopt orphans.

A terminal or Slurm signals every process of a group. The server must survive this, since it reports how its workers ended. A
signal to a new worker stays pending until the worker's `StopSignal` is installed.
"""

import atexit
import gc
import os
import shutil
import signal
import time
import warnings

from hpo.worker import descendants
from hpo.worker.signals import HEARD

STARTER_SECONDS = 1.0  # for the starter to end after its pipe was closed


def _tidy(server: int, starter: int, folder: str) -> None:
    """Remove the folder of the server's socket if the process that started the server was killed before it could."""
    deadline = time.monotonic() + STARTER_SECONDS
    while os.getpid() == server and time.monotonic() < deadline:
        if os.getppid() != starter:
            shutil.rmtree(folder, ignore_errors=True)
            return
        time.sleep(0.01)


gc.disable()  # the server only loads modules and forks; each worker enables it
descendants.adopt_orphans()
warnings.filterwarnings("ignore", message="forkserver: waitpid returned unexpected pid")  # of an orphan
signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
if (folder := os.environ.get("HPO_SERVER_FOLDER")) is not None:
    atexit.register(_tidy, os.getpid(), os.getppid(), folder)
