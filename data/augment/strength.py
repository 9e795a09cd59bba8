"""The strengths of a run's augmentation: the section [augment] of the study file. Each value may be searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fill = Literal["mean", "edge", "reflect"]


@dataclass(frozen=True, kw_only=True)
class Strength:
    """The strengths of an augmentation. `hpo.spec.training.Augment` has the meaning and the bounds of each field."""

    crop: int = 0  # pixels
    fill: Fill = "mean"
    resized_crop: float = 0.0  # share of the area
    resized_crop_ratio: float = 4 / 3
    horizontal_flip: float = 0.0  # probability
    vertical_flip: float = 0.0  # probability
    rotation: float = 0.0  # degrees
    translation: float = 0.0  # share of the side
    scale: float = 0.0  # share
    shear: float = 0.0  # degrees
    brightness: float = 0.0  # share
    contrast: float = 0.0  # share
    saturation: float = 0.0  # share
    hue: float = 0.0  # turns of the colour wheel
    trivial_augment: float = 0.0  # probability
    erasing: float = 0.0  # probability
    erasing_area: float = 0.33  # share of the area
    mixup: float = 0.0  # alpha of a Beta distribution
    cutmix: float = 0.0  # alpha of a Beta distribution
    mix_probability: float = 1.0

    @property
    def moves(self) -> bool:
        """Whether images are moved by whole pixels or flipped."""
        return bool(self.crop or self.horizontal_flip or self.vertical_flip)

    @property
    def warps(self) -> bool:
        """Whether images are resampled by an affine map."""
        affine = self.resized_crop or self.rotation or self.translation or self.scale or self.shear
        return bool(affine or self.trivial_augment)

    @property
    def colours(self) -> bool:
        """Whether colours are jittered."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of their batch and so have two labels."""
        return bool((self.mixup or self.cutmix) and self.mix_probability)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is changed."""
        return not (self.moves or self.warps or self.colours or self.erasing or self.mixes)
