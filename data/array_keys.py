"""Arrays of an archive that say which rows belong together: groups and times. They are no inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo.data.archive import Archive, Array


def keys_of(archive: Archive, group: str | None, time: str | None) -> dict[str, Any]:
    """Return the groups and times of the training rows, as fields of a `Source`; BadFile for an array that is neither.

    Args:
        archive: the archive, read with both arrays.
        group: array of groups, whole numbers or texts [N].
        time: array of times, numbers or dates [N].
    """
    found: dict[str, Tensor] = {}
    if group is not None:
        values = _column(archive, group, "iubUSO", "whole numbers or texts")
        found["groups"] = torch.from_numpy(np.unique(values.astype(str), return_inverse=True)[1])
    if time is not None:
        found["times"] = torch.from_numpy(_moments(archive, time))
    return found


def _column(archive: Archive, name: str, kinds: str, said: str) -> Array:
    """Return an array with one value for each training row."""
    values, count = archive.others[name], len(archive.arrays["train", "images"])
    if values.dtype.kind not in kinds or values.size != count or values.ndim == 0:
        raise archive.bad_array(
            name, f"is {values.dtype} {list(values.shape)}; give {said} [{count}], one for each training row"
        )
    return values.reshape(-1)


def _moments(archive: Archive, name: str) -> Any:
    """Return times to sort by: whole numbers, or real ones."""
    values = _column(archive, name, "iufM", "numbers or dates")
    bad = np.flatnonzero(np.isnat(values) if values.dtype.kind == "M" else ~np.isfinite(values))
    if len(bad):
        raise archive.bad_array(name, f"is {values[bad[0]]}; give each row its time", int(bad[0]))
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
