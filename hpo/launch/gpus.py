"""List the GPUs without opening CUDA. The parent of GPU workers must never hold a CUDA context."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from hpo.errors import SpecError, shown
from hpo.queue.limits import BY_UUID
from hpo.worker.gpu_share import given_devices

USED_BYTES = 2 * 2**30  # of a GPU's memory; what a display takes is below this
LISTED = re.compile(r"GPU (?P<number>\d+): (?P<model>.+) \(UUID: (?P<uuid>GPU-\S+)\)")
MIG = re.compile(r"\s+MIG (?P<profile>\S+)\s+Device\s+(?P<number>\d+): \(UUID: (?P<uuid>MIG-\S+)\)")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, or a part of one that MIG has made a device."""

    name: str  # what CUDA_VISIBLE_DEVICES holds for it: a UUID, or what the user gave
    number: str  # as nvidia-smi counts, such as "1"; "1:0" is the first MIG device of GPU 1
    used_by: str = ""  # what others do on it, in words; "" if nothing is known

    @property
    def is_part(self) -> bool:
        """Whether MIG has made this device of a part of a GPU. A process can use one of these only."""
        return self.name.startswith("MIG-")

    def is_meant(self, word: str) -> bool:
        """Return whether a word of `--gpus` names this GPU: its number, its whole GPU's number, or how its UUID begins."""
        is_uuid = word.startswith(BY_UUID) and self.name.startswith(word)
        return is_uuid or word in (self.number, self.number.partition(":")[0])


def visible() -> list[str]:
    """Return a value for CUDA_VISIBLE_DEVICES for each GPU that this process may use; [] without a GPU."""
    given = given_devices()
    return _installed_names() if given is None else given


def listed() -> list[Gpu]:
    """Return the GPUs that this process may use. Who else uses them is not looked at if the user has chosen them."""
    given = given_devices()
    if given is not None:  # counted as CUDA counts them
        return [Gpu(name=name, number=str(place)) for place, name in enumerate(given)]
    used = _users()
    return [
        Gpu(name=name, number=number, used_by=used.get(name, "")) for name, number in zip(*_installed(), strict=True)
    ]


def chosen(wanted: str | None) -> tuple[list[Gpu], list[Gpu]]:
    """Return the GPUs to use, and those that are left to others.

    Args:
        wanted: "all", "none", or numbers and UUIDs with commas between them. None: all that nobody else uses.

    Raises SpecError for a GPU that is not there, and if others use all of them.
    """
    if wanted is not None and wanted.strip().lower() == "none":
        return [], []
    found = listed()
    if wanted is None:
        free = [gpu for gpu in found if not gpu.used_by]
        if found and not free:
            raise SpecError(
                f"others use {'the GPU' if len(found) == 1 else f'all {len(found)} GPUs'} of this machine; "
                "--gpus all takes them too, --gpus none trains on the CPU",
                *(f"  GPU {gpu.number}: {gpu.used_by}" for gpu in found),
            )
        return free, [gpu for gpu in found if gpu.used_by]
    if wanted.strip().lower() == "all":
        if not found:
            raise SpecError(f"--gpus all: {_why_none()}; --gpus none trains on the CPU")
        return found, []
    return _named(wanted, found), []


def _named(wanted: str, found: Sequence[Gpu]) -> list[Gpu]:
    taken: dict[str, Gpu] = {}
    words = [word.strip() for word in wanted.split(",")]
    for word in words:
        meant = [gpu for gpu in found if word and gpu.is_meant(word)]
        if not meant:
            here = ", ".join(gpu.number for gpu in found)
            raise SpecError(
                f"--gpus {shown(wanted)}: there is no GPU {shown(word)}; "
                + (f"there are {here}" if found else _why_none())
                + '; write numbers or UUIDs such as 0,1, or "all" or "none"'
            )
        if len(meant) > 1 and word.startswith(BY_UUID):
            raise SpecError(
                f"--gpus {shown(wanted)}: {len(meant)} UUIDs begin with {shown(word)}, such as {meant[0].name} and "
                f"{meant[1].name}; write more of the one that is meant"
            )
        taken |= {gpu.name: gpu for gpu in meant}
    return [*taken.values()]


def _why_none() -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "nvidia-smi lists none here" if given is None else f"CUDA_VISIBLE_DEVICES is {given!r}, which shows none"


def _installed_names() -> list[str]:
    return _installed()[0]


def _installed() -> tuple[list[str], list[str]]:
    """Return the UUIDs of this machine's GPUs and their numbers. A GPU that MIG has divided stands as its devices."""
    found: dict[str, str] = {}
    whole = ""
    for line in _asked("-L"):
        if match := LISTED.match(line):
            whole = match["uuid"]
            found[whole] = number = match["number"]
        elif (match := MIG.match(line)) and whole:
            found.pop(whole, None)
            found[match["uuid"]] = f"{number}:{match['number']}"
    return [*found], [*found.values()]


def _users() -> dict[str, str]:
    """Return {UUID of a GPU: what others do on it}. It names no MIG device, of which nvidia-smi's tables do not tell it."""
    own = _own_processes()
    said: dict[str, list[str]] = {}
    mine: dict[str, int] = {}
    for line in _asked("--query-compute-apps=gpu_uuid,pid,used_memory,process_name", "--format=csv,noheader,nounits"):
        uuid, pid, memory, program = [*(part.strip() for part in line.split(",", 3)), "", "", ""][:4]
        size = int(memory) * 2**20 if memory.isdigit() else 0
        if pid.isdigit() and int(pid) in own:
            mine[uuid] = mine.get(uuid, 0) + size
        else:
            held = f" holds {size / 2**30:.1f} GiB" if size else " is at work"
            said.setdefault(uuid, []).append(f"process {pid} ({os.path.basename(program.split(' ')[0])}){held}")
    for line in _asked("--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits"):
        uuid, _, memory = line.partition(",")
        size = int(memory) * 2**20 if memory.strip().isdigit() else 0
        if uuid not in said and size - mine.get(uuid, 0) > USED_BYTES:  # a container sees no processes of others
            said[uuid] = [f"{size / 2**30:.1f} GiB of its memory are in use"]
    return {uuid: ", ".join(words) for uuid, words in said.items()}


def _own_processes() -> set[int]:
    """Return the ids of this process, of those that it was started by, and of those that it has started."""
    me = psutil.Process()
    return {process.pid for process in (me, *me.parents(), *me.children(recursive=True))}


def memory() -> tuple[int, int] | None:
    """Return the bytes used and present in all GPUs that this process may use; None if that is not known."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = ("--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits")
    lines = _asked(*query, *([f"--id={which}"] if which else []), seconds=2.0)  # the launcher waits
    try:
        found = [[int(number) * 2**20 for number in line.split(",")] for line in lines if line]
        return (sum(used for used, _ in found), sum(total for _, total in found)) if found else None
    except ValueError:
        return None


def _asked(*options: str, seconds: float = 20.0) -> list[str]:
    """Return the lines that nvidia-smi prints; [] without it or if it needs longer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        said = subprocess.run([program, *options], capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.rstrip() for line in said.stdout.splitlines() if line.strip()] if said.returncode == 0 else []
