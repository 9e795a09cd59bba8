"""Augmentation of whole batches on the device, with separate random numbers for each image.

torchvision's v2 transforms draw once for a whole batch instead. One call augments the batches of many runs, each with
the strength of its run. An image does not depend on the other images in the call, except for its mixing partner from
its own batch.
"""

from __future__ import annotations

from hpo.data.augment.drawn import Drawn, draw
from hpo.data.augment.epoch import Augmentation, MixedLabels
from hpo.data.augment.strength import Strength
from hpo.data.augment.tone import Tone

__all__ = ["Augmentation", "Drawn", "MixedLabels", "Strength", "Tone", "draw"]
