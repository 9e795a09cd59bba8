"""What is applied to a Kubernetes cluster: an Indexed Job of workers; a Postgres and a dashboard for those who have none.

A manifest is a Python dict. Which keys of Kubernetes are used, and why, is known here alone.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpo.launch import exit_codes
from hpo.spec.kubernetes import KubernetesOptions

Manifest = dict[str, Any]

APP_LABEL = "app.kubernetes.io/name"
JOB_LABEL = "hpo/job"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
CODE = "/code"
IMAGE_USER = 1000  # of our Dockerfile
MORE_GRACE = 15  # seconds that a pod gets beyond `recovery.grace`, for its last lines and the volumes
PASSWORD = "PGPASSWORD"  # the key in the Secret, and libpq's variable
POSTGRES = "hpo-postgres"
POSTGRES_URL = f"postgresql://hpo@{POSTGRES}/hpo"
POSTGRES_IMAGE = "postgres:18"
POSTGRES_USER = 999  # of that image
POSTGRES_FOLDER = "/var/lib/postgresql"  # since 18 the image keeps its data in a folder per version below this one
POSTGRES_CONNECTIONS = 1000  # the same for every launch: another number would restart the server
DASHBOARD = "hpo-dashboard"
DASHBOARD_PORT = 8080


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of one Job."""

    name: str  # of the Job
    study: str
    count: int
    command: tuple[str, ...]
    storage: str  # URL as pods reach it, without a password
    checkpoints: str | None  # folder or URL; None if the study knows it
    grace: float  # seconds
    gpus: int  # of each worker, in units of `gpu_resource`
    code: Mapping[str, bytes]  # path below CODE -> content; empty if pods need none of it
    making: tuple[str, ...] = ()  # the command that makes the study; empty if it is made already


def manifests(workers: Workers, options: KubernetesOptions) -> list[Manifest]:
    """Return all that is applied. What others need comes first."""
    code = [_code(workers, options)] if workers.code else []
    database = [_service(POSTGRES, 5432, options), _database(options)] if options.postgres else []
    dashboard = (
        [_service(DASHBOARD, DASHBOARD_PORT, options), _dashboard(workers, options)] if options.dashboard else []
    )
    return [*code, *database, _job(workers, options), *dashboard]


# --- workers ----------------------------------------------------------------------------------------------------------


def _job(workers: Workers, options: KubernetesOptions) -> Manifest:
    labels = {**_labels("hpo-worker"), JOB_LABEL: workers.name}
    queue = {QUEUE_LABEL: options.queue} if options.queue else {}
    metadata = _metadata(workers.name, options, labels | queue) | {"annotations": {"hpo/study": workers.study}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": workers.count,
            "parallelism": workers.count,
            "backoffLimitPerIndex": options.retries,
            "podReplacementPolicy": "Failed",  # a pod that still parks its trials is not replaced yet
            "podFailurePolicy": {"rules": list(_failure_rules())},
            "template": {"metadata": {"labels": labels}, "spec": _worker_pod(workers, options)},
        },
    }


def _failure_rules() -> Iterator[Manifest]:
    """Yield the rules for a pod that failed. The first one that fits decides. Without any the failure is counted."""
    yield {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    yield {"action": "Ignore", "onExitCodes": {"operator": "In", "values": list(exit_codes.RUN_AGAIN)}}
    yield {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [exit_codes.USAGE_ERROR]}}


def _worker_pod(workers: Workers, options: KubernetesOptions) -> Manifest:
    container = _container("worker", workers.command, workers, options)
    container["resources"] = _resources(workers, options)
    container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}, *container["volumeMounts"]]
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(workers.grace) + MORE_GRACE,
        "initContainers": _preparing(workers, options),
        "containers": [container],
        "volumes": [shm, *_volumes(workers, options)],
        "nodeSelector": options.node_selector,
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in options.tolerations],
        "priorityClassName": options.priority_class,
    }
    return _without_empty(pod | _of_every_pod(options))


def _container(name: str, command: tuple[str, ...], workers: Workers, options: KubernetesOptions) -> Manifest:
    """Return a container of our image. Its command replaces the image's entry point, which may be another one."""
    return _without_empty(
        {
            "name": name,
            "image": options.image,
            "command": list(command),
            "env": _environment(workers, options),
            "envFrom": [{"secretRef": {"name": secret}} for secret in options.env_from],
            "securityContext": {"allowPrivilegeEscalation": False},
        }
    ) | {"volumeMounts": _mounts(workers, options)}


def _of_every_pod(options: KubernetesOptions) -> Manifest:
    return {
        "imagePullSecrets": [{"name": name} for name in options.pull_secrets],
        "serviceAccountName": options.service_account,
        "automountServiceAccountToken": options.service_account is not None,
        "securityContext": {"fsGroup": IMAGE_USER, "seccompProfile": {"type": "RuntimeDefault"}},
    }


def _preparing(workers: Workers, options: KubernetesOptions) -> list[Manifest]:
    """Return what runs before the worker: a wait for a database of ours, and what makes the study in it."""
    making = [_container("study", workers.making, workers, options)] if workers.making else []
    return [*_waiting(options), *making]


def _waiting(options: KubernetesOptions) -> list[Manifest]:
    if not options.postgres:
        return []
    wait = f"until pg_isready --host={POSTGRES} --username=hpo --dbname=hpo; do sleep 2; done"
    return [{"name": "postgres", "image": POSTGRES_IMAGE, "command": ["sh", "-c", wait]}]


def _environment(workers: Workers, options: KubernetesOptions) -> list[Manifest]:
    given = {**options.env, "HPO_STORAGE": workers.storage}
    if workers.checkpoints is not None:
        given["HPO_CHECKPOINTS"] = workers.checkpoints
    return [*({"name": name, "value": value} for name, value in given.items()), *_password(PASSWORD, options)]


def _password(variable: str, options: KubernetesOptions) -> list[Manifest]:
    if not options.secret:
        return []
    return [{"name": variable, "valueFrom": {"secretKeyRef": {"name": options.secret, "key": PASSWORD}}}]


def _resources(workers: Workers, options: KubernetesOptions) -> Manifest:
    requests = {"cpu": options.cpu, "memory": options.memory}
    limits = {"memory": options.memory, options.gpu_resource: workers.gpus or None}
    return _without_empty({"requests": _without_empty(requests), "limits": _without_empty(limits)})


def _mounts(workers: Workers, options: KubernetesOptions) -> list[Manifest]:
    code = [{"name": "code", "mountPath": CODE, "readOnly": True}] if workers.code else []
    return [*code, *({"name": _volume(claim), "mountPath": path} for claim, path in options.volumes.items())]


def _volumes(workers: Workers, options: KubernetesOptions) -> list[Manifest]:
    items = [{"key": key, "path": path} for path, key in _keys(workers.code).items()]
    code = [{"name": "code", "configMap": {"name": workers.name, "items": items}}] if workers.code else []
    return [*code, *({"name": _volume(one), "persistentVolumeClaim": {"claimName": one}} for one in options.volumes)]


def _volume(claim: str) -> str:
    """Return the name of a claim's volume in a pod, which has no dots and at most 63 characters."""
    return f"claim-{claim.replace('.', '-')}"[:63].rstrip("-")


def _code(workers: Workers, options: KubernetesOptions) -> Manifest:
    texts: dict[str, str] = {}
    others: dict[str, str] = {}
    for path, key in _keys(workers.code).items():
        try:
            texts[key] = workers.code[path].decode()
        except UnicodeDecodeError:
            others[key] = base64.b64encode(workers.code[path]).decode()
    metadata = _metadata(workers.name, options, {**_labels("hpo-code"), JOB_LABEL: workers.name})
    found = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True}
    return found | _without_empty({"data": texts, "binaryData": others})


def _keys(code: Mapping[str, bytes]) -> dict[str, str]:
    """Return the key in the ConfigMap of each path. A key has letters, digits, dots, dashes and underscores."""
    keys: dict[str, str] = {}
    for path in sorted(code):
        key = re.sub(r"[^\w.-]", "_", path, flags=re.ASCII)
        keys[path] = key if key not in keys.values() else f"{len(keys)}_{key}"
    return keys


# --- for those who have none ------------------------------------------------------------------------------------------


def _database(options: KubernetesOptions) -> Manifest:
    ready = ["pg_isready", "--host=127.0.0.1", "--username=hpo", "--dbname=hpo"]
    container = {
        "name": "postgres",
        "image": POSTGRES_IMAGE,
        "args": ["-c", f"max_connections={POSTGRES_CONNECTIONS}"],
        "env": [
            {"name": "POSTGRES_USER", "value": "hpo"},
            {"name": "POSTGRES_DB", "value": "hpo"},
            *_password("POSTGRES_PASSWORD", options),
        ],
        "ports": [{"containerPort": 5432}],
        "readinessProbe": {"exec": {"command": ready}, "periodSeconds": 5},
        "volumeMounts": [{"name": "data", "mountPath": POSTGRES_FOLDER}],
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    user = {"runAsUser": POSTGRES_USER, "runAsGroup": POSTGRES_USER, "fsGroup": POSTGRES_USER, "runAsNonRoot": True}
    pod = {
        "automountServiceAccountToken": False,
        "containers": [container],
        "securityContext": user | {"seccompProfile": {"type": "RuntimeDefault"}},
    }
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": options.postgres_size}}},
    }
    spec = {"serviceName": POSTGRES, **_one_of(POSTGRES, pod), "volumeClaimTemplates": [claim]}
    metadata = _metadata(POSTGRES, options, _labels(POSTGRES))
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": spec}


def _dashboard(workers: Workers, options: KubernetesOptions) -> Manifest:
    """Return the dashboard, which only reads. Until the study is made it ends, and Kubernetes starts it again."""
    container = {
        "name": "dashboard",
        "image": options.image,
        "command": ["hpo", "dashboard", "--host", "0.0.0.0", "--port", str(DASHBOARD_PORT)],
        "env": _environment(workers, options),
        "ports": [{"containerPort": DASHBOARD_PORT}],
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    pod = _without_empty({"initContainers": _waiting(options), "containers": [container]} | _of_every_pod(options))
    metadata = _metadata(DASHBOARD, options, _labels(DASHBOARD))
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": _one_of(DASHBOARD, pod)}


def _one_of(name: str, pod: Manifest) -> Manifest:
    labels = _labels(name)
    template = {"metadata": {"labels": labels}, "spec": pod}
    return {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}


def _service(name: str, port: int, options: KubernetesOptions) -> Manifest:
    spec = {"selector": _labels(name), "ports": [{"port": port, "targetPort": port}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(name, options, _labels(name)), "spec": spec}


def _metadata(name: str, options: KubernetesOptions, labels: Mapping[str, str]) -> Manifest:
    namespace = {"namespace": options.namespace} if options.namespace else {}
    return {"name": name, **namespace, "labels": dict(labels)}


def _labels(name: str) -> dict[str, str]:
    return {APP_LABEL: name}


def _without_empty(found: Manifest) -> Manifest:
    return {key: value for key, value in found.items() if value is not None and value not in ({}, [])}
