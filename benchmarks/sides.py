"""Who is compared: a script on Optuna alone, Ray Tune with Optuna's sampler and ASHA, and `hpo run`.

A side says which processes are started for a run, and reads afterwards what became of the trials. In Optuna's favour, its
tables are made before the clock starts: two processes that find an empty SQLite file would race for them, and one would
fail with 'table already exists'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import optuna
import tomli_w
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState

from benchmarks.runs import Command, Ended, Outcome, seconds_since_1970
from benchmarks.tasks import PRUNERS, ROOT, SAMPLERS, Task
from hpo.storage.connect import parse_url, plain_url

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a comparison is made with, the same for all sides where nothing else is said."""

    pruner: str = "asha"
    sampler: str = "tpe"
    processes: int = 2  # of each side that train at the same time
    gpu: bool = False
    storage: str | None = None  # of the sides with a database; None: a SQLite file in each run's own folder
    loader_workers: int = 0  # of the rivals' DataLoaders
    default_threads: bool = False  # for the rivals: what torch does by itself, a thread on every core in every process
    slots: int | str | None = None  # for our side: trials at once in a worker; None: what hpo does by itself


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one side."""

    task: Task
    options: Options
    seed: int
    folder: Path  # its own, empty at first
    url: str
    study: str

    @property
    def rival_flags(self) -> list[str]:
        """The arguments of a rival's script, as `tasks.add_arguments` takes them."""
        options = self.options
        flags = [*self.task.flags, "--seed", str(self.seed)]
        flags += ["--pruner", options.pruner, "--sampler", options.sampler]
        flags += ["--loader-workers", str(options.loader_workers)]
        return flags + (["--default-threads"] if options.default_threads else [])


class Side(Protocol):
    """One of those who are compared."""

    counts_cpu: bool  # whether the CPU time of all its processes shows in their parent's

    def prepare(self, job: Job) -> None:
        """Do what need not be timed."""

    def commands(self, job: Job) -> list[Command]:
        """Return the commands to start side by side."""

    def environment(self, job: Job) -> dict[str, str]:
        """Return what the environment of its processes has beyond the common one."""

    def outcome(self, job: Job) -> Outcome:
        """Read what became of the trials."""

    def versions(self) -> dict[str, str]:
        """Return the versions of what it runs on beyond our own."""


@dataclass(frozen=True, kw_only=True)
class OptunaSide:
    """Processes of `plain_optuna.py` on one database."""

    counts_cpu = True

    def prepare(self, job: Job) -> None:
        """Make the study, and with it the tables."""
        direction = "maximize" if job.task.maximizes else "minimize"
        optuna.create_study(study_name=job.study, storage=plain_url(parse_url(job.url)), direction=direction)

    def commands(self, job: Job) -> list[Command]:
        """Return what a user of Optuna alone starts by hand."""
        common = [sys.executable, "-m", "benchmarks.plain_optuna", "--storage", plain_url(parse_url(job.url))]
        common += ["--study", job.study, *job.rival_flags]
        return [[*common, "--process", str(process)] for process in range(job.options.processes)]

    def environment(self, job: Job) -> dict[str, str]:
        """Return one thread a process, or nothing."""
        return {} if job.options.default_threads else ONE_THREAD

    def outcome(self, job: Job) -> Outcome:
        """Read the study."""
        return _outcome_in_database(job)

    def versions(self) -> dict[str, str]:
        """Return nothing: it runs on what we run on."""
        return {}


@dataclass(frozen=True, kw_only=True)
class RaySide:
    """`plain_ray.py` under an interpreter that has Ray."""

    python: str
    reuse_actors: bool = False
    counts_cpu = False  # Ray's daemon is the parent of those who train, and never ours

    def prepare(self, job: Job) -> None:
        """Do nothing."""

    def commands(self, job: Job) -> list[Command]:
        """Return the one command that starts Ray and searches."""
        command = [self.python, "-m", "benchmarks.plain_ray", *job.rival_flags, "--output", str(self._output(job))]
        command += ["--processes", str(job.options.processes)] + (["--reuse-actors"] if self.reuse_actors else [])
        return [command]

    def environment(self, job: Job) -> dict[str, str]:
        """Return one thread a process, or nothing."""
        return {} if job.options.default_threads else ONE_THREAD

    def outcome(self, job: Job) -> Outcome:
        """Read what the script wrote: a trial that saw the last epoch is complete."""
        written = json.loads(self._output(job).read_text())
        trials = [
            Ended(
                epochs=one["epochs"],
                value=one["value"] if one["epochs"] == job.task.epochs else None,
                at=one["ended"],
            )
            for one in written["trials"]
        ]
        return Outcome(trials=trials, distributions=frozenset(written["distributions"]))

    def versions(self) -> dict[str, str]:
        """Ask its interpreter for the versions of Ray and of what it shares with us by name."""
        code = "import importlib.metadata as m; print(*[m.version(p) for p in ('ray', 'optuna', 'torch', 'numpy')])"
        found = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True, cwd="/")
        return dict(zip(("ray", "its optuna", "its torch", "its numpy"), found.stdout.split(), strict=True))

    def _output(self, job: Job) -> Path:
        return job.folder / "ray.json"


@dataclass(frozen=True, kw_only=True)
class HpoSide:
    """`hpo run` on the task's study file."""

    executor: str | None = None  # None: what hpo does by itself
    is_auto: bool = False  # it searches with `auto`, whatever sampler and pruner the rivals have
    budgets: int = 1  # so many times the trials of the rivals
    counts_cpu = True

    def prepare(self, job: Job) -> None:
        """Write the study file as this comparison wants it: seed, pruner, sampler, and the last epoch's value."""
        document: dict[str, Any] = {**job.task.document, "seed": job.seed, "value": "last"}
        document["data"] = {**document["data"], "split_seed": job.seed}  # the rivals' split
        document |= {"pruner": PRUNERS[job.options.pruner], "sampler": SAMPLERS[job.options.sampler]}
        document["budget"] = {"trials": self.budgets * job.task.trials}
        if self.is_auto:
            document |= {"pruner": {"name": "auto"}, "sampler": {"name": "auto"}}
        asked = {"executor": self.executor, "slots": job.options.slots}
        document |= {key: value for key, value in asked.items() if value is not None}
        self._file(job).write_text(tomli_w.dumps(document))
        (job.folder / "benchmarks").symlink_to(ROOT / "benchmarks")  # the study's own code; hpo hides its own checkout

    def commands(self, job: Job) -> list[Command]:
        """Return the one command of our side."""
        command = [sys.executable, "-P", "-m", "hpo", "run", str(self._file(job)), "--name", job.study]
        return [[*command, "--storage", job.url, "--workers", str(job.options.processes)]]

    def environment(self, job: Job) -> dict[str, str]:  # noqa: ARG002  (all sides are asked alike)
        """Return one thread a process."""
        return ONE_THREAD

    def outcome(self, job: Job) -> Outcome:
        """Read the study."""
        return _outcome_in_database(job)

    def versions(self) -> dict[str, str]:
        """Return nothing: they are told anyway."""
        return {}

    def _file(self, job: Job) -> Path:
        return job.folder / "study.toml"


#: The file beside the study file. It has the objective of `plain_optuna.py`, and its data, as a user's own file has.
OWN = """
import argparse, os, sys
sys.path.append({root!r})
from benchmarks import plain_optuna, tasks
parser = argparse.ArgumentParser()
tasks.add_arguments(parser)
objective = plain_optuna.prepared(parser.parse_args({flags!r}), os.getpid())
"""


@dataclass(frozen=True, kw_only=True)
class OwnSide(HpoSide):
    """`hpo run` on the objective of `plain_optuna.py`, as it stands: what differs is all but the training."""

    def prepare(self, job: Job) -> None:
        """Write the objective's file and the study file."""
        (job.folder / "own.py").write_text(OWN.format(root=str(ROOT), flags=job.rival_flags))
        document = {"name": "own", "objective": "own.py:objective", "seed": job.seed}
        document["direction"] = "maximize" if job.task.maximizes else "minimize"
        document |= {"pruner": PRUNERS[job.options.pruner], "sampler": SAMPLERS[job.options.sampler]}
        self._file(job).write_text(tomli_w.dumps(document | {"budget": {"trials": job.task.trials}}))


def _outcome_in_database(job: Job) -> Outcome:
    trials = optuna.load_study(study_name=job.study, storage=plain_url(parse_url(job.url))).get_trials(deepcopy=False)
    ended = [
        Ended(
            epochs=len(trial.intermediate_values),
            value=trial.values[0] if trial.state == TrialState.COMPLETE else None,
            began=seconds_since_1970(trial.datetime_start),
            at=seconds_since_1970(trial.datetime_complete),
        )
        for trial in trials
    ]
    distributions = (distribution_to_json(one) for trial in trials for one in trial.distributions.values())
    return Outcome(trials=ended, distributions=frozenset(distributions))


def environment(options: Options) -> dict[str, str]:
    """Return the common environment: nothing of ours that the shell happens to set, no GPU unless it is compared on.

    Bytecode is written, as by every installation: with PYTHONDONTWRITEBYTECODE each process of a checkout compiles it anew.
    """
    unset = ("HPO_", "OMP_", "MKL_", "PYTHONDONTWRITEBYTECODE")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unset)}
    hidden = {} if options.gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return kept | hidden | {"PYTHONPATH": str(ROOT)}  # where the scripts and the studies' own code are found
