"""A way of training several models as one that is refused names the two losses that differ, not two that are the same."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hpo.data import Splits
from hpo.train.inputs import Batch
from hpo.train.loop import train
from hpo.train.run import Run
from hpo.train.stack import select
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.layers import Pass, Unstackable
from tests.support.stacks import Trial

SAID = re.compile(r"two models trained together reach a (\w+) loss of (\S+), but alone (\S+)")


class Bent(StackedForward):
    """Gives other logits while it trains, or while it does not."""

    bends_training: bool

    def __call__(self, at: Pass, inputs: Batch) -> Tensor:
        logits = super().__call__(at, inputs)
        return logits * 2 if at.training == self.bends_training else logits


@pytest.mark.parametrize(("kind", "bends_training"), [("training", True), ("validation", False)])
def test_the_losses_that_differ_are_named(kind: str, bends_training: bool, splits: Splits) -> None:
    runs: list[Run] = []

    def make(seed: int, data: Splits, dtype: torch.dtype | None) -> Run:
        runs.append(replace(Trial(splits=data, seed=seed, batch_size=16, epochs=3), dtype=dtype or torch.float32).run())
        return runs[-1]

    def build(run: Run) -> StackedForward:
        forward = Bent(run.model)
        forward.bends_training = bends_training
        return forward

    with pytest.raises(Unstackable) as refused:
        select.check(build, make, splits, 16)
    match = SAID.fullmatch(str(refused.value))
    assert match is not None
    first = next(train(make(1, runs[0].splits, torch.float64)))
    alone = {"training": first.train_loss, "validation": first.validation_loss}
    assert (match[1], float(match[3])) == (kind, alone[kind])
    assert float(match[2]) != float(match[3])
