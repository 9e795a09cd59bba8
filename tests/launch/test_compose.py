"""Workers of `--on compose`. They are made of docker-compose.yml at the top, which tests/test_compose.py holds."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpo.errors import LaunchError
from hpo.launch.engines import compose
from hpo.launch.engines.compose import ENGINE
from hpo.worker.gpu_share import SHARE
from tests.support.requests import PASSWORD, STORAGE, request

TOP: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "docker-compose.yml").read_text())


def rendered(folder: Path, **more: Any) -> dict[str, Any]:
    asked = request(folder, **more)
    ENGINE.check(asked)
    found: dict[str, Any] = yaml.safe_load(ENGINE.render(asked))
    return found


def gpus_of(service: dict[str, Any]) -> list[str]:
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    return list(device["device_ids"])


def test_each_slot_is_the_worker_of_the_top_file_with_the_studys_own_storage(tmp_path: Path) -> None:
    made = rendered(tmp_path, checkpoints="/ckpt/$x", slots=range(2, 5), compose={"env": ["AWS_REGION"]})
    assert made["name"].startswith("hpo-digits-")
    assert list(made) == ["name", "services"]
    assert list(made["services"]) == ["worker-2", "worker-3", "worker-4"]
    worker, top = made["services"]["worker-3"], TOP["services"]["worker"]
    same = ("init", "shm_size", "stop_signal", "stop_grace_period", "restart")
    assert {key: worker[key] for key in same} == {key: top[key] for key in same}
    assert set(top) - set(worker) == {"build", "depends_on"}
    assert worker["command"][:6] == ["worker", "--supervised", "--launch", "7", "--slot", "3"]
    assert worker["environment"] == {
        "HPO_STORAGE": "postgresql://hpo@db.lab:5433/hpo",
        "PGPASSWORD": "${PGPASSWORD:-}",
        "HPO_CHECKPOINTS": "/ckpt/$$x",
        "PYTHONSAFEPATH": "1",
        "HOME": "/tmp",
        "AWS_REGION": "${AWS_REGION:-}",
        "HPO_WORKER_GPUS": "0.2",  # slots 0 to 4 share the GPU
    }
    code = {"type": "bind", "source": str(tmp_path), "target": "/code", "read_only": True}
    assert worker["volumes"] == [code, {"type": "bind", "source": "/ckpt/$$x", "target": "/ckpt/$$x"}]
    assert worker["user"] == f"{os.getuid()}:{os.getgid()}"
    assert PASSWORD not in str(made)


def test_with_a_database_of_its_own_all_other_services_are_those_of_the_top_file(tmp_path: Path) -> None:
    file = tmp_path / "digits.toml"
    options = {"postgres": True, "image": "registry.lab/hpo:1", "gpus": ["0", "1"]}
    made = rendered(tmp_path, launch=None, making=file, storage="sqlite:////s.db", slots=range(2), compose=options)
    services = made["services"]
    assert list(services) == ["postgres", "study", "dashboard", "worker-0", "worker-1"]
    assert (made["name"], made["volumes"]) == (TOP["name"], TOP["volumes"])
    assert services["postgres"] == TOP["services"]["postgres"]
    assert services["study"]["command"] == ["run", "/code/digits.toml", "--workers", "0", "--name", "digits"]
    for name in ("study", "dashboard", "worker-0"):
        top = TOP["services"][name.partition("-")[0]]
        assert services[name]["image"] == "registry.lab/hpo:1"
        changed = {"build", "image", "volumes", "command", "deploy"}
        assert {k: v for k, v in services[name].items() if k not in changed} == {
            k: v for k, v in top.items() if k not in changed
        }
        assert services[name]["volumes"][1:] == ["checkpoints:/checkpoints"]
    with pytest.raises(LaunchError, match=r"postgres = true: this machine does not reach that database.*--print"):
        ENGINE.submit(request(tmp_path, compose=options))


def test_both_kinds_of_file_follow_the_compose_specification(tmp_path: Path) -> None:
    own = request(tmp_path, launch=None, making=tmp_path / "x.toml", compose={"postgres": True})
    for name, asked in (("a.yml", request(tmp_path, gpus=0)), ("b.yml", own)):
        (tmp_path / name).write_text(ENGINE.render(asked))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "a.yml", "b.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("gpus", "listed", "found", "share"),
    [
        (None, ["0"], [["0"]] * 4, "0.25"),
        (None, ["0", "1", "2"], [["0"], ["1"], ["2"], ["0"]], "0.5"),
        (None, list("abcd"), [["a"], ["b"], ["c"], ["d"]], None),
        (0.5, ["a", "b"], [["a"], ["a"], ["b"], ["b"]], "0.5"),
        (2, list("abcdefgh"), [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]], None),
    ],
)
def test_gpus_are_given_to_workers(
    tmp_path: Path, gpus: float | None, listed: list[str], found: list[list[str]], share: str | None
) -> None:
    services = rendered(tmp_path, gpus=gpus, compose={"gpus": listed})["services"].values()
    assert [gpus_of(one) for one in services] == found
    assert {one["environment"].get(SHARE) for one in services} == {share}


def test_without_gpus_none_is_reserved(tmp_path: Path) -> None:
    assert all("deploy" not in one for one in rendered(tmp_path, gpus=0)["services"].values())


WRONG = {
    "few GPUs": (
        {"gpus": 0.5, "compose": {"gpus": ["0"]}},
        'gpus_per_worker = 0.5: 4 workers need 2 GPUs, and launch.compose.gpus = ["0"] names 1; name more',
    ),
    "SQLite": ({"storage": "sqlite:////s.db"}, "storage sqlite:////s.db: containers cannot use a SQLite file"),
    "this machine": (
        {"storage": "postgresql://hpo@127.0.0.1/hpo"},
        "storage postgresql://hpo@127.0.0.1/hpo: is this machine's own address, which containers do not reach",
    ),
    "no study file": (
        {"compose": {"postgres": True}},
        "launch.compose.postgres = true: containers make the study from its file; name the study file",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_containers_cannot_do_is_refused_with_the_mend(tmp_path: Path, case: str) -> None:
    more, said = WRONG[case]
    with pytest.raises(LaunchError) as error:
        ENGINE.check(request(tmp_path, **more))
    assert str(error.value).startswith(said)


def test_docker_gets_the_password_by_its_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in the place of docker writes down what it is asked for, since there is no Docker where tests run."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    listed = '{"Service": "worker-0", "State": "running"}\n{"Service": "worker-1", "State": "exited"}'
    (folder / "docker").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >> {folder}/asked\ncase "$*" in *" up "*) cat > {folder}/given; '
        f'printf "%s" "$PGPASSWORD" > {folder}/password;; *" ps "*) echo {shlex.quote(listed)};; esac\n'
    )
    (folder / "docker").chmod(0o755)
    asked = request(tmp_path, slots=range(2), storage=STORAGE)
    handles = ENGINE.submit(asked)
    assert (folder / "password").read_text() == PASSWORD
    assert (folder / "given").read_text() == ENGINE.render(asked)
    assert ENGINE.present(handles) == {0: "running"}
    ENGINE.dismiss(handles, [1])
    ENGINE.cancel(handles)
    project = handles[0]["project"]
    assert (folder / "asked").read_text().splitlines() == [
        f"compose --project-name {project} --file - up --detach",
        f"compose --project-name {project} ps --all --format json",
        f"compose --project-name {project} kill --signal SIGTERM worker-0 worker-1",
    ]
    assert ENGINE.log_command(handles, 1) == f"docker compose --project-name {project} logs worker-1"


def test_an_older_compose_lists_containers_as_one_array() -> None:
    assert compose._listed('[{"Service": "worker-0", "State": "created"}]\n') == [
        {"Service": "worker-0", "State": "created"}
    ]
