"""Slurm: job arrays through the user's own sbatch. A worker that parks is queued again, and each kind of GPU has its array.

What was seen on a real Slurm: the last task's SLURM_JOB_ID is the array's own id, so a requeue by it would queue the whole
array. NCCL catches SIGUSR1, so SIGUSR2 is the notice before the time limit. Under SIGTERM-only preemption a script that
does not queue itself again on exit code 143 ends as FAILED.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence

from hpo.errors import LaunchError
from hpo.launch import exit_codes
from hpo.launch.engines.engine import Engine, Request, call, shell
from hpo.queue.launches import Handle

PACKAGE = "Slurm's client (slurm-client)"
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING", "RESV_DEL_HOLD")
SCRIPT = """\
#!/bin/bash
{directives}
# {workers} of {storage}. HPO_STORAGE must be in the environment of sbatch.
: "${{HPO_STORAGE:?set it to the URL of the storage, then call sbatch again}}"
me=$SLURM_JOB_ID
[ -n "$SLURM_ARRAY_JOB_ID" ] && me=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun itself no longer takes it over
{setup}srun --unbuffered {worker}
code=$?
case $code in
    {again}) scontrol requeue "$me" && sleep 60 ;; # parked, or the storage is away: once more
esac
exit $code
"""
SLOT = "SLOT"
TASK = re.compile(r"^\d+_(\d+) (\w+)$", re.MULTILINE)  # of squeue, which names the cluster in other lines
FORGOTTEN = "Invalid job id"  # what Slurm says of a job some minutes after its end


def check(request: Request) -> None:
    """Raise LaunchError for what Slurm cannot do."""
    section, slurm = request.section, request.section.slurm
    gpus = section.gpus_per_worker
    if gpus is not None and gpus != int(gpus):
        raise LaunchError(
            f"launch.gpus_per_worker = {gpus:g}: Slurm gives whole GPUs; use a whole number, or leave it out and share "
            'GPUs as your cluster does, such as sbatch = ["--gres=shard:1"] in [launch.slurm]'
        )
    if slurm.time is not None and slurm.notice <= request.grace:
        raise LaunchError(
            f"launch.slurm.notice = {slurm.notice}: a worker parks within recovery.grace = {request.grace:g} s; "
            f"use more than {request.grace:g}"
        )


def render(request: Request) -> str:
    """Return the script for sbatch. With several kinds of GPU it is a shell script that calls sbatch for each."""
    scripts = [script for _, script in _scripts(request)]
    if len(scripts) == 1:
        return scripts[0]
    return "".join(f"sbatch <<'END_OF_SCRIPT'\n{script}END_OF_SCRIPT\n" for script in scripts)


def submit(request: Request) -> list[Handle]:
    """Submit a job array for each kind of GPU. If one is refused, those before it are cancelled."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"
    }
    environment |= request.environment
    handles: list[Handle] = []
    try:
        for slots, script in _scripts(request):
            said = call("sbatch", "--parsable", package=PACKAGE, given=script, environment=environment)
            job, _, cluster = said.strip().partition(";")
            handles.append({"job": job, "first": slots.start, "last": slots.stop - 1, "cluster": cluster})
    except BaseException:
        cancel(handles)
        raise
    return handles


def present(handles: Sequence[Handle]) -> Mapping[int, str] | None:
    """Return the slots whose jobs are in Slurm's queue."""
    if shutil.which("squeue") is None:
        return None
    found: dict[int, str] = {}
    for handle in handles:
        try:
            said = call(
                "squeue",
                *_on(handle),
                "--noheader",
                "--array",
                "--format=%i %T",
                f"--jobs={handle['job']}",
                package=PACKAGE,
            )
        except LaunchError as error:
            if FORGOTTEN in str(error):
                continue
            raise
        for slot, state in TASK.findall(said):
            found[int(slot)] = "pending" if state in WAITING else "running"
    return found


def cancel(handles: Sequence[Handle]) -> None:
    """Cancel all jobs. Their workers park and leave."""
    for handle in handles:
        _scancel(handle, handle["job"])


def dismiss(handles: Sequence[Handle], slots: Collection[int]) -> None:
    """Cancel the jobs of slots that wait in the queue."""
    for handle in handles:
        tasks = [f"{handle['job']}_{slot}" for slot in sorted(slots) if handle["first"] <= slot <= handle["last"]]
        if tasks:
            _scancel(handle, "--state=PENDING", *tasks)


def _scancel(handle: Handle, *arguments: str) -> None:
    try:
        call("scancel", *_on(handle), *arguments, package=PACKAGE)
    except LaunchError as error:
        if FORGOTTEN not in str(error):
            raise


def _on(handle: Handle) -> list[str]:
    return [f"--clusters={handle['cluster']}"] if handle["cluster"] else []


def _scripts(request: Request) -> Iterator[tuple[range, str]]:
    """Yield the slots and the script of each job array."""
    first, kinds = request.slots.start, request.section.slurm.gpu_types
    # Slots that are added later go to the last kind, unless they are as many as the launch had at first.
    if len(request.slots) != sum(kinds.values()):
        kinds = {kind: len(request.slots) for kind in [*kinds][-1:]}
    for kind, count in kinds.items() or [("", len(request.slots))]:
        slots = range(first, first + count)
        yield slots, _script(request, slots, kind)
        first += count


def _script(request: Request, slots: range, kind: str) -> str:
    setup = "".join(f"{line}\n" for line in request.section.slurm.setup)
    again = "|".join(map(str, exit_codes.RUN_AGAIN))
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {option}" for option in _options(request, slots, kind)),
        workers=f"{len(slots)} worker{'s' * (len(slots) > 1)} of study {request.study!r}",
        storage=request.storage,
        setup=setup,
        worker=shell(request.worker(SLOT), SLOT="$SLURM_ARRAY_TASK_ID"),
        again=again,
    )


def _options(request: Request, slots: range, kind: str) -> Iterator[str]:
    section, slurm = request.section, request.section.slurm
    yield f"--job-name={shlex.quote(f'hpo-{request.study}')}"
    yield f"--array={slots.start}-{slots.stop - 1}"
    yield "--ntasks=1"
    yield f"--cpus-per-task={slurm.cpus_per_worker}"
    gpus = int(section.gpus_per_worker or (1 if kind else 0))
    if gpus:
        yield f"--gres=gpu:{f'{kind}:' * bool(kind)}{gpus}"
    named = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "time": slurm.time,
        "mem": slurm.memory,
    }
    yield from (f"--{key}={shlex.quote(value)}" for key, value in named.items() if value is not None)
    yield "--requeue"
    yield f"--signal=USR2@{slurm.notice}"
    yield "--open-mode=append"
    yield f"--chdir={shlex.quote(str(request.folder))}"
    yield f"--output={shlex.quote(request.log('%a') or 'hpo-%A_%a.log')}"
    yield from slurm.sbatch


ENGINE = Engine(
    spans_hosts=True, check=check, render=render, submit=submit, present=present, cancel=cancel, dismiss=dismiss
)
