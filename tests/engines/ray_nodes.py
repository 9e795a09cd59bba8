"""A Ray cluster of several nodes on this machine, as a process of its own: `python -m tests.engines.ray_nodes`.

It prints its address, then obeys orders, one a line: `add GPUS`, `bare GPUS`, `kill N`, `drain N`. A bare node has no `hpo`.
It ends with its input. Ray changes signals and warnings of the process that starts a cluster, so pytest is not that process.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

CPUS = 4
GRACE_SECONDS = 120.0  # until the deadline of a draining node
BY_PREEMPTION = 2  # of Ray's DrainNodeReason
#: A dead node is noticed within some seconds, and no process is started before it is needed.
SETTINGS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 5,
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
}
SMALL = {"num_cpus": CPUS, "include_log_monitor": False, "object_store_memory": 80 * 2**20}


def obey(orders: Iterable[str], gpus: float) -> None:
    """Run a cluster whose head has so many GPUs, until there are no more orders."""
    head = {**SMALL, "num_gpus": gpus, "include_dashboard": False, "_system_config": SETTINGS}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = []
    try:
        say(cluster.address)
        for order, number in (line.split() for line in orders):
            if order == "add":
                nodes.append(cluster.add_node(**SMALL, num_gpus=float(number)))
            elif order == "bare":
                cluster.add_node(**SMALL, num_gpus=float(number), resources={"bare": 1.0}, env_vars=without_hpo())
            elif order == "kill":
                kill(cluster, nodes[int(number)])
            elif order == "drain":
                deadline = int((time.time() + GRACE_SECONDS) * 1000)
                found = nodes[int(number)].node_id
                accepted, why = (
                    importlib.import_module("ray._raylet")
                    .GcsClient(address=cluster.address)
                    .drain_node(found, BY_PREEMPTION, "spot", deadline)
                )
                assert accepted, why
            say("done")
    finally:
        ray.shutdown()
        cluster.shutdown()


def without_hpo() -> dict[str, str]:
    """Return the environment of a node whose Python finds no package `hpo`."""
    folder = tempfile.mkdtemp(prefix="hpo-bare-")
    atexit.register(shutil.rmtree, folder)
    Path(folder, "hpo.py").write_text("raise ModuleNotFoundError(\"No module named 'hpo'\")")
    return {"PYTHONPATH": folder}


def kill(cluster: Cluster, node: object) -> None:
    """Kill a node with all that runs on it, as a machine that loses power."""
    daemons = [info[0].process.pid for info in node.all_processes.values()]  # type: ignore[attr-defined]
    found = [psutil.Process(daemon) for daemon in daemons]
    for process in [*found, *(child for each in found for child in each.children(recursive=True))]:
        process.kill()
    cluster.worker_nodes.remove(node)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    obey(sys.stdin, float(sys.argv[1]))
