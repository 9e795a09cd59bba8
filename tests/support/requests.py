"""What engines in containers are asked for in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpo.launch.engines.engine import Request
from hpo.spec.launch import Launch

PASSWORD = "hunter2"
STORAGE = "postgresql+psycopg://hpo:***@db.lab:5433/hpo"  # as an open storage shows itself


def request(
    folder: Path, *, slots: range = range(4), launch: int | None = 7, gpus: float | None = None, **more: Any
) -> Request:
    """Return a request for workers of a study whose code is in a folder.

    Args:
        folder: the folder of the study's code.
        slots: the workers.
        launch: the number of the launch.
        gpus: `gpus_per_worker`.
        more: fields of the request; those that it does not have are sections of [launch].
    """
    of_request = {key: value for key, value in more.items() if key in Request.__dataclass_fields__}
    section = {key: value for key, value in more.items() if key not in of_request}
    section |= {"gpus_per_worker": gpus} if gpus is not None else {}
    fields: dict[str, Any] = {
        "study": "digits",
        "launch": launch,
        "slots": slots,
        "workers": slots.stop,
        "section": Launch.checked(section),
        "code_folder": folder,
        "folder": folder,
        "logs": None,
        "grace": 30.0,
        "environment": {"HPO_STORAGE": STORAGE.replace("***", PASSWORD)},
        "storage": STORAGE,
        "checkpoints": "s3://bucket/hpo",
    }
    return Request(**fields | of_request)
