"""A real Slurm of three nodes on this machine, each with two cores and two GPUs that are invented. It needs root.

Nodes share the machine's file system, as nodes of a cluster share one.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
import pytest

from tests.engines.needed import program
from tests.support.postgres import free_port
from tests.support.waiting import PATIENCE, wait_for

NODES = ("n1", "n2", "n3")
CONF = """\
ClusterName=hpo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmdTimeout=10
JobRequeue=1
ReturnToService=2
KillWait=60
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 Gres=gpu:2"


class Slurm:
    """A Slurm in a folder of its own. Its commands are those of Debian's package."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("a Slurm of several nodes on one machine needs root")
        daemons = {name: program(name, "slurm-wlm") for name in ("slurmctld", "slurmd", "sbatch")}
        self._daemons = daemons | {"munged": program("munged", "munge")}
        self._hurry_at: dict[str, float] = {}  # when a job may be hurried again
        self.root = Path(tempfile.mkdtemp(prefix="hpo-slurm-"))
        self.root.chmod(0o755)
        for folder in ("state", "log", "dev", "munge", *(f"spool/{node}" for node in NODES)):
            (self.root / folder).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(NODE.format(name=name, host=host, port=free_port()) for name in NODES)
        self.conf = self.root / "slurm.conf"
        self.conf.write_text(CONF.format(root=self.root, host=host, port=free_port(), nodes=nodes))
        for name in ("gpu0", "gpu1"):
            os.mknod(self.root / "dev" / name, 0o20666, os.makedev(1, 3))
        (self.root / "gres.conf").write_text(f"NodeName=n[1-3] Name=gpu File={self.root}/dev/gpu[0-1]\n")

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        munge = self.root / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {
            "socket": munge / "socket",
            "key-file": key,
            "log-file": self.root / "log/munged.log",
            "pid-file": self.root / "munged.pid",
            "seed-file": munge / "seed",
        }
        self._call(self._daemons["munged"], "--force", *(f"--{name}={file}" for name, file in files.items()))
        self._call(self._daemons["slurmctld"], "-f", str(self.conf), "-i", "-c")
        for node in NODES:
            self.start(node)
        wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%T %D").strip() in ("idle 3", "idle 3\nidle 3"))

    def start(self, node: str) -> None:
        """Start the daemon of a node."""
        self._call(self._daemons["slurmd"], "-f", str(self.conf), "-c", "-N", node)

    def kill(self, node: str) -> None:
        """Kill a node with all that runs on it, as a loss of power does."""
        for process in self._processes(node):
            with suppress(psutil.Error):
                process.kill()

    def ask(self, *command: str) -> str:
        """Run a command of Slurm and return what it prints; "" if Slurm does not answer yet."""
        done = subprocess.run(
            command, env=os.environ | {"SLURM_CONF": str(self.conf)}, capture_output=True, text=True, timeout=PATIENCE
        )
        return done.stdout

    def jobs(self, *states: str) -> list[str]:
        """Return the ids of the array tasks that are in one of these states, by default of all in the queue."""
        wanted = [f"--states={','.join(states)}"] if states else []
        return sorted(self._call("squeue", "--noheader", "--array", "--format=%i", *wanted).split())

    def requeue_now(self) -> None:
        """Let jobs that were queued again begin soon, which else wait for two minutes.

        A job that begins in the second in which it was queued again fails: its credential of that second is revoked.
        """
        for job in self.jobs("PENDING"):
            if time.monotonic() >= self._hurry_at.get(job, 0.0):
                self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2")
                self._hurry_at[job] = time.monotonic() + 5

    def limit(self, *, minutes: int) -> None:
        """Change the time limit of all jobs."""
        for job in self.jobs():
            self.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def preempt_all(self) -> None:
        """Run a job of a higher priority, which takes all nodes for a moment."""
        options = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        self.ask("sbatch", "--wait", *options)

    def cancel_all(self) -> None:
        """End all jobs and wait until they are gone."""
        self.ask("scancel", "--signal=KILL", "--full", *self.jobs())
        self.ask("scancel", *self.jobs())
        wait_for(lambda: not self.jobs())

    def _processes(self, node: str) -> list[psutil.Process]:
        """Return what runs on a node: the daemons that have its log open, and what they began."""
        log = str(self.root / "log" / f"{node}.log")
        daemons = [one for one in psutil.process_iter() if _has_open(one, log)]
        found = [*daemons]
        for one in daemons:
            with suppress(psutil.Error):
                found += one.children(recursive=True)
        return found

    def _call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=os.environ | {"SLURM_CONF": str(self.conf)}, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for node in NODES:
            self.kill(node)
        for name in ("slurmctld", "munged"):
            with suppress(OSError, ValueError):
                os.kill(int((self.root / f"{name}.pid").read_text()), signal.SIGKILL)
        shutil.rmtree(self.root, ignore_errors=True)


def _has_open(process: psutil.Process, file: str) -> bool:
    """Return whether a process of Slurm has a file open."""
    try:
        is_of_slurm = process.name().startswith("slurm")
        return is_of_slurm and any(os.readlink(entry) == file for entry in Path(f"/proc/{process.pid}/fd").iterdir())
    except (OSError, psutil.Error):  # it has ended
        return False
