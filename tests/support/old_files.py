"""What commit ec5e555 left, put down in a folder as if it had been made there, and `hpo` commands run on it.

The commands are processes or forks, and the database is read by plain statements: nothing here knows a module of `hpo`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch

from tests.integration.shell import forked
from tests.support.waiting import PATIENCE

FIXTURES = Path(__file__).parents[1] / "fixtures" / "ec5e555"
ROOT = "/old-home"  # in the files: the folder that they were made in
PATHS = [("hpo_studies", "checkpoints"), ("hpo_studies", "code_folder"), ("hpo_trials", "checkpoint_path")]
PACKAGES = ("torch", "numpy", "optuna", "scikit-learn")  # on which a curve or a suggestion depends
TRIALS = """
    SELECT t.trial_id, t.number, CAST(t.state AS VARCHAR) AS state, h.attempt, h.settled, h.outcome, h.partition, v.value
    FROM trials t JOIN studies s ON s.study_id = t.study_id
    LEFT JOIN hpo_trials h ON h.trial_id = t.trial_id
    LEFT JOIN trial_values v ON v.trial_id = t.trial_id AND v.objective = 0
    WHERE s.study_name = :study ORDER BY t.number
"""


class Home:
    """A folder with a storage in it, where `hpo` commands are run."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder = folder
        self.url = url or f"sqlite:///{folder}/sqlite.db"
        self.engine = sa.create_engine(self.url, poolclass=sa.pool.NullPool)  # which leaves no connection open
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("HPO_")}
        self.environment |= {
            "HPO_STORAGE": self.url,
            "HPO_CHECKPOINTS": str(folder / "checkpoints"),
            "HPO_CACHE": str(folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",  # the files were made on a CPU
        }

    @property
    def is_sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    def run(self, *arguments: str, code: int | None = 0, python: tuple[str, ...] = ("-m", "hpo"), **more: str) -> str:
        """Run a command to its end and return what it printed, what it said on stderr only if any code may come.

        Args:
            code: with which it must end; None for any.
            python: what Python is given in front of the arguments.
            more: environment variables.
        """
        command = [sys.executable, "-P", *python, *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | more, text=True, capture_output=True, timeout=PATIENCE
        )
        if code is None:
            return done.stdout + done.stderr
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def forked(self, *arguments: str) -> str:
        """Run a command in a fork, where nothing hangs on its being a process of its own; return what it said."""
        return forked(arguments, self.folder, self.environment, 0)

    def rows(self, statement: str, **parameters: Any) -> list[dict[str, Any]]:
        """Return what a statement finds in the database."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.text(statement), parameters).mappings()]

    def trials(self, study: str) -> list[dict[str, Any]]:
        """Return all that a study's trials came to, as plain values, times left out."""
        found = self.rows(TRIALS, study=study)
        for trial in found:
            of = trial.pop("trial_id")
            trial["settled"] = bool(trial["settled"])
            trial["params"] = {
                row["param_name"]: row["param_value"]
                for row in self.rows("SELECT * FROM trial_params WHERE trial_id = :of ORDER BY param_name", of=of)
            }
            trial["judged"] = [
                [row["step"], row["intermediate_value"]]
                for row in self.rows(
                    "SELECT * FROM trial_intermediate_values WHERE trial_id = :of ORDER BY step", of=of
                )
            ]
            trial["curves"] = self.curves(of)
        return found

    def curves(self, trial_id: int) -> dict[str, list[float]]:
        """Return a trial's curves by metric, one value an epoch."""
        found: dict[str, list[float]] = {}
        rows = self.rows("SELECT * FROM hpo_curves WHERE trial_id = :of ORDER BY metric, epoch", of=trial_id)
        for row in rows:
            if row["metric"] != "seconds":
                found.setdefault(row["metric"], []).append(row["value"])
        return found

    def seconds(self, study: str) -> dict[int, list[float]]:
        """Return {number: how long each epoch of a trial took}: an epoch that is trained twice takes another time."""
        found: dict[int, list[float]] = {}
        for row in self.rows(
            "SELECT t.number, c.value FROM hpo_curves c JOIN trials t ON t.trial_id = c.trial_id "
            "JOIN studies s ON s.study_id = t.study_id "
            "WHERE s.study_name = :study AND c.metric = 'seconds' ORDER BY t.number, c.epoch",
            study=study,
        ):
            found.setdefault(row["number"], []).append(row["value"])
        return found

    def schema(self) -> str:
        """Return the statements that made our tables and indexes in SQLite."""
        found = self.rows("SELECT sql FROM sqlite_master WHERE name LIKE '%hpo_%' AND sql IS NOT NULL ORDER BY name")
        return "\n".join(f"{row['sql'].strip()};" for row in found) + "\n"


def put_down(folder: Path) -> Home:
    """Copy the SQLite file, the checkpoints and the study files, and let the rows name this folder."""
    put_files_down(folder)
    home = Home(folder)
    shutil.copy(FIXTURES / "sqlite.db", folder)
    _rename(home)
    return home


def put_down_postgres(folder: Path, url: str) -> Home:
    """Fill an empty Postgres database from the dump, and do likewise."""
    put_files_down(folder)
    home = Home(folder, url)
    with home.engine.begin() as connection:
        connection.connection.cursor().execute(told_of(FIXTURES / "postgres.sql", folder))
    return home


def put_study_down(folder: Path, fixtures: Path) -> Home:
    """Copy an SQLite file and what else lies in a folder of fixtures, and let rows and texts name this folder."""
    shutil.copytree(fixtures, folder, dirs_exist_ok=True)
    for file in folder.rglob("*"):
        if file.suffix in (".toml", ".json"):
            file.write_text(told_of(file, folder))
    home = Home(folder)
    _rename(home)
    return home


def _rename(home: Home) -> None:
    """Let the rows of a database name its folder."""
    with home.engine.begin() as connection:
        for table, column in PATHS:
            statement = sa.text(f"UPDATE {table} SET {column} = replace({column}, :old, :new)")
            connection.execute(statement, {"old": ROOT, "new": str(home.folder)})


def put_files_down(folder: Path) -> None:
    shutil.copytree(FIXTURES / "checkpoints", folder / "checkpoints")
    for name in ("digits.toml", "own.toml", "front.toml", "mine.py", "winner.toml"):
        (folder / name).write_text(told_of(FIXTURES / name, folder))


def told_of(file: Path, folder: Path) -> str:
    """Return a file of text as if it had been made in this folder."""
    return file.read_text().replace(ROOT, str(folder))


def machine() -> dict[str, str]:
    """Return what a curve is the same on, bit for bit: the name of a CPU alone may stand for several kinds of it."""
    file = Path("/proc/cpuinfo")
    known = dict.fromkeys(("model name", "cpu family", "model", "stepping"), "")
    for line in file.read_text().splitlines() if file.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() in known:
            known[key.strip()] = value.strip()
    known["capability"] = torch.backends.cpu.get_cpu_capability()
    return known | {name: metadata.version(name) for name in PACKAGES}
