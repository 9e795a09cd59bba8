"""A folder to run `hpo` commands in, on an objective that the test writes.

What signals or fresh starts are about is a process of its own. Other commands are forked from a server that has torch loaded
already, which saves the seconds of its import.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hpo.storage.connect import Storage
from hpo.study import study as studies
from hpo.study.study import Study
from tests.integration import processes
from tests.support.waiting import PATIENCE

OWN = """
name = "own"
objective = "mine.py:objective"
direction = "minimize"
[budget]
trials = TRIALS
[sampler]
name = "random"
[pruner]
name = "none"
"""


def forked(
    arguments: tuple[str, ...],
    folder: Path,
    environment: dict[str, str],
    code: int,
    prepare: Callable[[], object] = bool,
) -> str:
    """Run a command in a fork of the workers' server and return what it said.

    Args:
        prepare: is called in the fork before the command, in its folder.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        log = Path(elsewhere) / "said"
        process = processes.fork(_be, list(arguments), folder, environment, str(log), prepare)
        process.join(PATIENCE)
        process.kill()
        process.join()
        said = log.read_text() if log.exists() else ""
    assert process.exitcode == code, f"exit code {process.exitcode}\n{said}"
    return said


def _be(
    arguments: list[str], folder: Path, environment: dict[str, str], log: str, prepare: Callable[[], object]
) -> None:
    """Be `hpo ARGUMENTS` in this folder, with nothing of the server's environment."""
    os.chdir(folder)
    os.environ.clear()
    prepare()
    processes.main(arguments, environment, log)


class Shell:
    """A folder to run `hpo` commands in."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("HPO_")}
        self.environment |= {"HPO_STORAGE": url, "HPO_CHECKPOINTS": str(folder / "checkpoints")}
        self.running: list[subprocess.Popen[str]] = []

    def write(self, objective: str, trials: int = 3, more: str = "") -> None:
        (self.folder / "mine.py").write_text(objective)
        (self.folder / "own.toml").write_text(OWN.replace("TRIALS", str(trials)) + more)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hpo", *arguments],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def forked(self, *arguments: str, code: int = 0) -> str:
        """Run a command in a fork and return what it said."""
        return forked(arguments, self.folder, self.environment, code)

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run a command in a process of its own and return what it said."""
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, said
        return said

    def study(self, place: Storage) -> Study:
        return studies.join(place, "own")
