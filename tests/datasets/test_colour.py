"""Colours: against torchvision's functions for the same factors, in the range of the images' own values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from hpo import data
from hpo.data import Tone
from hpo.data.augment import colour, trivial
from hpo.data.augment.colour import JITTERS, jitter
from hpo.data.augment.strength import Strength

Change = Callable[[Tensor, Tensor], Tensor]
CHANNELS = [1, 3]


def shares(count: int = 6, channels: int = 3) -> Tensor:
    found = torch.rand((count, channels, 7, 9), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found[0, :, :2] = 0.5  # without a colour, and of one value
    found[1] = 0.25
    return found


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


def toned(channels: int = 3, white: int = 200) -> tuple[Tensor, Tone]:
    """Return normalised images and their tone."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, white + 1, (40, channels, 7, 9), dtype=torch.uint8, generator=generator)
    raw[0, 0, 0, 0] = white
    mean, std = raw.float().mean((0, 2, 3)), raw.float().std((0, 2, 3))
    return (raw.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), Tone(mean, std, white)


FACTORS = [0.0, 0.3, 1.0, 1.6, 2.5, 0.9]
TURNS = [0.0, 0.1, -0.5, 0.5, -0.2, 0.33]
ADJUSTED: dict[str, tuple[Any, list[float]]] = {
    "brightness": (vision.adjust_brightness, FACTORS),
    "contrast": (vision.adjust_contrast, FACTORS),
    "saturation": (vision.adjust_saturation, FACTORS),
    "hue": (vision.adjust_hue, TURNS),
}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", ADJUSTED)
def test_each_image_gets_its_own_factor_as_torchvision_gives_it(name: str, channels: int) -> None:
    adjust, factors = ADJUSTED[name]
    given = shares(channels=channels)
    expected = torch.stack([adjust(image, factor) for image, factor in zip(given, factors, strict=True)])
    torch.testing.assert_close(JITTERS[name](given, column(factors)), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("name", JITTERS)
def test_a_factor_of_one_and_a_turn_of_none_change_no_bit(name: str, channels: int) -> None:
    given = shares(channels=channels)
    assert torch.equal(JITTERS[name](given, column([0.0 if name == "hue" else 1.0] * 6)), given)


AMOUNTS = [0.0, 0.1, 0.5, -0.7, 0.9, 1.0]
TONED: dict[str, Callable[[Tensor, float], Tensor]] = {  # as torchvision's TrivialAugmentWide calls them
    "brightness": lambda image, m: vision.adjust_brightness(image, 1 + 0.99 * m),
    "color": lambda image, m: vision.adjust_saturation(image, 1 + 0.99 * m),
    "contrast": lambda image, m: vision.adjust_contrast(image, 1 + 0.99 * m),
    "sharpness": lambda image, m: vision.adjust_sharpness(image, 1 + 0.99 * m),
    "posterize": lambda image, m: vision.posterize(image, round(8 - 6 * abs(m))),
    "solarize": lambda image, m: vision.solarize(image, 1 - abs(m)),
    "auto_contrast": lambda image, m: vision.autocontrast(image),
    "equalize": lambda image, m: vision.equalize(image),
}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", trivial.TONES)
def test_trivial_augment_changes_colours_as_torchvision_does(name: str, channels: int) -> None:
    unsigned = trivial.OPERATIONS.index(name) >= trivial.SIGNED
    amounts = [abs(amount) if unsigned else amount for amount in AMOUNTS]
    given = shares(channels=channels)
    expected = torch.stack([TONED[name](image, amount) for image, amount in zip(given, amounts, strict=True)])
    found = trivial.TONES[name](given, column(amounts))
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0.0, atol=1e-5)


def test_trivial_augment_has_torchvision_s_operations() -> None:
    """Trivial augment has torchvision's operations each as often and as much."""
    from torchvision.transforms.v2 import TrivialAugmentWide

    theirs = TrivialAugmentWide._AUGMENTATION_SPACE
    assert [name.lower() for name in theirs] == [name.replace("_", "") for name in trivial.OPERATIONS]
    assert [signed for _, signed in list(theirs.values())[1:]] == [
        index < trivial.SIGNED for index in range(1, len(theirs))
    ]
    chosen = trivial.choices(Strength(trivial_augment=1.0), 30_000, lambda _: torch.Generator().manual_seed(0))
    assert torch.bincount(chosen.operation, minlength=14).double() / 30_000 == pytest.approx(1 / 14, abs=0.01)
    steps = (chosen.amount.abs() * trivial.STEPS).round().long()
    assert torch.bincount(steps).double() / 30_000 == pytest.approx(1 / 31, abs=0.006)
    assert set((chosen.amount < 0)[chosen.operation >= trivial.SIGNED].tolist()) == {False}
    assert (chosen.amount < 0)[chosen.operation == 5].double().mean().item() == pytest.approx(0.5, abs=0.05)
    seldom = trivial.choices(Strength(trivial_augment=0.3), 30_000, lambda _: torch.Generator().manual_seed(0))
    assert (seldom.operation > 0).double().mean().item() == pytest.approx(0.3 * 13 / 14, abs=0.01)


def test_a_factor_lies_within_the_strength() -> None:
    """A factor lies within the strength about one and never below none."""
    strength = Strength(brightness=0.2, contrast=1.5, hue=0.1)
    drawn = colour.draw_jitter(strength, 5000, lambda _: torch.Generator().manual_seed(0))
    low, high = drawn.amin(0).tolist(), drawn.amax(0).tolist()
    assert low == pytest.approx([0.8, 0.0, 1.0, -0.1], abs=0.01)
    assert high == pytest.approx([1.2, 2.5, 1.0, 0.1], abs=0.01)
    assert min(low[:3]) >= 0


@pytest.mark.parametrize("channels", CHANNELS)
def test_colours_are_changed_between_black_and_the_datas_own_white(channels: int) -> None:
    given, tone = toned(channels)
    raw = tone.shares(given).double()
    assert (raw.min(), raw.max()) == (0, 1)
    drawn = torch.tensor([[1.5, 0.5, 1.3, 0.1]]).expand(40, -1)
    expected = vision.adjust_contrast(vision.adjust_brightness(raw, 1.5), 0.5)
    expected = vision.adjust_hue(vision.adjust_saturation(expected, 1.3), 0.1)
    torch.testing.assert_close(tone.shares(jitter(given, drawn, JITTERS, tone)).double(), expected, rtol=0, atol=1e-4)


def retoned_of(images: Tensor, choices: Tensor, tone: Tone) -> Tensor:
    return trivial.retone(images, choices, tone, trivial.rows_by_tone(choices))


def test_the_digits_white_is_16() -> None:
    splits = data.load(data.digits(), split_seed=0, device="cpu")
    tone = Tone(splits.mean, splits.std, splits.white)
    normal = (splits.train.inputs.float() - splits.mean.view(-1, 1, 1)) / splits.std.view(-1, 1, 1)
    brightest = jitter(normal, torch.tensor([[9.0, 1, 1, 0]]).expand(len(normal), -1), ["brightness"], tone)
    raw = brightest * splits.std.view(-1, 1, 1) + splits.mean.view(-1, 1, 1)
    assert raw.max().item() == pytest.approx(16.0, abs=1e-4)
    assert raw.min().item() == pytest.approx(0.0, abs=1e-4)


def test_no_image_depends_on_the_others_in_the_call() -> None:
    given, tone = toned()
    drawn = torch.rand((40, 4), generator=torch.Generator().manual_seed(1))
    choices = torch.stack([torch.arange(40) % 14, torch.linspace(0, 1, 40)], 1)
    whole, retoned = jitter(given, drawn, JITTERS, tone), retoned_of(given, choices, tone)
    for first, last in ((0, 1), (6, 7), (5, 9), (3, 40)):
        part = slice(first, last)
        assert torch.equal(whole[part], jitter(given[part], drawn[part], JITTERS, tone))
        assert torch.equal(retoned[part], retoned_of(given[part], choices[part], tone))


def test_trivial_augment_spares_bits() -> None:
    """Trivial augment leaves every bit of an image whose pixels it moves or that it spares."""
    given, tone = toned()
    choices = torch.stack([torch.arange(40) % 14, torch.full((40,), 0.8)], 1)
    found = retoned_of(given, choices, tone)
    stays = choices[:, 0] < trivial.OPERATIONS.index("brightness")
    assert torch.equal(found[stays], given[stays])
    changed = [not torch.equal(one, other) for one, other in zip(found[~stays], given[~stays], strict=True)]
    assert all(changed)
