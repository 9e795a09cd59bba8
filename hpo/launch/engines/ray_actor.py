"""What runs on a node of a Ray cluster: an actor that starts one worker as a child and waits for it.

The actor knows neither torch nor the database. If it dies, its worker gets SIGTERM and parks its trials.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Becomes the worker. Before that it asks the kernel for a SIGTERM at its parent's death, which an exec does not undo.
BECOME = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() != int(sys.argv[1]): sys.exit(143)
os.execv(sys.argv[2], sys.argv[2:])
"""
LAST_LINES = 12  # of a worker's log that the driver gets
LAST_BYTES = 8192  # of the log in which they are looked for
NO_FOLDER = 2  # an exit code: the user must change something first


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor is."""

    node: str  # Ray's id of the node
    host: str
    gpus: str  # CUDA_VISIBLE_DEVICES, as Ray has set it; "" without a GPU


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a worker has ended."""

    code: int  # one of hpo.launch.exit_codes
    seconds: float  # for which it lived
    last_lines: list[str]  # of its log


class WorkerActor:
    """Runs one worker on this node. `run` blocks, so it needs a thread beside the one for the other calls."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._is_asked = False
        self._starting = threading.Lock()

    def place(self) -> Place:
        """Return where this actor is."""
        import ray

        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "") if ray.get_gpu_ids() else ""
        return Place(node=ray.get_runtime_context().get_node_id(), host=platform.node(), gpus=gpus)

    def run(self, command: Sequence[str], environment: Mapping[str, str], folder: str, log: str) -> Ended:
        """Run a worker to its end. The thread of this call is the one at whose end the kernel sends SIGTERM.

        Args:
            command: the worker's command without the interpreter.
            environment: what it gets beside the environment of this process, or in its place.
            folder: its working directory.
            log: the file to which its output is appended.
        """
        began = time.monotonic()
        try:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            with self._starting, open(log, "ab") as output:
                if self._is_asked:
                    return Ended(code=128 + signal.SIGTERM, seconds=0.0, last_lines=[])
                self._child = subprocess.Popen(
                    [sys.executable, "-S", "-E", "-c", BECOME, str(os.getpid()), sys.executable, *command],
                    env={**os.environ, **environment},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C in the driver's terminal must not reach it
                )
        except OSError as error:
            said = f"host {platform.node()}: {error.filename}: {error.strerror}; every node needs this folder"
            return Ended(code=NO_FOLDER, seconds=0.0, last_lines=[said])
        code = self._child.wait()
        return Ended(code=code, seconds=time.monotonic() - began, last_lines=_last_lines(log))

    def ask(self) -> None:
        """Ask the worker to park its trials and leave. May come before `run`."""
        with self._starting:
            self._is_asked = True
            if self._child is not None and self._child.poll() is None:
                self._child.terminate()


def _last_lines(log: str) -> list[str]:
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
