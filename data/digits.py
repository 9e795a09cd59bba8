"""scikit-learn's handwritten digits: real images without a download."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hpo.data.source import Source

FILE = Path("datasets", "data", "digits.csv.gz")  # in the package scikit-learn


def digits() -> Source:
    """Return 1797 images [1, 8, 8] in ten classes (Alpaydin & Kaynak 1998). Pixels are 0 to 16. There is no test split."""
    images, labels = _in_the_package() or _loaded()
    return Source(
        inputs=torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8),
        targets=torch.from_numpy(labels.astype(np.int64)),
        num_classes=10,
    )


def _in_the_package() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None:
    """Return images [N, 64] and labels [N] from scikit-learn's file, without the second that its import takes.

    None if this version of scikit-learn keeps the file elsewhere.
    """
    package = find_spec("sklearn")
    file = Path(next(iter((package and package.submodule_search_locations) or [""])), FILE)
    if not file.is_file():
        return None
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, np.uint8, delimiter=",")
    return table[:, :-1], table[:, -1]


def _loaded() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)  # type: ignore[no-any-return]
