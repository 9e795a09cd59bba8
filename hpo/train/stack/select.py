"""Choice of the forward pass for K models: the hand-stacked one, else vmap's. Each is checked before it is used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import chain, islice

import torch

from hpo.data import Split, Splits, head
from hpo.train.inputs import Batch
from hpo.train.loop import train
from hpo.train.run import Run
from hpo.train.stack import forward, vmap_forward
from hpo.train.stack.layers import Forward, Unstackable
from hpo.train.stack.stack import Stack

STEPS = 3  # steps of the check, each an epoch; momentum and running statistics matter from the second on
ROWS = 16  # most rows in a batch of the check
TOLERANCE = 1e-10  # in float64, where only the order of additions may differ

Make = Callable[[int, Splits, torch.dtype | None], Run]  # makes a new run from seed, data and number type


def find(make: Make, splits: Splits, batch_size: int) -> Forward:
    """Return a forward pass for runs that `make` builds, checked against single runs; Unstackable if there is none."""
    reasons = []
    for build in (_by_hand, _by_vmap):
        try:
            check(build, make, splits, batch_size)
            return build(make(0, splits, None))
        except Unstackable as reason:
            reasons.append(str(reason))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a user's model may fail in any way in a stack, and still be fine alone
            reasons.append(f"{type(error).__name__}: {error}")
    raise Unstackable("; ".join(dict.fromkeys(reasons)))


def _by_hand(run: Run) -> Forward:
    return forward.StackedForward(run.model, _few(run))


def _by_vmap(run: Run) -> Forward:
    return vmap_forward.VmapForward(run.model, _few(run))


def _few(run: Run) -> Batch:
    return next(run.validation_inputs.split(2))


BUILDERS: dict[str, Callable[[Run], Forward]] = {"stack": _by_hand, "vmap": _by_vmap}


def of(name: str, run: Run) -> Forward:
    """Return the forward pass of this name, without a check: `find` must have chosen it for such runs before."""
    return BUILDERS[name](run)


def check(build: Callable[[Run], Forward], make: Make, splits: Splits, batch_size: int) -> None:
    """Train two runs for STEPS epochs of one step in float64, alone and together; Unstackable if their losses differ."""
    size = min(batch_size, ROWS, len(splits.train.targets))
    few = dataclasses.replace(splits, train=first(splits.train, size), validation=first(splits.validation, size))
    alone = [list(islice(train(make(seed, few, torch.float64)), STEPS)) for seed in (1, 2)]
    runs = [make(seed, few, torch.float64) for seed in (1, 2)]
    stack = Stack(build(runs[0]), runs[0], len(runs))
    for run in runs:
        stack.put(run)
    together = chain.from_iterable(stack.train_epoch() for _ in range(STEPS))
    for one, other in zip(chain.from_iterable(zip(*alone, strict=True)), together, strict=True):
        for kind, alone_loss, together_loss in (
            ("training", one.train_loss, other.train_loss),
            ("validation", one.validation_loss, other.validation_loss),
        ):
            if not math.isclose(alone_loss, together_loss, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                raise Unstackable(
                    f"two models trained together reach a {kind} loss of {together_loss!r}, but alone {alone_loss!r}"
                )


def first(split: Split, count: int) -> Split:
    """Return the first rows of a split, with their targets."""
    return Split(inputs=head(split.inputs, count), targets=split.targets[:count])
