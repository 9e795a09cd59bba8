"""A folder to run `hpo` commands in, each a process of its own, on an objective that the test writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hpo.storage.connect import Storage
from hpo.study import study as studies
from hpo.study.study import Study

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


class Shell:
    """A folder to run `hpo` commands in, each a process of its own."""

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

    def run(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == code, said
        return said

    def study(self, place: Storage) -> Study:
        return studies.join(place, "own")
