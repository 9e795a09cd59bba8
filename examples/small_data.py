"""Data sets that scikit-learn ships, as sources of several tasks, and points on its digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor

from hpo.data import Source


def diabetes() -> Source:
    """Return 442 patients with ten measurements, and how far their disease is a year later: regression."""
    inputs, targets = load_diabetes(return_X_y=True)
    return Source(
        inputs=_numbers(inputs),
        targets=torch.from_numpy(targets).float()[:, None],
        task="regression",
        target_names=("progression",),
    )


def wine() -> Source:
    """Return 178 wines with 13 measurements, from three growers: classification."""
    inputs, targets = load_wine(return_X_y=True)
    return Source(inputs=_numbers(inputs), targets=torch.from_numpy(targets).long(), num_classes=3)


def breast_cancer() -> Source:
    """Return 569 tumours with 30 measurements, and whether they are malignant: a yes or no."""
    inputs, targets = load_breast_cancer(return_X_y=True)
    return Source(inputs=_numbers(inputs), targets=torch.from_numpy(targets == 0)[:, None], task="binary")


def keypoints() -> Source:
    """Return 1,797 digits [1, 8, 8], and centre and extent of their ink, in pixels: regression of four numbers."""
    pixels = torch.from_numpy(load_digits(return_X_y=True)[0]).view(-1, 8, 8)
    shares = pixels / pixels.sum((1, 2), keepdim=True)
    places = torch.arange(8, dtype=torch.float64)
    rows, columns = shares.sum(2), shares.sum(1)  # [N, 8]
    row, column = (rows * places).sum(1), (columns * places).sum(1)
    height = ((rows * places.square()).sum(1) - row.square()).sqrt()
    width = ((columns * places.square()).sum(1) - column.square()).sqrt()
    return Source(
        inputs=pixels.to(torch.uint8)[:, None],
        targets=torch.stack([row, column, height, width], 1).float(),
        task="regression",
        target_names=("row", "column", "height", "width"),
    )


def _numbers(values: object) -> dict[str, Tensor]:
    """Return a table that has only columns of numbers."""
    return {"numbers": torch.as_tensor(values).float()}
