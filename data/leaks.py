"""Rows and groups that lie in two parts, and parts out of their order in time.

Only numbers and places are returned, so the test part stays sealed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from torch import Tensor

from hpo.data.inputs import Inputs, selected
from hpo.data.names import Part
from hpo.data.source import Source
from hpo.data.split import parted
from hpo.data.stored import chunks


@dataclass(frozen=True, kw_only=True)
class Leak:
    """What two parts share, or rows of the later part that are older than the latest of the earlier one."""

    what: Literal["row", "group", "time"]
    earlier: Part
    later: Part
    count: int  # rows of the later part that equal a row of the earlier one, have a group of it, or are older
    whole: int  # rows of the later part
    places: tuple[
        str, str
    ]  # of the first such row in the later part, and of its like or of the latest in the earlier one


def leaks(source: Source, split_seed: int) -> list[Leak]:
    """Return the leaks between each two parts. Rows are compared by digests of their inputs."""
    parts: dict[Part, Tensor] = dict(zip(("train", "validation", "test"), parted(source, split_seed), strict=True))
    rows = {part: list(digests(selected(_of_part(source, part, "inputs"), which))) for part, which in parts.items()}
    keys = {part: _of_part(source, part, "groups") for part in parts}
    groups = {part: keys[part][which].tolist() for part, which in parts.items() if keys[part] is not None}
    moments = {part: _of_part(source, part, "times") for part in parts}
    times = {part: moments[part][which] for part, which in parts.items() if moments[part] is not None}
    shared = [*_shared(source, "row", rows, parts), *_shared(source, "group", groups, parts)]
    return [*shared, *_out_of_order(source, times, parts)]


def digests(inputs: Inputs) -> Iterator[bytes]:
    """Yield a digest of each row."""
    if isinstance(inputs, dict):
        yield from map(b"".join, zip(*map(digests, inputs.values()), strict=True))
        return
    for chunk in chunks(inputs):
        for row in chunk.cpu().contiguous().numpy():
            yield hashlib.blake2b(row.data, digest_size=16).digest()


def _shared(
    source: Source,
    what: Literal["row", "group"],
    marks: Mapping[Part, list[bytes] | list[int]],
    parts: Mapping[Part, Tensor],
) -> Iterator[Leak]:
    """Yield a leak for each two parts that have a mark in common."""
    for earlier, later in combinations(marks, 2):
        first = {mark: place for place, mark in reversed(list(enumerate(marks[earlier])))}
        again = [(place, first[mark]) for place, mark in enumerate(marks[later]) if mark in first]
        if again:
            yield _leak(source, what, (earlier, later), parts, len(again), again[0])


def _out_of_order(source: Source, times: Mapping[Part, Tensor], parts: Mapping[Part, Tensor]) -> Iterator[Leak]:
    """Yield a leak for each two parts if rows of the later one are older than the latest row of the earlier one."""
    for earlier, later in combinations(times, 2):
        latest = int(times[earlier].argmax())
        older = (times[later] < times[earlier][latest]).nonzero().flatten().tolist()
        if older:
            yield _leak(source, "time", (earlier, later), parts, len(older), (older[0], latest))


def _leak(
    source: Source,
    what: Literal["row", "group", "time"],
    between: tuple[Part, Part],
    parts: Mapping[Part, Tensor],
    count: int,
    rows: tuple[int, int],
) -> Leak:
    """Return a leak between an earlier and a later part, by the places of the two rows: in the later one, in the earlier one."""
    earlier, later = between
    ours, other = rows
    places = (_placed(source, later, int(parts[later][ours])), _placed(source, earlier, int(parts[earlier][other])))
    return Leak(what=what, earlier=earlier, later=later, count=count, whole=len(parts[later]), places=places)


def _of_part(source: Source, part: Part, field: str) -> Any:
    """Return a field of the tensors that a part's rows are numbered in: its own, if the source ships it."""
    return getattr(source, f"{part}_{field}" if _is_shipped(source, part) else field)


def _is_shipped(source: Source, part: Part) -> bool:
    return part != "train" and getattr(source, f"{part}_targets") is not None


def _placed(source: Source, part: Part, row: int) -> str:
    return f"{source.unit} {row} of the {part} part" if _is_shipped(source, part) else source.placed(row)
