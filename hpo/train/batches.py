"""Division of an epoch's rows into batches, one per optimizer step, and of batches into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Sampling = Literal["shuffled", "balanced"]
SMALLEST_PIECE = 2  # rows in a micro-batch; batch norm fails on one


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the number of optimizer steps in one epoch.

    A short last batch is dropped, since batch norm fails on one row and trials in a stack need batches of one size.
    The order changes every epoch, so no row is dropped for good. Fewer rows than one batch make one batch.
    """
    return max(1, rows // batch_size)


def most_pieces(batch_size: int) -> int:
    """Return the most micro-batches of a batch such that each has at least SMALLEST_PIECE rows."""
    return max(1, batch_size // SMALLEST_PIECE)


def can_halve(batch_size: int, accumulation: int) -> bool:
    """Return whether twice as many micro-batches are possible, each with at least SMALLEST_PIECE rows."""
    return 2 * accumulation <= most_pieces(batch_size)


def cut(batch: Tensor, pieces: int) -> tuple[Tensor, ...]:
    """Return the micro-batches of a batch, near-equal and in order."""
    return torch.tensor_split(batch, pieces) if pieces > 1 else (batch,)


def rows_by_class(targets: Tensor) -> list[Tensor]:
    """Return the rows of each class that occurs, on the CPU.

    Args:
        targets: class numbers int64 [N], or labels bool [N, 1] of a binary task.
    """
    classes = targets.reshape(-1).long().cpu()
    rows = torch.argsort(classes, stable=True)
    return [part for part in torch.split(rows, torch.bincount(classes).tolist()) if len(part)]


def balanced_order(rows: Sequence[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Return `count` rows in random order, of which each class has the same number, or one more.

    All rows of a class come before one of them comes again.

    Args:
        rows: rows of each class.
        generator: where random numbers are drawn.
    """
    each, more = divmod(count, len(rows))
    with_one_more = torch.randperm(len(rows), generator=generator)[:more].tolist()
    chosen = [_repeated(of_class, each + (place in with_one_more), generator) for place, of_class in enumerate(rows)]
    return torch.cat(chosen)[torch.randperm(count, generator=generator)]


def _repeated(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` of the rows. All of them come before one comes again."""
    rounds = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(0, count, len(rows))]
    return torch.cat([rows[:0], *rounds])[:count]
