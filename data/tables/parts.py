"""A source from the rows of all its parts in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hpo.data.inputs import Inputs
from hpo.data.source import Fitted, Source
from hpo.data.tables.frame import Frame
from hpo.data.tables.keys import Keys
from hpo.data.tables.targets import Targets


def source_of(
    inputs: Inputs,
    targets: Targets,
    keys: Keys,
    frame: Frame,
    *,
    fit: Callable[[Inputs], Fitted] | None = None,
    notes: tuple[str, ...] = (),
) -> Source:
    """Return a source whose parts are the rows of each part.

    Args:
        inputs: the inputs of all rows.
        targets: their targets.
        keys: the part, the group and the time of each row.
        frame: the rows in their files.
        fit: makes the encoding of all inputs from those of the training part.
        notes: how ambiguous values were read.
    """
    shipped: dict[str, Any] = {}
    for part, rows in keys.rows.items():
        prefix, chosen = "" if part == "train" else f"{part}_", torch.from_numpy(rows)
        shipped[f"{prefix}inputs"] = _at(inputs, chosen)
        shipped[f"{prefix}targets"] = targets.values[chosen]
        shipped[f"{prefix}times"] = keys.moments(part)
    of_training = keys.rows["train"]
    return Source(
        **shipped,
        **targets.about_source,
        groups=keys.group_numbers,
        notes=(*targets.notes, *notes),
        place=lambda row: frame.place(int(of_training[row])),
        fit=fit,
    )


def _at(inputs: Inputs, rows: torch.Tensor) -> Any:
    """Return the inputs of these rows."""
    return {name: one[rows] for name, one in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
