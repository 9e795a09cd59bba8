"""Images moved, mirrored and warped: against torchvision's functions for the same numbers, exactly where pixels stay whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision
from torchvision.transforms.v2.functional import InterpolationMode

from hpo.data.augment import trivial
from hpo.data.augment.geometry import (
    AFFINE,
    MOVES,
    affine,
    compose,
    draw_warps,
    move,
    moves,
    of_affine,
    of_moves,
    of_resized_crops,
    of_trivial,
    warp,
)
from hpo.data.augment.strength import Fill, Strength

BILINEAR = InterpolationMode.BILINEAR
NEAR = {"rtol": 0.0, "atol": 1e-5}


def images(count: int = 64, size: tuple[int, int] = (7, 9)) -> Tensor:
    return torch.randn((count, 2, *size), generator=torch.Generator().manual_seed(0))


def uniform(count: int, numbers: int, seed: int = 1) -> Tensor:
    return torch.rand((count, numbers), generator=torch.Generator().manual_seed(seed))


def random(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(purpose))


PADS: dict[Fill, dict[str, Any]] = {
    "mean": {"mode": "constant"},
    "edge": {"mode": "replicate"},
    "reflect": {"mode": "reflect"},
}


@pytest.mark.parametrize("fill", PADS)
@pytest.mark.parametrize(("crop", "flip"), [(0, 0.0), (2, 0.0), (0, 1.0), (0, 0.5), (3, 0.5), (6, 0.3)])
def test_each_image_is_moved_and_mirrored_by_its_own_draws(crop: int, flip: float, fill: Fill) -> None:
    drawn = uniform(64, MOVES)
    found = move(images(), moves(Strength(crop=crop, horizontal_flip=flip), drawn), fill)
    padded = F.pad(images(), (crop,) * 4, **PADS[fill])
    for image, numbers, one in zip(padded, drawn.tolist(), found, strict=True):
        down, across = (int(number * (2 * crop + 1)) for number in numbers[:2])
        cut = image[:, down : down + 7, across : across + 9]
        # The move is of the source, so a mirrored image moves the other way.
        assert torch.equal(one, cut.flip(2) if numbers[2] < flip else cut)


@pytest.mark.parametrize(("across", "down"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.3, 0.6)])
def test_flips_are_independent_and_as_frequent_as_said(across: float, down: float) -> None:
    drawn = moves(Strength(horizontal_flip=across, vertical_flip=down), uniform(20_000, MOVES))
    mirrored, upturned = drawn[:, 2].bool(), drawn[:, 3].bool()
    assert mirrored.double().mean().item() == pytest.approx(across, abs=0.012)
    assert upturned.double().mean().item() == pytest.approx(down, abs=0.012)
    assert (mirrored & upturned).double().mean().item() == pytest.approx(across * down, abs=0.012)
    few = images()
    expected = torch.stack(
        [
            one.flip([dim for dim, flips in ((2, m), (1, u)) if flips])
            for one, m, u in zip(few, mirrored, upturned, strict=False)
        ]
    )
    assert torch.equal(move(few, drawn[:64], "mean"), expected)


@pytest.mark.parametrize("fill", PADS)
def test_an_image_of_one_pixel_may_be_moved(fill: Fill) -> None:
    one = torch.ones((3, 1, 1, 1))
    away = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [-2, 3, 1, 0]])
    expected = [1.0, 0, 0] if fill == "mean" else [1.0, 1, 1]
    assert move(one, away, fill).flatten().tolist() == expected
    assert warp(one, of_moves(away).float(), fill).flatten().tolist() == expected


AFFINES: dict[str, dict[str, float]] = {
    "rotation": {"angle": 33.0},
    "translation": {"across": 2.0, "down": -3.0},
    "smaller": {"scale": 0.7},
    "larger": {"scale": 1.4},
    "shear x": {"shear_x": 20.0},
    "shear y": {"shear_y": -12.0},
    "all": {"angle": -130.0, "across": 1.0, "down": 2.0, "scale": 0.8, "shear_x": 15.0, "shear_y": 25.0},
}


def by_torchvision(
    shown: Tensor,
    *,
    angle: float = 0.0,
    across: float = 0.0,
    down: float = 0.0,
    scale: float = 1.0,
    shear_x: float = 0.0,
    shear_y: float = 0.0,
) -> Tensor:
    moved = [int(across), int(down)]
    result: Tensor = vision.affine(shown, angle, moved, scale, [shear_x, shear_y], interpolation=BILINEAR)
    return result


@pytest.mark.parametrize("name", AFFINES)
def test_affine_maps_are_torchvisions(name: str) -> None:
    given = {"angle": 0.0, "across": 0.0, "down": 0.0, "scale": 1.0, "shear_x": 0.0, "shear_y": 0.0} | AFFINES[name]
    maps = affine(**{key: torch.tensor([value] * 2, dtype=torch.float64) for key, value in given.items()})
    shown = images(2, (12, 17)).double()
    torch.testing.assert_close(warp(shown, maps, "mean"), by_torchvision(shown, **AFFINES[name]), **NEAR)


@pytest.mark.parametrize(
    ("strength", "column", "option", "most"),
    [
        (Strength(rotation=40.0), 0, "angle", 40.0),
        (Strength(translation=0.25), 1, "across", 4.0),  # of 17 pixels, in whole ones
        (Strength(translation=0.25), 2, "down", 3.0),
        (Strength(shear=10.0), 4, "shear_x", 10.0),
        (Strength(shear=10.0), 5, "shear_y", 10.0),
    ],
)
def test_a_strength_is_the_most_in_either_direction(strength: Strength, column: int, option: str, most: float) -> None:
    drawn = torch.full((2, 6), 0.5, dtype=torch.float64)
    drawn[:, column] = torch.tensor([0.0, 1.0])
    shown = images(2, (12, 17)).double()
    expected = [by_torchvision(one[None], **{option: way * most}) for one, way in zip(shown, (-1, 1), strict=True)]
    torch.testing.assert_close(warp(shown, of_affine(strength, drawn, (12, 17)), "mean"), torch.cat(expected), **NEAR)


def test_a_scale_is_uniform_about_one() -> None:
    drawn = torch.tensor([[0.5, 0.5, 0.5, number, 0.5, 0.5] for number in (0.0, 0.25, 1.0)], dtype=torch.float64)
    maps = of_affine(Strength(scale=0.2), drawn, (8, 8))
    torch.testing.assert_close(1 / maps[:, 0], torch.tensor([0.8, 0.9, 1.2], dtype=torch.float64))


def test_a_resized_crop_is_torchvision_s_within() -> None:
    """A resized crop is torchvision's but at its border where it knows what is beyond."""
    shown = images(1, (16, 16)).double()
    drawn = torch.tensor(
        [[1.0, 0.5, 0.5, 0.25]], dtype=torch.float64
    )  # a quarter of the area, square, 4 down, 2 across
    found = warp(shown, of_resized_crops(Strength(resized_crop=0.75), drawn, (16, 16)), "mean")
    expected = vision.resized_crop(shown, 4, 2, 8, 8, [16, 16], interpolation=BILINEAR, antialias=False)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], **NEAR)


def test_resized_crops_have_their_area_and_ratio() -> None:
    """Resized crops have the area and the ratio that was asked for and lie inside."""
    maps = of_resized_crops(Strength(resized_crop=0.6, resized_crop_ratio=1.5), uniform(5000, 4).double(), (30, 40))
    wide, tall = maps[:, 0] * 40, maps[:, 4] * 30
    whole = (wide < 40 - 1e-9) & (tall < 30 - 1e-9)
    area, ratio = (wide * tall / 1200)[whole], (wide / tall)[whole]
    assert 0.4 <= area.min() < 0.41
    assert 1 / 1.5 - 1e-9 <= ratio.min() < 0.68
    assert 1.48 < ratio.max() <= 1.5 + 1e-9
    for centre, side, size in ((maps[:, 2], wide, 40), (maps[:, 5], tall, 30)):
        assert (centre.abs() + side / 2).max() <= size / 2 + 1e-9
        assert side.max() <= size + 1e-9


def test_all_that_moves_pixels_is_one_sampling_of_what_happens_in_turn() -> None:
    """Whatever leaves the frame on the way is dark, so that one after the other loses nothing."""
    strength = Strength(crop=2, horizontal_flip=0.5, vertical_flip=0.5, rotation=30.0, scale=0.2, shear=10.0)
    shown = F.pad(images(16, (6, 7)).double(), (12,) * 4)
    size = (30, 31)
    drawn = torch.rand((16, MOVES + AFFINE), generator=random("augment")).double()
    moved = move(shown, moves(strength, drawn[:, :MOVES]), "mean")
    expected = warp(moved, of_affine(strength, drawn[:, MOVES + 4 :], size), "mean")
    found = warp(shown, draw_warps(strength, 16, size, random), "mean")
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)
    assert (found - shown).abs().max() > 0.1


def test_maps_compose_as_functions_do() -> None:
    outer, inner = uniform(5, 6).double(), uniform(5, 6, seed=2).double()
    points = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64).view(3, 1)
    one, other = outer.view(5, 2, 3), inner.view(5, 2, 3)
    between = torch.cat([other @ points, torch.ones(5, 1, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(compose(outer, inner).view(5, 2, 3) @ points, one @ between)


TRIVIAL: dict[str, Any] = {  # as torchvision's TrivialAugmentWide calls them
    "identity": lambda shown, m: shown,
    "shear_x": lambda shown, m: sheared(shown, [math.degrees(math.atan(0.99 * m)), 0.0]),
    "shear_y": lambda shown, m: sheared(shown, [0.0, math.degrees(math.atan(0.99 * m))]),
    "translate_x": lambda shown, m: by_torchvision(shown, across=int(32 * m)),
    "translate_y": lambda shown, m: by_torchvision(shown, down=int(32 * m)),
    "rotate": lambda shown, m: vision.rotate(shown, 135 * m, interpolation=BILINEAR),
    "contrast": lambda shown, m: shown,
}


def sheared(shown: Tensor, degrees: list[float]) -> Tensor:
    return vision.affine(shown, 0.0, [0, 0], 1.0, degrees, interpolation=BILINEAR, center=[0, 0])


@pytest.mark.parametrize("amount", [7 / 30, -11 / 30, 1.0])
@pytest.mark.parametrize("name", TRIVIAL)
def test_trivial_augment_moves_pixels_as_torchvision_does(name: str, amount: float) -> None:
    shown = images(1, (34, 40)).double()
    operation = torch.tensor([trivial.OPERATIONS.index(name)])
    maps = of_trivial(trivial.Chosen(operation=operation, amount=torch.tensor([amount], dtype=torch.float64)), (34, 40))
    torch.testing.assert_close(warp(shown, maps, "mean"), TRIVIAL[name](shown, amount), **NEAR)


@pytest.mark.parametrize("fill", PADS)
def test_beyond_the_border_is_the_mean_the_edge_or_a_mirror(fill: Fill) -> None:
    shown, moved = images(8), torch.tensor([[2.0, -3.0, 0, 0]]).expand(8, -1)
    torch.testing.assert_close(warp(shown, of_moves(moved).float(), fill), move(shown, moved, fill), **NEAR)


@pytest.mark.parametrize("fill", PADS)
def test_no_image_depends_on_the_others_in_the_call(fill: Fill) -> None:
    """No image depends on the others in the call and one that stays is the very same."""
    maps = draw_warps(Strength(rotation=30.0, scale=0.2, crop=1, trivial_augment=1.0), 64, (7, 9), random)
    maps[::3] = torch.tensor([1.0, 0, 0, 0, 1, 0])
    whole = warp(images(), maps, fill)
    assert torch.equal(whole[::3], images()[::3])
    assert not torch.equal(whole[1], images()[1])
    for first, last in ((0, 1), (4, 5), (5, 9), (3, 20)):
        assert torch.equal(whole[first:last], warp(images()[first:last], maps[first:last], fill))
