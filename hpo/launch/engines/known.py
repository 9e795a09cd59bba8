"""The engines by name."""

from __future__ import annotations

from collections.abc import Mapping

from hpo.errors import LaunchError
from hpo.launch.engines import compose, kubernetes, ray, slurm
from hpo.launch.engines.engine import Engine

ENGINES: Mapping[str, Engine] = {
    "slurm": slurm.ENGINE,
    "ray": ray.ENGINE,
    "kubernetes": kubernetes.ENGINE,
    "compose": compose.ENGINE,
}


def engine(name: str) -> Engine:
    """Return an engine by its name. Raises LaunchError for one that this version does not know."""
    if name not in ENGINES:
        raise LaunchError(f"engine {name!r}: this version of hpo knows {', '.join(ENGINES)}")
    return ENGINES[name]
