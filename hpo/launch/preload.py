"""Loaded first by the server that workers are forked from: signals wait there for the workers to take them.

A terminal, or Slurm's notice, signals every process of a group. The server must outlive that, or nobody would learn how
its workers ended; and a signal to a worker that is just being made waits until `StopSignal` is there to hear it.
"""

import signal

from hpo.worker.signals import ASKING

signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
