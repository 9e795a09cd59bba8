"""Kubernetes: an Indexed Job through the user's own kubectl. Slot N is the pod of index N - first.

A Secret of the user's holds the database's password. Manifests refer to it, and nothing here reads it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpo.errors import LaunchError
from hpo.launch.engines import yaml_text
from hpo.launch.engines.containers import Place, escaped, own_code, refuse_hidden_folder, short_name, storage_of
from hpo.launch.engines.engine import Engine, Request, call
from hpo.launch.engines.manifests import CODE, JOB_LABEL, PASSWORD, POSTGRES_URL, Workers, manifests
from hpo.queue.launches import Handle
from hpo.spec.kubernetes import PLAIN_GPU, KubernetesOptions

PLACE = Place(name="pods", section="launch.kubernetes")
PACKAGE = "kubectl (https://kubernetes.io/docs/tasks/tools/)"
INDEX = "JOB_COMPLETION_INDEX"  # the environment variable of a pod of an Indexed Job
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
MOST_CODE = 1_000_000  # bytes; a ConfigMap holds 1 MiB with its keys
#: Names of variables that hold a secret, such as HF_TOKEN, but not the path of one, such as AWS_WEB_IDENTITY_TOKEN_FILE.
OF_A_SECRET = re.compile(
    r"(?i)(.*_)?(PG)?(PASSWORD|PASSWD|SECRET|TOKEN|(API|ACCOUNT|PRIVATE|SECRET_ACCESS)_KEY)(?!.*_(FILE|PATH)$)(_.*)?"
)
JOB_KINDS = ("Job", "ConfigMap")  # what one launch has for itself
SECRET = """\
# Secret {name} has the password of the database under the key {key}. To make it:
#   {command}
"""


def check(request: Request) -> None:
    """Raise LaunchError for what pods cannot do."""
    options = request.section.kubernetes
    gpus_of(request.section.gpus_per_worker, options.gpu_resource)
    if options.postgres and options.storage:
        raise LaunchError(
            f"launch.kubernetes.storage = {options.storage!r}: contradicts postgres = true, which starts a database; remove one"
        )
    if options.postgres and not options.secret:
        raise LaunchError('launch.kubernetes.secret = "": postgres = true needs a Secret with a password; name one')
    if secrets := [name for name in options.env if OF_A_SECRET.fullmatch(name)]:
        raise LaunchError(
            f"launch.kubernetes.env.{secrets[0]}: its name is that of a secret, and the manifest and the database would show it; "
            f"put it into a Secret, and name that in launch.kubernetes.env_from"
        )
    _storage(request)
    _code(request)
    refuse_hidden_folder(request, options.volumes.values(), PLACE, "launch.kubernetes.volumes = {{ CLAIM = {folder} }}")


def render(request: Request) -> str:
    """Return the manifests as YAML. The password is not in them; a comment says how to put it into its Secret."""
    options = request.section.kubernetes
    head = SECRET.format(name=options.secret, key=PASSWORD, command=_making_secret(options)) if options.secret else ""
    return head + yaml_text.dump(manifests(_workers(request), options))


def submit(request: Request) -> list[Handle]:
    """Apply what several launches may share, then create the Job. Raises LaunchError if the Secret is missing."""
    options = request.section.kubernetes
    _refuse_missing_secret(options)
    workers = _workers(request)
    found = manifests(workers, options)
    if shared := [one for one in found if one["kind"] not in JOB_KINDS]:
        call("kubectl", "apply", "--server-side", "--filename=-", package=PACKAGE, given=yaml_text.dump(shared))
    own = [one for one in found if one["kind"] in JOB_KINDS]
    try:
        call("kubectl", "create", "--filename=-", package=PACKAGE, given=yaml_text.dump(own))
    except BaseException:  # of its parts some may be made, which the next launch of this number would meet
        with suppress(LaunchError):
            _delete(workers.name, options.namespace)
        raise
    slots = request.slots
    return [
        {
            "job": workers.name,
            "namespace": options.namespace or "",
            "first": slots.start,
            "last": slots.stop - 1,
            "queue": options.queue or "",
        }
    ]


def present(handles: Sequence[Handle]) -> Mapping[int, str] | None:
    """Return the slots whose pods run, and those whose pods are to come."""
    if shutil.which("kubectl") is None:
        return None
    return {slot: state for handle in handles for slot, state in _present(handle)}


def cancel(handles: Sequence[Handle]) -> None:
    """Delete the Jobs. Their pods get SIGTERM, park and leave."""
    for handle in handles:
        _delete(handle["job"], handle["namespace"])


def _delete(job: str, namespace: str | None) -> None:
    """Delete a Job and its code, as far as they are there."""
    selected = f"--selector={JOB_LABEL}={job}"
    call("kubectl", "delete", "job,configmap", *_namespace(namespace), selected, "--wait=false", package=PACKAGE)


def dismiss(handles: Sequence[Handle], slots: Collection[int]) -> None:
    """Make a Job smaller by the slots at its end. Slots amid a Job leave when they have begun, as do those of a queue."""
    for handle in handles:
        first, last = handle["first"], handle["last"]
        end = last + 1
        while end - 1 in slots and end > first:
            end -= 1
        if end == last + 1 or handle["queue"]:  # Kueue has reserved room for the whole Job
            continue
        if end == first:
            cancel([handle])
            continue
        smaller = json.dumps({"spec": {"completions": end - first, "parallelism": end - first}})
        call(
            "kubectl",
            "patch",
            "job",
            handle["job"],
            *_in(handle),
            "--type=merge",
            f"--patch={smaller}",
            package=PACKAGE,
        )


def log_command(handles: Sequence[Handle], slot: int) -> str | None:
    """Return the command that shows what a slot's pods have printed."""
    for handle in handles:
        if handle["first"] <= slot <= handle["last"]:
            selected = f"{JOB_LABEL}={handle['job']},{INDEX_LABEL}={slot - handle['first']}"
            return shlex.join(["kubectl", "logs", *_in(handle), f"--selector={selected}", "--tail=-1"])
    return None


def gpus_of(wanted: float | None, resource: str) -> int:
    """Return how many units of a GPU resource a worker gets. Raises LaunchError for a part of a whole GPU.

    Args:
        wanted: `gpus_per_worker`; None is one GPU.
        resource: `gpu_resource`. If it is a shared one, a worker that wants a part of a GPU gets one share.
    """
    if wanted is None or wanted.is_integer():
        return 1 if wanted is None else int(wanted)
    if wanted > 1:
        raise LaunchError(
            f"gpus_per_worker = {wanted:g}: Kubernetes counts GPUs in whole numbers; use {int(wanted)} or {int(wanted) + 1}"
        )
    if resource == PLAIN_GPU:
        raise LaunchError(
            f"gpus_per_worker = {wanted:g}: Kubernetes gives whole GPUs of {PLAIN_GPU}; use 1, or name a shared resource "
            'of your cluster: launch.kubernetes.gpu_resource = "nvidia.com/gpu.shared" for time slices, or one of MIG '
            'such as "nvidia.com/mig-1g.10gb"'
        )
    return 1


def _workers(request: Request) -> Workers:
    options = request.section.kubernetes
    folder = Path(options.code_path or CODE)
    making: list[str] = []
    if request.making is not None:  # the study may not be there yet
        making = ["hpo", "run", str(folder / request.making.name), "--workers", "0", "--name", request.study]
    return Workers(
        name=short_name(request),
        study=request.study,
        count=len(request.slots),
        command=tuple(_command(request, folder)),
        storage=escaped(_storage(request)),
        checkpoints=None if request.checkpoints is None else escaped(request.checkpoints),
        grace=request.grace,
        gpus=gpus_of(request.section.gpus_per_worker, options.gpu_resource),
        code=_code(request),
        making=tuple(map(escaped, making)),
    )


def _command(request: Request, folder: Path) -> Iterator[str]:
    """Yield the words of a worker's command. Kubernetes itself puts the pod's index into $(...)."""
    slot = "SLOT"
    words = request.worker(slot, hpo=("hpo",), code=folder)
    if not request.slots.start:
        yield from (f"$({INDEX})" if word == slot else escaped(word) for word in words)
        return
    number = f"$$(({request.slots.start} + {INDEX}))"
    yield from (
        "sh",
        "-c",
        "exec " + " ".join(number if word == slot else escaped(shlex.quote(word)) for word in words),
    )


def _storage(request: Request) -> str:
    options = request.section.kubernetes
    if options.postgres:
        return POSTGRES_URL
    return storage_of(request, options.storage, PLACE)


def _code(request: Request) -> Mapping[str, bytes]:
    """Return the files that pods get. Raises LaunchError if they are none or too large."""
    options = request.section.kubernetes
    if options.code_path is not None:
        return {}
    found = own_code(request, options.code_files, "launch.kubernetes.code_files")
    size = sum(len(path) + len(content) for path, content in found.items())
    if size > MOST_CODE:
        largest = max(found, key=lambda path: len(found[path]))
        raise LaunchError(
            f"launch.kubernetes.code_files = {json.dumps(options.code_files)}: {len(found)} files of {size:,} bytes, and a "
            f"ConfigMap holds {MOST_CODE:,}; the largest is {largest}; name fewer files, or put the code into the image or on "
            'a volume and say where: launch.kubernetes.code_path = "/app"'
        )
    return found


def _refuse_missing_secret(options: KubernetesOptions) -> None:
    if not options.secret:
        return
    try:
        arguments = (
            "get",
            "secret",
            options.secret,
            *_namespace(options.namespace),
            "--ignore-not-found",
            "--output=name",
        )
        found = call("kubectl", *arguments, package=PACKAGE)
    except LaunchError as error:
        if "Forbidden" in str(error):  # who may start Jobs need not be allowed to see Secrets
            return
        raise
    if not found.strip():
        raise LaunchError(
            f"launch.kubernetes.secret = {options.secret!r}: the cluster has no such Secret; put the database's password "
            f'there: `{_making_secret(options)}`, or use secret = "" if it needs none'
        )


def _making_secret(options: KubernetesOptions) -> str:
    """Return the command that makes the Secret. The password passes a pipe, so that no process's arguments hold it."""
    words = ["kubectl", "create", "secret", "generic", options.secret, *_namespace(options.namespace)]
    return f'printf %s "${PASSWORD}" | {shlex.join(words)} --from-file={PASSWORD}=/dev/stdin'


def _present(handle: Handle) -> Iterator[tuple[int, str]]:
    said = call(
        "kubectl", "get", "job", handle["job"], *_in(handle), "--ignore-not-found", "--output=json", package=PACKAGE
    )
    if not said.strip():
        return
    job: Mapping[str, Any] = json.loads(said)
    status = job.get("status", {})
    if any(one["type"] in ("Complete", "Failed") and one["status"] == "True" for one in status.get("conditions", [])):
        return
    selected = f"--selector={JOB_LABEL}={handle['job']}"
    pods = json.loads(call("kubectl", "get", "pods", *_in(handle), selected, "--output=json", package=PACKAGE))["items"]
    running = {
        int(pod["metadata"]["labels"][INDEX_LABEL]) for pod in pods if pod.get("status", {}).get("phase") == "Running"
    }
    ended = {*_indexes(status.get("completedIndexes", "")), *_indexes(status.get("failedIndexes", ""))}
    for index in range(job["spec"]["completions"]):
        if index not in ended:
            yield handle["first"] + index, "running" if index in running else "pending"


def _indexes(text: str) -> Iterator[int]:
    """Yield the indexes of a text such as "0,3-5"."""
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _in(handle: Handle) -> list[str]:
    return _namespace(handle["namespace"])


def _namespace(name: str | None) -> list[str]:
    return [f"--namespace={name}"] if name else []


ENGINE = Engine(
    spans_hosts=True,
    check=check,
    render=render,
    submit=submit,
    present=present,
    cancel=cancel,
    dismiss=dismiss,
    log_command=log_command,
)
