"""What a worker and the ranks of a trial say to each other, and the files in which a rank saves its loop."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SAVED = re.compile(r"epoch-(\d+)-rank-(\d+)-of-(\d+)\.pt")
#: Calls that all ranks make in the same order. The worker decides at rank 0's call, and the others get the same answer.
Step = Literal["report", "prune", "epoch"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The worker's first word: what a rank calls, and for which trial."""

    key: str  # "train" or "objective"
    reference: str  # of the function
    folder: Path  # that the reference is relative to
    config: Mapping[str, Any] | None  # for `train`
    number: int
    user_attrs: Mapping[str, Any]
    seed: int  # of the global random numbers
    save_to: Path  # the folder of the trial's checkpoints
    resumes_at: int  # epochs that are finished in the files that the ranks load; 0 without files


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A rank's question. It waits for the answer."""

    step: Step | None = None  # None for "suggest" and "attribute", which are answered at once
    call: str = ""  # "suggest", "attribute" or "loop"
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The worker's answer. The rank raises the error, or ends if the attempt does."""

    value: Any = None
    error: Exception | None = None
    ends: str | None = None  # why the attempt ends


@dataclass(frozen=True, kw_only=True)
class Result:
    """A rank's last word: what its function returned, or that it raised TrialPruned."""

    value: Any = None
    is_pruned: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class EndOfEpoch:
    """What every rank does at the end of an epoch of `hpo.epochs`."""

    saves: bool
    parks: bool


@dataclass
class Turns:
    """The calls of one rank: how many of each kind it has made."""

    made: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def file_of(folder: Path, epoch: int, rank: int, count: int) -> Path:
    """Return the file in which a rank saves its loop after so many epochs."""
    return folder / f"epoch-{epoch}-rank-{rank}-of-{count}.pt"


def take_up(folder: Path, count: int) -> int:
    """Return the last epoch that all of so many ranks have saved, 0 if there is none. Delete files of later epochs.

    Such a file is of a rank that saved before another one died. It must not count as one of the next attempt.
    """
    ranks_of: dict[int, set[int]] = defaultdict(set)
    files = [*folder.iterdir()] if folder.is_dir() else []
    saved = [(file, match) for file in files if (match := SAVED.fullmatch(file.name)) and int(match[3]) == count]
    for _, match in saved:
        ranks_of[int(match[1])].add(int(match[2]))
    last = max((epoch for epoch, ranks in ranks_of.items() if ranks == set(range(count))), default=0)
    for file, match in saved:
        if int(match[1]) > last:
            file.unlink(missing_ok=True)
    return last
