"""What becomes of each image of a run's epoch: drawn at its start for all of them, on the CPU, so that a step only applies it.

Everything drawn is the run's own: it depends on its strengths and its random numbers, and on nothing else in the call that it
is applied in. What a run does not ask for is neither drawn nor applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from hpo.data.augment import colour, erasing, geometry, trivial
from hpo.data.augment.mixing import Mixing, draw_mixing
from hpo.data.augment.random import Random, Size
from hpo.data.augment.strength import Fill, Strength
from hpo.data.augment.tone import Tone


@dataclass(frozen=True, kw_only=True)
class Company:
    """What the images of a call have in common."""

    strengths: Sequence[Strength]  # of their runs
    tone: Tone

    def asks_for(self, name: str) -> bool:
        """Whether any run asks for the change of this name."""
        return any(getattr(strength, name) for strength in self.strengths)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pass over images: what is drawn for each, and how that is applied."""

    draw: Callable[[Strength, int, Size, Random], Tensor]  # for so many images of one size: [count, numbers]
    apply: Callable[[Tensor, Tensor, Company], Tensor]  # to images [N, C, H, W] what was drawn for them [N, numbers]


def _move(fill: Fill) -> Stage:
    return Stage(
        draw=lambda strength, count, _, random: geometry.draw_moves(strength, count, random),
        apply=lambda images, drawn, _: geometry.move(images, drawn, fill),
    )


def _warp(fill: Fill) -> Stage:
    return Stage(draw=geometry.draw_warps, apply=lambda images, drawn, _: geometry.warp(images, drawn, fill))


STAGES: dict[str, Stage] = {  # in the order in which they are applied
    **{f"move, {fill}": _move(fill) for fill in get_args(Fill)},
    **{f"warp, {fill}": _warp(fill) for fill in get_args(Fill)},
    "colour": Stage(
        draw=lambda strength, count, _, random: colour.draw_jitter(strength, count, random),
        apply=lambda images, drawn, of: colour.jitter(images, drawn, filter(of.asks_for, colour.JITTERS), of.tone),
    ),
    "trivial": Stage(
        draw=lambda strength, count, _, random: trivial.draw_tones(strength, count, random),
        apply=lambda images, drawn, of: trivial.retone(images, drawn, of.tone),
    ),
    "erasing": Stage(draw=erasing.draw_boxes, apply=lambda images, boxes, _: erasing.erase(images, boxes)),
}


def stages(strength: Strength) -> list[str]:
    """Return what a run's images go through."""
    wanted = {
        f"warp, {strength.fill}": strength.warps,
        f"move, {strength.fill}": strength.moves and not strength.warps,  # else composed into one sampling
        "colour": strength.colours,
        "trivial": bool(strength.trivial_augment),
        "erasing": bool(strength.erasing),
    }
    return [name for name, wants in wanted.items() if wants]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What becomes of each image of one run's epoch."""

    strength: Strength
    stages: dict[str, Tensor]  # [steps * batch, numbers]
    mixing: Mixing | None


def draw(strength: Strength, steps: int, batch: int, size: Size, random: Random) -> Drawn | None:
    """Return what becomes of the images of an epoch of so many steps; None if they come out as they are.

    Args:
        random: gives a generator of the CPU for each purpose, fresh whenever it is asked for.
    """
    if strength.is_idle:
        return None
    count = steps * batch
    return Drawn(
        strength=strength,
        stages={name: STAGES[name].draw(strength, count, size, random) for name in stages(strength)},
        mixing=draw_mixing(strength, count, batch, size, random) if strength.mixes else None,
    )
