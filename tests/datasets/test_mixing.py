"""Erasing, mixup and cutmix: boxes, shares and labels against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from hpo.data import Augmentation, MixedLabels, Tone
from hpo.data.augment.drawn import draw
from hpo.data.augment.erasing import draw_boxes, erase, within
from hpo.data.augment.mixing import draw_mixing, mix
from hpo.data.augment.strength import Strength

MANY = 20_000
SIZE = (20, 24)


def random(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(purpose))


def images(count: int = 32) -> Tensor:
    return torch.randn((count, 3, *SIZE), generator=torch.Generator().manual_seed(0))


def test_boxes_are_as_frequent_as_large_as_oblong_as_said_and_inside() -> None:
    top, bottom, left, right = draw_boxes(Strength(erasing=0.4, erasing_area=0.25), MANY, SIZE, random).unbind(1)
    hidden = bottom > top
    assert hidden.double().mean().item() == pytest.approx(0.4, abs=0.012)
    tall, wide = (bottom - top)[hidden], (right - left)[hidden]
    uncut = (tall < SIZE[0]) & (wide < SIZE[1])
    area, ratio = (tall * wide)[uncut] / (SIZE[0] * SIZE[1]), (tall / wide)[uncut]
    assert 0.015 < area.min() < 0.03
    assert 0.24 < area.max() < 0.28  # sides are whole pixels
    assert ratio.log().median().item() == pytest.approx(0.0, abs=0.05)
    assert 1.0 < ratio.log().max() < 1.4
    assert top.min() == 0
    assert left.min() == 0
    assert bottom.max() == SIZE[0]
    assert right.max() == SIZE[1]


def test_a_box_is_hidden_as_torchvision_hides_it_and_nothing_else() -> None:
    boxes = draw_boxes(Strength(erasing=0.7), 32, SIZE, random)
    found = erase(images(), boxes)
    for image, box, one in zip(images(), boxes.int().tolist(), found, strict=True):
        top, bottom, left, right = box
        expected = vision.erase(image, top, left, bottom - top, right - left, torch.zeros(1))
        assert torch.equal(one, expected)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixups_shares_are_of_a_beta_distribution(alpha: float) -> None:
    mixing = draw_mixing(Strength(mixup=alpha), MANY, 32, SIZE, random)
    share = mixing.share.double()
    assert share.mean().item() == pytest.approx(0.5, abs=0.012)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    assert torch.equal(mixing.weight, mixing.share)
    assert torch.unique(mixing.partner).tolist() == list(range(32))


def test_mixup_is_its_formula() -> None:
    mixing = draw_mixing(Strength(mixup=0.4), 32, 32, SIZE, random)
    given, share = images(), mixing.share[:, None, None, None]
    found = mix(given, given[mixing.partner], mixing.share, mixing.box)
    torch.testing.assert_close(found, share * given + (1 - share) * given[mixing.partner], rtol=0, atol=0)


def test_cutmix_weighs_labels_by_what_is_seen() -> None:
    """CutMix puts in a box of its partner and weighs the labels by what is seen."""
    mixing = draw_mixing(Strength(cutmix=1.0), MANY, 32, SIZE, random)
    inside = within(mixing.box, *SIZE)
    assert torch.equal(mixing.share, torch.ones(MANY))
    torch.testing.assert_close(mixing.weight, 1 - inside.float().mean((1, 2)))
    assert mixing.weight.mean().item() > 0.5  # a box at the border is cut
    part = mixing.box[:32], mixing.partner[:32], mixing.share[:32]
    found = mix(images(), images()[part[1]], part[2], part[0])
    assert torch.equal(found, torch.where(inside[:32, None], images()[part[1]], images()))


def test_an_uncut_box_has_torchvisions_sides() -> None:
    """Half its sides are int(0.5 * sqrt(1 - lambda) * side), so its area is that of lambda but for whole pixels."""
    size = (1000, 1000)
    mixing = draw_mixing(Strength(cutmix=1.0), MANY, 32, size, random)
    top, bottom, left, right = mixing.box.unbind(1)
    uncut = (top > 0) & (bottom < 1000) & (left > 0) & (right < 1000)
    assert torch.equal((bottom - top)[uncut], (right - left)[uncut])
    assert set(((bottom - top)[uncut] % 2).tolist()) == {0.0}
    # Of lambda uniform in 0..1, P(side <= s) = s**2 / 1000**2; the smaller a box is, the likelier it is uncut: (1000 - s)**2.
    sides, grid = (bottom - top)[uncut].double() / 1000, torch.linspace(0, 1, 2001, dtype=torch.float64)
    density = 2 * grid * (1 - grid) ** 2
    expected = (grid * density).sum() / density.sum()
    assert sides.mean().item() == pytest.approx(expected.item(), abs=0.01)


def test_with_both_each_image_gets_one_of_them_and_some_get_none() -> None:
    mixing = draw_mixing(Strength(mixup=1.0, cutmix=1.0, mix_probability=0.6), MANY, 32, SIZE, random)
    cut, mixed = within(mixing.box, *SIZE).any(2).any(1), mixing.share < 1
    assert not (cut & mixed).any()
    assert mixed.double().mean().item() == pytest.approx(0.3, abs=0.012)
    assert cut.double().mean().item() == pytest.approx(0.3, abs=0.03)  # a box may be empty
    alone = ~cut & ~mixed
    assert torch.equal(mixing.weight[alone], torch.ones(int(alone.sum())))
    given = images()
    found = mix(given, given.flip(0), mixing.share[:32], mixing.box[:32])
    assert torch.equal(found[alone[:32]], given[alone[:32]])


def test_the_loss_is_that_of_soft_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((8, 5), generator=generator, dtype=torch.float64)
    own, partners = torch.randint(0, 5, (2, 8), generator=generator)
    weight = torch.rand(8, generator=generator)
    weight[0] = 1.0
    soft = weight[:, None] * F.one_hot(own, 5) + (1 - weight[:, None]) * F.one_hot(partners, 5)
    mixed = MixedLabels(own=own, partners=partners, weight=weight)
    found = mixed.losses(lambda labels: F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(found, F.cross_entropy(logits, soft.double(), reduction="none"), rtol=1e-7, atol=1e-7)


def test_a_partner_s_loss_does_not_touch_what_is_not_mixed() -> None:
    """A loss that is not finite for the partner does not touch an image that is not mixed."""
    mixed = MixedLabels(own=torch.tensor([0]), partners=torch.tensor([1]), weight=torch.tensor([1.0]))
    found = mixed.losses(lambda labels: torch.where(labels == 1, math.inf, 0.5))
    assert found.tolist() == [0.5]


@pytest.mark.parametrize("columns", [(), (1,), (3,)], ids=["classes", "one label", "numbers"])
def test_a_row_gets_its_partner_s_targets_in_all_columns(columns: tuple[int, ...]) -> None:
    tone = Tone(torch.zeros(3), torch.ones(3), 255)
    runs = [draw(Strength(mixup=alpha), 2, 8, SIZE, random) for alpha in (0.3, 0.6)]
    targets = torch.arange(16 * math.prod(columns)).view(2, 8, *columns)
    targets = targets if not columns else targets.float()
    together = Augmentation(runs, 8, 3, tone, torch.device("cpu")).labels(targets, 1)
    assert together is not None
    assert together.weight.shape == (2, 8 + 3)
    for row, run in enumerate(runs):
        assert run is not None
        assert run.mixing is not None
        expected = targets[row][run.mixing.partner[8:]]
        alone = Augmentation([run], 8, 0, tone, torch.device("cpu")).labels(targets[row], 1)
        assert alone is not None
        assert torch.equal(together.partners[row], expected)
        assert torch.equal(alone.partners, expected)
        assert torch.equal(alone.weight, together.weight[row, :8])
        assert alone.losses(lambda some: some.float().flatten(1).sum(1) if columns else some.float()).shape == (8,)
        assert torch.equal(torch.cat([piece.partners for piece in alone.pieces(3)]), expected)
