"""Balanced epochs: classes are equally frequent, draws repeat bit for bit, and every executor takes the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpo import data
from hpo.data import Source, Splits
from hpo.train import loop
from hpo.train.batches import balanced_order, rows_by_class
from tests.support.stacks import Trial, apart, numbers, stop_before, timeless, together, weights

COUNTS = (90, 20, 10)


def imbalanced() -> Splits:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    images = torch.randint(0, 200, (len(labels), 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0, 0] += (labels * 20).to(torch.uint8)[:, None]
    return data.load(Source(inputs=images, targets=labels, num_classes=3), split_seed=0, device="cpu")


TRIAL = Trial(splits=imbalanced(), epochs=3, options={"sampling": "balanced"})


@pytest.mark.parametrize(
    ("targets", "count", "expected"),
    [
        (torch.tensor([0] * 9 + [1] * 2 + [3]), 12, [4, 4, 4]),
        (torch.tensor([0] * 9 + [1] * 2 + [3]), 14, [4, 5, 5]),
        (torch.tensor([[True]] * 3 + [[False]] * 7), 10, [5, 5]),
        (torch.tensor([0, 1, 2]), 2, [0, 1, 1]),
    ],
)
def test_classes_are_equally_frequent_and_so_are_the_rows_of_a_class(
    targets: torch.Tensor, count: int, expected: list[int]
) -> None:
    rows = rows_by_class(targets)
    order = balanced_order(rows, count, torch.Generator().manual_seed(1))
    times = [torch.bincount(order, minlength=len(targets))[of_class] for of_class in rows]
    assert sorted(int(of_class.sum()) for of_class in times) == expected
    assert all(of_class.max() - of_class.min() <= 1 for of_class in times)


def test_an_epoch_is_drawn_from_the_trial_s_seed_alone() -> None:
    run, again, other = TRIAL.run(), TRIAL.run(), replace(TRIAL, seed=1).run()
    first = run.order()
    assert torch.equal(first, again.order())
    assert not torch.equal(first, other.order())
    run.epoch = 1
    assert not torch.equal(first, run.order())
    assert run.splits.train.targets[first].bincount().tolist() in ([27, 27, 26], [27, 26, 27], [26, 27, 27])


def test_a_stopped_epoch_goes_on_bit_for_bit() -> None:
    whole = TRIAL.run()
    expected = timeless(loop.train(whole))
    broken = TRIAL.run()
    results = [*loop.train(broken, stop_before(6))]
    resumed = TRIAL.run()
    resumed.load_state_dict(broken.state_dict())
    results += loop.train(resumed)
    assert timeless(results) == expected
    assert all(torch.equal(one, weights(whole)[name]) for name, one in weights(resumed).items())


def test_a_stack_takes_the_rows_that_the_loop_takes() -> None:
    trials = [*TRIAL.several(2), replace(TRIAL, options={})]
    for stacked, trial in zip(together(trials), trials, strict=True):
        assert apart(stacked, numbers(loop.train(trial.run()))) < 1e-10
