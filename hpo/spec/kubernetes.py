"""The section [launch.kubernetes]: what a study file may say about the pods of its workers."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from annotated_types import Ge

from hpo.spec.matching import Folder, Image, matching

PLAIN_GPU = "nvidia.com/gpu"  # of NVIDIA's device plugin, which counts whole GPUs

NAME = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?"

Name = Annotated[str, matching(NAME, "a name of Kubernetes: lower-case letters, digits and dashes")]
Quantity = Annotated[str, matching(QUANTITY, 'a quantity of Kubernetes, such as "500m" or "16Gi"')]
Resource = Annotated[str, matching(r"[\w.-]+/[\w.-]+", 'a resource of Kubernetes, such as "nvidia.com/gpu"')]


class Toleration(pydantic.BaseModel):
    """One entry of `tolerations`, with the keys of Kubernetes."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: Annotated[int, Ge(0)] | None = None


class KubernetesOptions(pydantic.BaseModel):
    """The section [launch.kubernetes]."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    image: Image = "hpo"
    """Image of the workers, with `hpo` on its path. `docker build -t hpo .` makes one."""
    namespace: Name | None = None
    """Namespace. By default that of kubectl's context."""
    storage: str | None = None
    """URL of the database as pods reach it, without its password. By default the study's."""
    secret: Name | Literal[""] = "hpo-storage"
    """Secret whose key PGPASSWORD is the password of the database; "" if it needs none."""
    env_from: list[Name] = []
    """Secrets whose keys become environment variables, such as AWS_ACCESS_KEY_ID."""
    env: dict[str, str] = {}
    """Further environment variables, none of them secret."""
    volumes: dict[Name, Folder] = {}
    """PersistentVolumeClaims and the paths that they are mounted at, such as checkpoints = "/checkpoints"."""
    code_files: list[str] = ["*.py"]
    """Files of the study's folder that pods get as a ConfigMap at /code: names or patterns, at most 1 MB together."""
    code_path: Folder | None = None
    """Folder of the code in the image or on a volume. No ConfigMap is made then."""
    gpu_resource: Resource = PLAIN_GPU
    """Resource that a worker's GPU is counted in. A shared one, such as "nvidia.com/gpu.shared" or "nvidia.com/mig-1g.10gb",
    allows gpus_per_worker below 1: each worker then gets one share."""
    cpu: Quantity | None = None
    """CPU cores requested for each worker."""
    memory: Quantity | None = None
    """Memory requested for each worker, and its limit."""
    shm: Quantity = "2Gi"
    """Size of /dev/shm, which DataLoader workers use. It counts as memory."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have, such as "nvidia.com/gpu.product" = "NVIDIA-A100-SXM4-80GB"."""
    tolerations: list[Toleration] = []
    """Taints of nodes that workers tolerate."""
    service_account: Name | None = None
    """Service account. Without it pods get no token of the cluster."""
    pull_secrets: list[Name] = []
    """Secrets of the image's registry."""
    queue: Name | None = None
    """Kueue's LocalQueue. Kueue then decides when the Job starts."""
    priority_class: Name | None = None
    """Priority class of the pods."""
    retries: Annotated[int, Ge(0)] = 3
    """How often each worker is started again after a failure. Preemptions are not counted."""
    postgres: bool = False
    """Whether a Postgres is started beside the workers, for those who have none."""
    postgres_size: Quantity = "10Gi"
    """Size of its volume."""
    dashboard: bool = False
    """Whether a read-only dashboard is started beside the workers."""
