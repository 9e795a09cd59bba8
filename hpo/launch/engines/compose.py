"""Docker Compose on this machine. Services are made of the parts of docker-compose.yml, which lies beside this file as a link."""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hpo.errors import LaunchError
from hpo.launch.engines import yaml_text
from hpo.launch.engines.containers import Place, escaped, refuse_hidden_folder, short_name, storage_of
from hpo.launch.engines.engine import Engine, Request, call
from hpo.queue.launches import Handle
from hpo.storage.connect import parse_url
from hpo.worker.gpu_share import SHARE

Service = dict[str, Any]

PLACE = Place(name="containers", section="launch.compose")
PACKAGE = "Docker with Compose (https://docs.docker.com/compose/install/)"
PARTS = Path(__file__).with_name("docker-compose.yml")
CODE = "/code"
PASSWORD = "PGPASSWORD"
WORKER = "worker-"  # and the slot
STUDY = "study"
HOST = "host.docker.internal:host-gateway"  # this machine, as containers reach it
PULL_SECONDS = 1800.0  # for which a download of the image is waited for


def check(request: Request) -> None:
    """Raise LaunchError for what containers of this machine cannot do."""
    options = request.section.compose
    if options.postgres and options.storage:
        raise LaunchError(
            f"launch.compose.storage = {options.storage!r}: contradicts postgres = true, which starts a database; remove one"
        )
    if options.postgres and request.making is None:
        raise LaunchError(
            "launch.compose.postgres = true: containers make the study from its file; name the study file"
        )
    if not options.postgres:
        storage_of(request, options.storage, PLACE)
        refuse_hidden_folder(request, _mounted(request), PLACE, "launch.compose.volumes = {{ {folder} = {folder} }}")
    _gpus(request)


def render(request: Request) -> str:
    """Return the Compose file."""
    return yaml_text.dump([_file(request)])


def submit(request: Request) -> list[Handle]:
    """Start the containers."""
    if request.section.compose.postgres:
        raise LaunchError(
            "launch.compose.postgres = true: this machine does not reach that database, so the launch cannot be recorded; "
            "add --print, and start it by `docker compose --file - up --detach`"
        )
    project = short_name(request)
    password = parse_url(request.environment["HPO_STORAGE"]).password
    environment = {**os.environ, **({PASSWORD: str(password)} if password else {})}
    _compose(
        project, "--file", "-", "up", "--detach", given=render(request), environment=environment, seconds=PULL_SECONDS
    )
    return [{"project": project, "first": request.slots.start, "last": request.slots.stop - 1}]


def present(handles: Sequence[Handle]) -> Mapping[int, str] | None:
    """Return the slots whose containers run or are about to."""
    if shutil.which("docker") is None:
        return None
    found: dict[int, str] = {}
    for handle in handles:
        for container in _listed(_compose(handle["project"], "ps", "--all", "--format", "json")):
            slot = int(container["Service"].removeprefix(WORKER))
            if handle["first"] <= slot <= handle["last"] and container["State"] not in ("exited", "dead"):
                found[slot] = "running" if container["State"] == "running" else "pending"
    return found


def cancel(handles: Sequence[Handle]) -> None:
    """Send SIGTERM to all containers. Docker starts none again that was told to stop by its own stop signal."""
    for handle in handles:
        services = [f"{WORKER}{slot}" for slot in range(handle["first"], handle["last"] + 1)]
        _compose(handle["project"], "kill", "--signal", "SIGTERM", *services)


def dismiss(handles: Sequence[Handle], slots: Collection[int]) -> None:
    """Do nothing: containers begin at once, and those of retired slots leave by themselves."""


def log_command(handles: Sequence[Handle], slot: int) -> str | None:
    """Return the command that shows what a slot's container has printed."""
    for handle in handles:
        if handle["first"] <= slot <= handle["last"]:
            return shlex.join(["docker", "compose", "--project-name", handle["project"], "logs", f"{WORKER}{slot}"])
    return None


@cache
def _parts() -> Mapping[str, Any]:
    return yaml.safe_load(PARTS.read_text())  # type: ignore[no-any-return]


def _file(request: Request) -> Mapping[str, Any]:
    """Return the Compose file: the parts' worker, once for each slot, and their database and dashboard if they are wanted."""
    parts = copy.deepcopy(dict(_parts()))
    services: dict[str, Service] = parts["services"]
    worker = services.pop("worker")
    if request.section.compose.postgres:
        for service in services.values():
            _adapt(service, request)
        making = ["run", f"{CODE}/{request.making.name}", "--workers", "0", "--name", request.study]  # type: ignore[union-attr]
        services[STUDY]["command"] = list(map(escaped, making))
    else:
        services.clear()
        del parts["volumes"]
        parts["name"] = short_name(request)
        _use_own_storage(worker, request)
    _adapt(worker, request)
    for slot, gpus in zip(request.slots, _gpus(request), strict=True):
        services[f"{WORKER}{slot}"] = _with_gpus(worker, gpus, _sharers(request)) | {"command": _command(request, slot)}
    return {key: value for key, value in parts.items() if not key.startswith("x-")}


def _command(request: Request, slot: int) -> list[str]:
    words = request.worker(str(slot), hpo=(), code=Path(CODE))  # the image's entry point is hpo
    return list(map(escaped, words))


def _adapt(service: Service, request: Request) -> None:
    """Let a service of ours run the image that is wanted, with the study's code."""
    if service.pop("build", None) is None:  # Postgres
        return
    code = {"type": "bind", "source": escaped(str(request.code_folder)), "target": CODE, "read_only": True}
    service["image"] = request.section.compose.image
    service["volumes"] = [code, *(one for one in service["volumes"] if CODE not in one), *_binds(request)]
    service["environment"] |= {name: f"${{{name}:-}}" for name in request.section.compose.env}


def _use_own_storage(worker: Service, request: Request) -> None:
    """Let a worker use the study's own storage and its checkpoints on this machine, as the user who launches it."""
    del worker["depends_on"]
    storage = storage_of(request, request.section.compose.storage, PLACE)
    worker["environment"] |= {"HPO_STORAGE": escaped(storage), PASSWORD: f"${{{PASSWORD}:-}}", "HOME": "/tmp"}
    worker["environment"].pop("HPO_CHECKPOINTS")
    worker["volumes"] = []
    if request.checkpoints is not None:
        worker["environment"]["HPO_CHECKPOINTS"] = escaped(request.checkpoints)
    if folder := _checkpoint_folder(request):
        worker["volumes"] = [{"type": "bind", "source": escaped(folder), "target": escaped(folder)}]
    worker["user"] = f"{os.getuid()}:{os.getgid()}"
    worker["extra_hosts"] = [HOST]


def _checkpoint_folder(request: Request) -> str | None:
    given = request.checkpoints
    return None if given is None or "://" in given else given


def _mounted(request: Request) -> list[str]:
    folder = _checkpoint_folder(request)
    return [*request.section.compose.volumes.values(), *([folder] if folder else [])]


def _binds(request: Request) -> Iterator[Service]:
    for source, target in request.section.compose.volumes.items():
        yield {"type": "bind", "source": escaped(source), "target": escaped(target)}


def _with_gpus(worker: Service, gpus: Sequence[str], sharers: int) -> Service:
    worker = copy.deepcopy(worker)
    if gpus:
        worker["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] = list(map(escaped, gpus))
        if sharers > 1:
            worker["environment"][SHARE] = repr(1 / sharers)
    else:
        del worker["deploy"]
    return worker


def _gpus(request: Request) -> list[list[str]]:
    """Return the GPUs of each slot. Raises LaunchError if there are too few."""
    wanted, gpus = request.section.gpus_per_worker, request.section.compose.gpus
    slots = request.slots
    if wanted == 0 or (wanted is None and not gpus):
        return [[] for _ in slots]
    if wanted is None:
        return [[gpus[slot % len(gpus)]] for slot in slots]
    if wanted > 1 and not wanted.is_integer():
        raise LaunchError(f"gpus_per_worker = {wanted:g}: use a whole number, or a part of one GPU such as 0.5")
    share = _sharers(request)
    each = max(1, int(wanted))
    needed = math.ceil(slots.stop / share) * each
    if needed > len(gpus):
        raise LaunchError(
            f"gpus_per_worker = {wanted:g}: {slots.stop} workers need {needed} GPUs, and launch.compose.gpus = "
            f"{json.dumps(gpus)} names {len(gpus)}; name more, or launch fewer workers"
        )
    return [gpus[slot // share * each : slot // share * each + each] for slot in slots]


def _sharers(request: Request) -> int:
    """Return how many workers have one GPU at most. Those of a later launch are not known."""
    wanted, gpus = request.section.gpus_per_worker, request.section.compose.gpus
    if wanted is None:
        return math.ceil(request.slots.stop / max(1, len(gpus)))
    return math.floor(1 / wanted) if 0 < wanted < 1 else 1


def _compose(project: str, *arguments: str, **more: Any) -> str:
    return call("docker", "compose", "--project-name", project, *arguments, package=PACKAGE, **more)


def _listed(said: str) -> list[Mapping[str, str]]:
    """Return the containers that `ps` has listed: as one array, or since Compose 2.21 as an object on each line."""
    if said.startswith("["):
        return list(json.loads(said))
    return [json.loads(line) for line in said.splitlines() if line]


ENGINE = Engine(
    spans_hosts=False,
    check=check,
    render=render,
    submit=submit,
    present=present,
    cancel=cancel,
    dismiss=dismiss,
    log_command=log_command,
)
