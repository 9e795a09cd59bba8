"""The section [launch.compose]: what a study file may say about the containers of its workers on this machine."""

from __future__ import annotations

import pydantic

from hpo.spec.matching import Folder, Image


class ComposeOptions(pydantic.BaseModel):
    """The section [launch.compose]."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    image: Image = "hpo"
    """Image of the workers, with `hpo` on its path. `docker build -t hpo .` makes one."""
    storage: str | None = None
    """URL of the database as containers reach it, without its password. By default the study's. This machine is
    host.docker.internal."""
    gpus: list[str] = ["0"]
    """GPUs of this machine by number or UUID. Workers are spread over them; `gpus_per_worker` says how many each gets."""
    env: list[str] = []
    """Environment variables of this machine that workers get, such as AWS_ACCESS_KEY_ID."""
    volumes: dict[Folder, Folder] = {}
    """Folders of this machine and the paths that they are mounted at. The checkpoints' folder is mounted anyway."""
    postgres: bool = False
    """Whether the database and the dashboard of docker-compose.yml are started beside the workers."""
