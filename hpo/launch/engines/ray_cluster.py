"""A Ray cluster as its driver sees it: actors, nodes, and what the nodes have. All calls of Ray are here and in `ray_actor`."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hpo.errors import LaunchError

log = logging.getLogger(__name__)
MANY = 10_000.0  # workers on a node, if they need nothing of it
LISTEN_SECONDS = 10.0  # for which a connection to the cluster is waited for
CALLS = 4  # of an actor at a time: `run` blocks one thread
MISSING = "ray: not installed; `pip install 'hpo-torch[ray]'`, or add --print, which needs no engine"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one worker needs of a node."""

    cpus: float
    gpus: float
    resources: Mapping[str, float]

    @property
    def amounts(self) -> dict[str, float]:
        """What is needed, by Ray's names, without zeros."""
        return {
            name: amount for name, amount in {"GPU": self.gpus, "CPU": self.cpus, **self.resources}.items() if amount
        }

    @property
    def text(self) -> str:
        return _amounts(self.amounts) or "nothing"


class Cluster:
    """A connection to a cluster. One to each process, as Ray has it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._sees_draining = True

    @classmethod
    @contextmanager
    def joined(cls, address: str | None) -> Iterator[Cluster]:
        """Connect to a cluster, or start one on this machine that ends with this process.

        Args:
            address: as of `ray.init`: None for $RAY_ADDRESS, else a cluster that runs on this machine, else a new one.

        Raises LaunchError if there is no module `ray`, or the cluster cannot be reached.
        """
        _refuse_if_nobody_listens(address or os.environ.get("RAY_ADDRESS"))
        try:
            import ray
        except ImportError:
            raise LaunchError(MISSING) from None
        try:
            context = ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise LaunchError(*_unreachable(address, error)) from None
        try:
            yield cls(context.address_info.get("gcs_address") or str(address))
        finally:
            ray.shutdown()

    def needs(self, gpus: float | None, cpus: float, resources: Mapping[str, float]) -> Needs:
        """Return what a worker needs; a GPU, if nothing was said and the cluster has any."""
        has_gpus = any(node["Resources"].get("GPU") for node in self._nodes())
        return Needs(cpus=cpus, gpus=(1.0 if has_gpus else 0.0) if gpus is None else gpus, resources=resources)

    def actor(self, kind: type, needs: Needs) -> Any:
        """Ask for an actor. It waits for room on a node. If it dies, Ray does not start it again."""
        import ray

        options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "resources": dict(needs.resources)}
        return ray.remote(kind).options(**options, max_concurrency=CALLS, scheduling_strategy="SPREAD").remote()

    def ready(self, call: Any) -> Any:
        """Return what a call has returned, the error if it has failed, None while it runs."""
        import ray
        from ray.exceptions import RayError

        if not ray.wait([call], timeout=0)[0]:
            return None
        try:
            return ray.get(call)
        except RayError as error:
            return error

    def wait(self, calls: Sequence[Any], seconds: float) -> None:
        """Wait for so many seconds, or until one of these calls has ended."""
        import time

        import ray

        ray.wait([*calls], timeout=seconds) if calls else time.sleep(seconds)

    def kill(self, actor: Any) -> None:
        """End an actor, or take it out of the queue."""
        import ray

        ray.kill(actor)

    def is_lost(self, node: str, error: Exception) -> bool:
        """Return whether a node is gone or about to go, or whether an actor on it cannot be reached, as this error says.

        Ray needs some seconds more to learn that a node is dead than to see that its actors do not answer.
        """
        from ray.exceptions import ActorUnavailableError

        is_alive = node in {each["NodeID"] for each in self._nodes()}
        return not is_alive or node in self.draining() or isinstance(error, ActorUnavailableError)

    @staticmethod
    def why_not_begun(error: Exception) -> str:
        """Return why an actor could not begin on its node, for example without the package `hpo`; "" if it had begun."""
        lines = str(error).splitlines() if getattr(error, "actor_init_failed", False) else []
        return lines[-1].strip() if lines else ""

    def draining(self) -> frozenset[str]:
        """Return the nodes that are about to be taken away. Without Ray's private call for it none: then leases expire."""
        import ray

        if not self._sees_draining:
            return frozenset()
        try:
            return frozenset(ray._private.state.state.get_draining_nodes())
        except Exception as error:  # whatever another version of Ray raises
            log.warning(
                "this Ray does not tell which nodes are draining (%s): trials of a node go on once it is gone", error
            )
            self._sees_draining = False
            return frozenset()

    @property
    def inventory(self) -> str:
        """The nodes and what they have together, in words."""
        nodes = self._nodes()
        total = {name: sum(node["Resources"].get(name, 0.0) for node in nodes) for name in ("GPU", "CPU")}
        return f"{len(nodes)} node{'s' * (len(nodes) != 1)} with {_amounts(total) or 'no resources'}"

    def lack(self, needs: Needs, workers: int) -> str:
        """Return what the cluster lacks to hold so many workers, in words; "" if nothing."""
        room = sum(_room(node["Resources"], needs) for node in self._nodes())
        if room >= workers:
            return ""
        has = f"the cluster has {self.inventory}"
        return f"each needs {needs.text}, and {f'{has}, room for {room}' if room else f'no node has that; {has}'}"

    @staticmethod
    def _nodes() -> list[dict[str, Any]]:
        import ray

        return [node for node in ray.nodes() if node["Alive"]]


def _room(resources: Mapping[str, float], needs: Needs) -> int:
    """Return how many workers a node can hold, with nobody else there."""
    return int(min((resources.get(name, 0.0) / amount for name, amount in needs.amounts.items()), default=MANY) + 1e-9)


def _amounts(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount)


def _refuse_if_nobody_listens(address: str | None) -> None:
    """Raise LaunchError if an address such as 10.0.0.5:6379 takes no connection. Ray itself needs minutes to say so."""
    host, _, port = (address or "").rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return  # none, or one such as "auto"
    try:
        socket.create_connection((host, int(port)), timeout=LISTEN_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise LaunchError(*_unreachable(address, error)) from None


def _unreachable(address: str | None, error: Exception) -> list[str]:
    where = "Ray" if address is None else f"address {address!r}"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return [
        f"launch.ray.address: no cluster was reached at {where}: {said}",
        "run the command on a node of the cluster, or start a cluster here by `ray start --head`; from outside a cluster, "
        "`ray job submit` runs what --print prints",
        "with token authentication, RAY_AUTH_MODE and RAY_AUTH_TOKEN must be those of the cluster",
    ]
