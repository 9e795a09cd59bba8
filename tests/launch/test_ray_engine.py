"""What `hpo launch --on ray` says and prints without a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import LaunchError
from hpo.launch.engines import ray
from hpo.launch.engines.engine import Request
from hpo.launch.engines.ray_cluster import Cluster, Needs, _room
from hpo.spec.launch import Launch


def asked(folder: Path, **more: Any) -> Request:
    section = Launch.checked({"on": "ray", **more.pop("section", {})})
    return Request(
        study="own",
        slots=range(3),
        workers=3,
        section=section,
        code_folder=folder,
        folder=folder,
        grace=30.0,
        storage="postgresql://hpo:***@host/db",
        **{"launch": None, "logs": None, "environment": {"HPO_STORAGE": "postgresql://hpo:secret@host/db"}, **more},
    )


def test_the_printed_driver_has_the_plan_and_no_secret(tmp_path: Path) -> None:
    page = ray.render(asked(tmp_path, section={"gpus_per_worker": 0.25, "ray": {"address": "10.0.0.5:6379"}}))
    assert "secret" not in page
    assert '"first": 0, "last": 2' in page
    assert '"address": "10.0.0.5:6379", "gpus": 0.25' in page
    assert page.count("ray job submit") == 1


def test_a_part_of_several_gpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"launch.gpus_per_worker = 1.5: Ray gives .* use 1 or 2"):
        ray.check(asked(tmp_path, section={"gpus_per_worker": 1.5}))


def test_without_the_module_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LaunchError, match=r"ray: not installed; `pip install 'hpo-torch\[ray\]'`, or add --print"):
        ray.submit(asked(tmp_path, launch=1, logs=tmp_path))


def test_an_address_at_which_nobody_listens_is_refused_at_once() -> None:
    with (
        pytest.raises(LaunchError, match=r"no cluster was reached at address '127.0.0.1:1'"),
        Cluster.joined("127.0.0.1:1"),
    ):
        pass


@pytest.mark.parametrize(("gpus", "cpus", "room"), [(0.25, 1.0, 8), (1.0, 1.0, 2), (0.25, 4.0, 2), (4.0, 1.0, 0)])
def test_room_of_a_node(gpus: float, cpus: float, room: int) -> None:
    assert _room({"GPU": 2.0, "CPU": 8.0}, Needs(cpus=cpus, gpus=gpus, resources={})) == room
