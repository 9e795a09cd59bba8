"""What every engine is asked for, and what it must be able to do."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.errors import LaunchError
from hpo.launch.logs import launched_name
from hpo.queue.launches import Handle
from hpo.spec.launch import Launch as LaunchSection

HPO = (sys.executable, "-P", "-m", "hpo")  # this very hpo, on machines that share its environment
ASK_SECONDS = 60.0  # for which a program of an engine is waited for


@dataclass(frozen=True, kw_only=True)
class Request:
    """Workers that an engine is asked for. Nothing here is secret but `environment`, which must never be printed."""

    study: str
    launch: int | None  # the launch's number; None if it is only printed
    slots: range  # a worker for each
    workers: int  # of the whole launch, with earlier slots
    section: LaunchSection
    code_folder: Path
    folder: Path  # in which the workers begin
    logs: Path | None  # the study's folder of logs; None if other hosts do not see it, or without a study
    grace: float  # seconds
    environment: Mapping[str, str]  # variables with which a worker opens the storage; they hold the password
    storage: str  # the storage as it may be shown
    allow_code_change: bool = False
    needs_code: bool = False  # whether the study has code of the user's own
    checkpoints: str | None = None  # folder or URL of the checkpoints; None if nobody has said it yet
    uid: str = ""  # the study's, which no other study of its name has; "" if it need not be there yet
    making: Path | None = None  # the study file, if the workers' side is to make the study, since this one has not

    def worker(self, slot: str, *, hpo: Sequence[str] = HPO, code: Path | None = None) -> list[str]:
        """Return the command of a supervised worker.

        Args:
            slot: the number of its slot, or the engine's expression for it.
            hpo: the words that call hpo.
            code: the folder of the user's code there, if it is another one than here.
        """
        launch = [] if self.launch is None else ["--launch", str(self.launch), "--slot", slot]
        change = ["--allow-code-change"] if self.allow_code_change else []
        of_study = ["--code", str(code or self.code_folder), "--fleet", str(self.workers), "--grace", f"{self.grace:g}"]
        return [*hpo, "worker", "--supervised", *launch, *of_study, *change, "--", self.study]

    def log(self, slot: str) -> str | None:
        """Return the path of a worker's log, None if it has no common folder or the launch is only printed."""
        if self.logs is None or self.launch is None:
            return None
        return str(self.logs / launched_name(self.launch, slot))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What an engine can do. A job belongs to a slot. A handle is what `submit` has returned for some slots."""

    #: Whether its workers run on other machines than this one, so that they need a storage with a server.
    spans_hosts: bool
    #: Raises LaunchError if the engine cannot do what is asked. It needs nothing installed.
    check: Callable[[Request], None]
    #: Returns the script or manifest. It needs nothing installed, and shows no secret.
    render: Callable[[Request], str]
    #: Starts the workers and returns their handles. Raises LaunchError if the engine is missing or refuses.
    submit: Callable[[Request], list[Handle]]
    #: Returns the states of the slots that the engine still has: "pending" or "running". None if it cannot be asked here.
    present: Callable[[Sequence[Handle]], Mapping[int, str] | None]
    #: Ends all jobs. Their workers have a grace in which they park.
    cancel: Callable[[Sequence[Handle]], None]
    #: Takes slots that have not begun out of the engine's queue. Those that run leave by themselves.
    dismiss: Callable[[Sequence[Handle], Collection[int]], None]
    #: Returns the command that shows a slot's log; None if the log lies in the study's folder.
    log_command: Callable[[Sequence[Handle], int], str | None] = lambda _, __: None


def call(
    program: str,
    *arguments: str,
    package: str,
    given: str | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = ASK_SECONDS,
) -> str:
    """Run a program of an engine and return what it prints.

    Args:
        program: its name.
        arguments: its arguments. They must not hold a secret, since other users can read them.
        package: what to install if it is missing, in words.
        given: its standard input.
        environment: its whole environment, if it is not this process's own.
        seconds: for which it is waited for.

    Raises LaunchError if it is missing, fails, or needs too long.
    """
    path = shutil.which(program)
    if path is None:
        raise LaunchError(
            f"{program}: not found on this machine; install {package}, run the command where it is, or add --print, "
            "which needs no engine"
        )
    command = shlex.join([program, *arguments])
    try:
        done = subprocess.run(
            [path, *arguments],
            input=given,
            env=environment and {**environment},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command}: gave no answer within {seconds:.0f} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise LaunchError(f"{command}: failed with exit code {done.returncode}", *(f"  {line}" for line in said[-12:]))
    return done.stdout


def shell(words: Sequence[str], **unquoted: Any) -> str:
    """Return a command for a shell, quoted, but for words that the shell itself must expand.

    Args:
        words: the command.
        unquoted: by placeholder, a variable such as "$SLURM_ARRAY_TASK_ID".
    """
    return " ".join(f'"{unquoted[word]}"' if word in unquoted else shlex.quote(word) for word in words)
