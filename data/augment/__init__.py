"""Augmentation of whole batches on the device, with draws of its own for every image.

(torchvision's v2 transforms, given a batch, draw once for all of it.) One call augments the batches of many runs, each as
strongly as that run wants, and no image depends on what else is in the call but for the partner that it may be mixed with,
from its own batch.
"""

from __future__ import annotations

from hpo.data.augment.drawn import Drawn, draw
from hpo.data.augment.epoch import Augmentation, MixedLabels
from hpo.data.augment.strength import Strength
from hpo.data.augment.tone import Tone

__all__ = ["Augmentation", "Drawn", "MixedLabels", "Strength", "Tone", "draw"]
