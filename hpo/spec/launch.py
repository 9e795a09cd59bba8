"""The section [launch] of a study file: on which engine workers are started, how many, and with what options."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge, Le

from hpo.errors import SpecError, nearest
from hpo.spec import options
from hpo.spec.compose import ComposeOptions
from hpo.spec.kubernetes import KubernetesOptions

MAX_LAUNCHED = 10_000  # workers of one launch
EngineName = Literal["slurm", "ray", "kubernetes", "compose"]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class SlurmOptions(_Section):
    """The section [launch.slurm]. What is left out, the cluster's own defaults decide."""

    partition: str | None = None
    """Partition, or several with commas between them."""
    account: str | None = None
    """Account that the time is charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that a node must have."""
    time: str | None = None
    """Time limit of a job, such as "8:00:00". Workers park before it, and the job goes on in the queue."""
    memory: str | None = None
    """Memory of a worker, such as "16G"."""
    cpus_per_worker: Annotated[int, Ge(1)] = 1
    """CPU cores of a worker."""
    gpu_types: dict[str, Annotated[int, Ge(1)]] = {}
    """Workers by kind of GPU, such as { a100 = 8, h100 = 24 }: one job array for each kind, in place of `workers`."""
    notice: Annotated[int, Ge(1), Le(65535)] = 90
    """Seconds before the time limit at which workers are told to park; more than `recovery.grace`."""
    sbatch: list[str] = []
    """Further options of sbatch, such as "--exclude=n7"."""
    setup: list[str] = []
    """Lines of shell before the worker, such as "module load cuda"."""


class RayOptions(_Section):
    """The section [launch.ray]."""

    address: str | None = None
    """Address of the cluster, such as "10.0.0.5:6379". By default $RAY_ADDRESS, else the cluster that runs on this machine, else
    a new one here that ends with its driver."""
    cpus_per_worker: Annotated[float, Ge(0)] = 1.0
    """CPU cores that Ray sets aside for a worker."""
    resources: dict[str, Annotated[float, Ge(0)]] = {}
    """Further resources of a worker by Ray's names, such as { "accelerator_type:A100" = 0.001 } for a kind of GPU."""
    environment: list[str] = []
    """Variables of this machine that workers get too, such as "AWS_ACCESS_KEY_ID". The nodes' own ones need no mention."""


class Launch(_Section):
    """The section [launch]."""

    on: EngineName | None = None
    """Engine that starts the workers; `--on` comes first."""
    workers: Annotated[int, Ge(1), Le(MAX_LAUNCHED)] | None = None
    """Number of workers; `--workers` comes first."""
    gpus_per_worker: Annotated[float, Ge(0)] | None = None
    """GPUs of a worker; a part such as 0.25 where the engine can share a GPU. By default the engine decides."""
    slurm: SlurmOptions = SlurmOptions()
    ray: RayOptions = RayOptions()
    kubernetes: KubernetesOptions = KubernetesOptions()
    compose: ComposeOptions = ComposeOptions()

    @property
    def document(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return self.model_dump(exclude_defaults=True)

    def with_settings(self, words: Iterable[str]) -> Launch:
        """Return this section with the settings of words such as "slurm.partition=gpu". Raises SpecError for a wrong one."""
        document = self.model_dump(exclude_unset=True)
        for word in words:
            path, sign, value = word.partition("=")
            if not sign or not path.strip():
                raise SpecError(f"--set {word}: is not a key and its value; write it such as --set slurm.partition=gpu")
            *sections, key = path.strip().split(".")
            table = document
            for section in sections:
                table = table.setdefault(section, {})
                if not isinstance(table, dict):
                    raise SpecError(f"--set {word}: {section} is no table of [launch]{nearest(section, ENGINE_NAMES)}")
            table[key] = value.strip() if _is_text(sections, key) else _value(value.strip())
        return self.checked(document)

    @classmethod
    def checked(cls, document: Mapping[str, Any]) -> Launch:
        """Return the section of a document. Raises SpecError that lists all mistakes."""
        try:
            return _InAFile.model_validate({"launch": document}).launch
        except pydantic.ValidationError as error:
            raise SpecError(*options.explain(error, {}, "a study file", _InAFile)) from None


class _InAFile(_Section):
    """A study file as far as this section, so that messages name the whole path."""

    launch: Launch


ENGINE_NAMES = ("slurm", "ray", "kubernetes", "compose")


def _is_text(sections: Iterable[str], key: str) -> bool:
    """Return whether a key of [launch] takes text, so that 16 and 8:00:00 need no quotes on a command line."""
    model: Any = Launch
    for section in sections:
        field = model.model_fields.get(section)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
            return False
    field = model.model_fields.get(key)
    return field is not None and field.annotation in (str, str | None)


def _value(text: str) -> Any:
    """Return a value as TOML reads it, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError, RecursionError):
        return text
