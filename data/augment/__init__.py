"""Augmentation of whole batches on the device, with draws of its own for every image.

(torchvision's v2 transforms, given a batch, draw once for all of it.) One call augments the batches of many runs, each as
strongly as that run wants, and no image depends on what else is in the call but for the partner that it may be mixed with,
from its own batch.
"""

from __future__ import annotations

from data.augment.drawn import Drawn, draw
from data.augment.epoch import Augmentation, MixedLabels
from data.augment.strength import Strength
from data.augment.tone import Tone

__all__ = ["Augmentation", "Drawn", "MixedLabels", "Strength", "Tone", "draw"]
