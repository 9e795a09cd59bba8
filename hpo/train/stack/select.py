"""Which forward pass trains K models as one: the hand-stacked, else vmap's; each is checked before it is trusted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import chain, islice

import torch

from hpo.data import Split, Splits
from hpo.train.loop import train
from hpo.train.run import Run
from hpo.train.stack import forward, vmap_forward
from hpo.train.stack.layers import Unstackable
from hpo.train.stack.stack import Forward, Stack

STEPS = 3  # of the check, each an epoch; momentum and running statistics show from the second on
IMAGES = 16  # in a batch of the check, at most
TOLERANCE = 1e-10  # in float64: what remains is the order of additions

Make = Callable[[int, Splits, torch.dtype | None], Run]  # a fresh run by seed, data and number type


def find(make: Make, splits: Splits, batch_size: int) -> Forward:
    """Return a forward pass for models as `make` builds them, checked against each of them alone.

    Raises Unstackable with the reasons if there is none.
    """
    reasons = []
    for build in (_by_hand, _by_vmap):
        try:
            check(build, make, splits, batch_size)
            return build(make(0, splits, None))
        except Unstackable as reason:
            reasons.append(str(reason))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a user's model does in a stack: alone it may be well
            reasons.append(f"{type(error).__name__}: {error}")
    raise Unstackable("; ".join(dict.fromkeys(reasons)))


def _by_hand(run: Run) -> Forward:
    return forward.StackedForward(run.model)


def _by_vmap(run: Run) -> Forward:
    return vmap_forward.VmapForward(run.model, next(run.validation_images.split(2)))


BUILDERS: dict[str, Callable[[Run], Forward]] = {"stack": _by_hand, "vmap": _by_vmap}


def of(name: str, run: Run) -> Forward:
    """Return the forward pass of this name, which has been found good for such runs before."""
    return BUILDERS[name](run)


def check(build: Callable[[Run], Forward], make: Make, splits: Splits, batch_size: int) -> None:
    """Train two runs for STEPS epochs of one step in float64, alone and together; Unstackable if that is not the same."""
    size = min(batch_size, IMAGES, len(splits.train.labels))
    few = dataclasses.replace(splits, train=_first(splits.train, size), validation=_first(splits.validation, size))
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
                    f"two models trained as one come to a {kind} loss of {together_loss!r}, alone to {alone_loss!r}"
                )


def _first(split: Split, count: int) -> Split:
    return Split(images=split.images[:count], labels=split.labels[:count])
