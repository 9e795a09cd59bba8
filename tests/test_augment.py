"""Augmentation: what becomes of each image depends on its own draws alone, in a loop, in a stack, in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import data
from data import Splits, Strength
from hpo.train import stacked
from hpo.train.loop import Run, initial_model
from hpo.train.optim import OPTIMIZERS
from hpo.train.schedule import constant
from hpo.train.stack import Stack
from models import cnn


@pytest.fixture(scope="module")
def splits() -> Splits:
    return data.load(data.digits(), split_seed=0, device="cpu")


def images(count: int = 64) -> Tensor:
    return torch.randn((count, 2, 7, 9), generator=torch.Generator().manual_seed(0))


def drawn(count: int = 64) -> Tensor:
    return data.draws(count, torch.Generator().manual_seed(1))


def strengths(count: int, crop: float, flip: float) -> tuple[Tensor, Tensor]:
    return torch.full((count,), crop), torch.full((count,), flip)


def by_hand(image: Tensor, uniform: list[float], crop: int, flip: float) -> Tensor:
    """Pad with zeros, cut out, mirror: one image, as one would with torchvision."""
    down, across = (int(number * (2 * crop + 1)) for number in uniform[:2])
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image, (crop,) * 4)
    cut = padded[:, down : down + height, across : across + width]
    return cut.flip(2) if uniform[2] < flip else cut


@pytest.mark.parametrize(("crop", "flip"), [(0, 0.0), (2, 0.0), (0, 1.0), (0, 0.5), (3, 0.5), (6, 0.3)])
def test_each_image_is_moved_and_mirrored_by_its_own_draws(crop: int, flip: float) -> None:
    found = data.augment(images(), drawn(), *strengths(64, crop, flip))
    for image, uniform, one in zip(images(), drawn().tolist(), found, strict=True):
        mirrored = uniform[2] < flip
        expected = by_hand(image, uniform, crop, 0.0)
        if mirrored:  # the move is of the source, so a mirrored image moves the other way
            down, across = (int(number * (2 * crop + 1)) for number in uniform[:2])
            padded = torch.nn.functional.pad(image, (crop,) * 4)
            expected = padded[:, down : down + 7, across : across + 9].flip(2)
        assert torch.equal(one, expected)


def test_draws_differ_from_image_to_image() -> None:
    same = torch.ones((64, 1, 7, 9)).cumsum(3)
    found = data.augment(same, drawn(), *strengths(64, 2, 0.5))
    assert len({tuple(one.flatten().tolist()) for one in found}) > 20


def test_no_image_depends_on_the_others_in_the_call() -> None:
    crop, flip = torch.arange(64) % 4 * 1.0, torch.arange(64) % 3 / 2
    whole = data.augment(images(), drawn(), crop, flip)
    part = data.augment(images()[5:9], drawn()[5:9], crop[5:9], flip[5:9])
    assert torch.equal(whole[5:9], part)


def make(splits: Splits, index: int, dtype: torch.dtype = torch.float64) -> Run:
    model = initial_model(lambda: cnn((1, 8, 8), 10, channels=[4], dropout=0.1), index).to(dtype)
    return Run(
        model=model,
        optimizer=OPTIMIZERS["sgd"](model.parameters(), lr=0.05),
        schedule=constant(100),
        splits=splits,
        epochs=2,
        batch_size=64,
        seed=index,
        augment=[Strength(), Strength(crop=2, horizontal_flip=0.5), Strength(crop=1)][index],
    )


def losses(stack: Stack) -> list[list[float]]:
    return [[result.train_loss for result in stack.train_epoch()] for _ in range(2)]


def test_each_run_of_a_stack_augments_as_it_does_alone(splits: Splits) -> None:
    runs = [make(splits, index) for index in range(3)]
    stack = Stack(stacked.Forward(runs[0].model), runs[0], 3)
    for run in runs:
        stack.put(run)
    together = losses(stack)
    for index in range(3):
        alone = [result.train_loss for result in make(splits, index).train()]
        assert alone == pytest.approx([epoch[index] for epoch in together], abs=1e-10)
    plain = make(splits, 1)
    plain.augment = Strength()
    assert next(plain.train()).train_loss != together[0][1]


def test_an_epoch_left_amid_goes_on_with_its_own_draws(splits: Splits) -> None:
    whole = [result.train_loss for result in make(splits, 1).train()]
    run, asked = make(splits, 1), iter(range(1000))
    assert list(run.train(stop=lambda: next(asked) == 7)) == []
    other = make(splits, 1)
    other.load_state_dict(run.state_dict())
    assert [result.train_loss for result in other.train()] == whole
