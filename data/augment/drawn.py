"""The changes of all images of a run's epoch, drawn at its start on the CPU, so that a step only applies them.

They depend only on the run's strengths and random numbers, not on other runs in the same call. Changes that a run does
not use are neither drawn nor applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from hpo.data.augment import colour, erasing, geometry, trivial
from hpo.data.augment.mixing import Mixing, draw_mixing
from hpo.data.augment.random import Random, Size
from hpo.data.augment.strength import Fill, Strength
from hpo.data.augment.tone import Tone

Rows = Mapping[str, Tensor]  # by name: rows of images


@dataclass(frozen=True, kw_only=True)
class Company:
    """What the images of a call have in common."""

    strengths: Sequence[Strength]  # one for each run
    tone: Tone

    def asks_for(self, name: str) -> bool:
        """Return whether any run has a strength above 0 in this field."""
        return any(getattr(strength, name) for strength in self.strengths)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pass over images: how its numbers are drawn, and how they are applied."""

    draw: Callable[[Strength, int, Size, Random], Tensor]  # numbers for `count` images of one size: [count, numbers]
    apply: Callable[
        [Tensor, Tensor, Company, Rows], Tensor
    ]  # images [N, C, H, W], numbers [N, numbers], rows -> images
    rows: Callable[[Tensor], Rows] = lambda _: {}  # finds images that are treated alike from numbers [N, numbers]


def _move(fill: Fill) -> Stage:
    return Stage(
        draw=lambda strength, count, _, random: geometry.draw_moves(strength, count, random),
        apply=lambda images, drawn, *_: geometry.move(images, drawn, fill),
    )


def _warp(fill: Fill) -> Stage:
    return Stage(draw=geometry.draw_warps, apply=lambda images, drawn, *_: geometry.warp(images, drawn, fill))


STAGES: dict[str, Stage] = {  # in the order in which they are applied
    **{f"move, {fill}": _move(fill) for fill in get_args(Fill)},
    **{f"warp, {fill}": _warp(fill) for fill in get_args(Fill)},
    "colour": Stage(
        draw=lambda strength, count, _, random: colour.draw_jitter(strength, count, random),
        apply=lambda images, drawn, of, _: colour.jitter(images, drawn, filter(of.asks_for, colour.JITTERS), of.tone),
    ),
    "trivial": Stage(
        draw=lambda strength, count, _, random: trivial.draw_tones(strength, count, random),
        apply=lambda images, drawn, of, rows: trivial.retone(images, drawn, of.tone, rows),
        rows=trivial.rows_by_tone,
    ),
    "erasing": Stage(draw=erasing.draw_boxes, apply=lambda images, boxes, *_: erasing.erase(images, boxes)),
}


def stages(strength: Strength) -> list[str]:
    """Return the names of the stages that a run uses."""
    wanted = {
        f"warp, {strength.fill}": strength.warps,
        f"move, {strength.fill}": strength.moves and not strength.warps,  # a warp includes the moves
        "colour": strength.colours,
        "trivial": bool(strength.trivial_augment),
        "erasing": bool(strength.erasing),
    }
    return [name for name, wants in wanted.items() if wants]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The drawn changes of all images of one run's epoch."""

    strength: Strength
    stages: dict[str, Tensor]  # [steps * batch, numbers]
    mixing: Mixing | None


def draw(strength: Strength, steps: int, batch: int, size: Size, random: Random) -> Drawn | None:
    """Return the changes of the images of an epoch; None if nothing is changed.

    Args:
        steps: batches in the epoch.
        batch: images per batch.
        random: returns a fresh CPU generator for a purpose.
    """
    if strength.is_idle:
        return None
    count = steps * batch
    return Drawn(
        strength=strength,
        stages={name: STAGES[name].draw(strength, count, size, random) for name in stages(strength)},
        mixing=draw_mixing(strength, count, batch, size, random) if strength.mixes else None,
    )
