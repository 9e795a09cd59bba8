"""How many workers a run has on this machine, and which GPUs each of them gets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from hpo.errors import SpecError, shown
from hpo.launch import gpus
from hpo.launch.gpus import Gpu
from hpo.queue.limits import BY_UUID
from hpo.worker.gpu_share import SHARE

MANY = 4  # workers per core or GPU; on 2 cores, 32 workers did less than 8
MOST_SHARERS = 256  # workers on one GPU
OWN_BYTES, DECLARED_BYTES = 25 * 2**20, 150 * 2**20  # least memory of a worker, measured without and with torch


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one worker gets of this machine's GPUs."""

    devices: tuple[str, ...] | None  # what CUDA_VISIBLE_DEVICES holds; None leaves it as it is
    sharers: int = 1  # how many workers have these devices

    @property
    def environment(self) -> dict[str, str]:
        """What a worker's environment says of its GPUs. It must be set before CUDA is opened."""
        if self.devices is None:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices), SHARE: repr(len(self.devices) / self.sharers)}

    @property
    def said(self) -> str:
        """The GPUs in words, "" on the CPU."""
        if not self.devices:
            return ""
        return f" on GPU{'s' if len(self.devices) > 1 else ''} {', '.join(self.devices)}"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The places of a run's workers."""

    places: tuple[Place, ...]
    left_alone: tuple[Gpu, ...] = ()  # GPUs that others use

    @property
    def gpu_count(self) -> int:
        """The number of different GPUs that the workers have."""
        return len({device for place in self.places for device in place.devices or ()})

    @property
    def most_sharers(self) -> int:
        """The largest number of workers that share a GPU; 1 without GPUs."""
        return max((place.sharers for place in self.places), default=1)

    @property
    def counted_gpus(self) -> int:
        """The number of GPUs that `budget.gpu_hours` counts at a time, as `hpo.queue.limits` does.

        Workers with the same GPUs count once if UUIDs name these. A worker on the CPU counts as one.
        """
        named = {place.devices for place in self.places if place.devices and place.devices[0].startswith(BY_UUID)}
        others = [place.devices or ("",) for place in self.places if place.devices not in named]
        return sum(map(len, [*named, *others]))

    def notes(self) -> list[str]:
        """Return a line for each GPU that is left alone."""
        return [
            f"GPU {gpu.number} is left alone, others use it: {gpu.used_by}; --gpus {gpu.number} takes it"
            for gpu in self.left_alone
        ]


def spread(workers: int) -> Placement:
    """Return places for so many workers on all GPUs that this process may use, one after the other."""
    return Placement(places=_places([(name,) for name in gpus.visible()], workers, hides=False))


def place(
    workers: int | None, *, processes: int = 1, wanted: str | None = None, per_gpu: int | None = None
) -> Placement:
    """Return the places of a run's workers.

    Args:
        workers: how many are wanted. By default as many as fill the GPUs; without a GPU one for as many cores as a trial has
            processes.
        processes: of one trial. Each has a GPU of its own.
        wanted: the GPUs, as for `gpus.chosen`.
        per_gpu: how many workers share a GPU; None for one, or as many as are wanted.

    Raises SpecError for a GPU that is not there or for too few of them.
    """
    if workers == 0:
        return Placement(places=())
    found, left_alone = gpus.chosen(wanted)
    groups = [
        tuple(gpu.name for gpu in found[first : first + processes])
        for first in range(0, len(found) - processes + 1, processes)
    ]
    if processes > 1 and any(gpu.is_part for gpu in found):
        raise SpecError(
            f"processes_per_trial = {processes}: CUDA shows a process one MIG device only; name whole GPUs by --gpus, "
            "or leave processes_per_trial out"
        )
    if found and not groups:
        raise SpecError(
            f"processes_per_trial = {processes}: a trial needs {processes} GPUs, and {_are(len(found))}; "
            "--gpus none trains on the CPU"
        )
    if per_gpu is not None and not found:
        raise SpecError(f"--per-gpu {per_gpu}: there is no GPU to share; leave it out, --workers says how many workers")
    most = len(groups) * (per_gpu or 1)
    if per_gpu is not None and workers is not None and workers > most:
        raise SpecError(
            f"--workers {workers}: --per-gpu {per_gpu} on {len(found)} GPUs makes {most} workers; leave one of them out"
        )
    count = workers or most or max(1, len(os.sched_getaffinity(0)) // processes)
    return Placement(places=_places(groups, count, hides=wanted is not None), left_alone=tuple(left_alone))


def _are(count: int) -> str:
    return "one is free" if count == 1 else f"{count} are free"


def _places(groups: Sequence[tuple[str, ...]], workers: int, *, hides: bool) -> tuple[Place, ...]:
    """Return the workers' places on groups of GPUs, in turn.

    Args:
        groups: the GPUs that belong together.
        workers: the number of workers.
        hides: whether GPUs are hidden if there is no group.
    """
    if not groups:
        return (Place(devices=() if hides else None),) * workers
    shares = [len(range(place, workers, len(groups))) for place in range(len(groups))]
    places = [Place(devices=group, sharers=count) for group, count in zip(groups, shares, strict=True)]
    return tuple(places[index % len(groups)] for index in range(workers))


def sharers(given: str | int, key: str) -> int | None:
    """Return how many workers share a GPU, None for `auto`.

    `auto` is one worker per GPU. A declared training fills a GPU by its stack. How much of a GPU's memory a training of the
    user's own needs is not known before it runs.

    Args:
        given: "auto" or a number from 1 on.
        key: its name, for the message.

    Raises SpecError for anything else.
    """
    if given == "auto":
        return None
    number = int(given) if str(given).isdigit() else 0
    if isinstance(given, bool) or not 1 <= number <= MOST_SHARERS:
        raise SpecError(f"{key} = {shown(given)}: is neither auto nor a number from 1 to {MOST_SHARERS}")
    return number


def default_workers() -> int:
    """Return the default number of workers: one per GPU, without a GPU one per core that this process may use."""
    return len(gpus.visible()) or len(os.sched_getaffinity(0))


def check_count(workers: int, *, is_declared: bool, devices: int | None = None) -> str | None:
    """Return a warning if so many workers slow each other down on this machine, else None.

    Args:
        workers: the number of workers to start.
        is_declared: whether the study declares its training, so that each worker loads torch.
        devices: how many GPUs they have; by default all that are there.

    Raises SpecError if the machine's memory cannot hold them.
    """
    cores = len(os.sched_getaffinity(0))
    devices = len(gpus.visible()) if devices is None else devices
    memory, each = psutil.virtual_memory().total, DECLARED_BYTES if is_declared else OWN_BYTES
    machine = f"this machine has {cores} cores, {devices} GPUs and {memory / 2**30:.0f} GiB of memory"
    if workers * each > memory:
        raise SpecError(
            f"workers = {workers}: {machine}, and each worker takes {each // 2**20} MiB or more; "
            f"start at most {memory // each}"
        )
    if workers > (many := MANY * max(cores, devices)):
        return f"workers = {workers}: {machine}; more than {many} workers slow each other down"
    return None
