"""The data of `mlp-noise.toml`: digits with wrong labels."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Lt

from hpo.data import Source, digits


def noisy_digits(*, share: Annotated[float, Ge(0), Lt(1)]) -> Source:
    """Return scikit-learn's digits. This share of the labels is drawn at random, the right one included."""
    clean = digits()
    generator = torch.Generator().manual_seed(0)
    is_drawn = torch.rand(len(clean.labels), generator=generator) < share
    drawn = torch.randint(clean.num_classes, clean.labels.shape, generator=generator)
    labels = torch.where(is_drawn, drawn, clean.labels)
    return Source(inputs=clean.images, targets=labels, num_classes=clean.num_classes)
