"""scikit-learn's handwritten digits: real images without a download."""

from __future__ import annotations

import numpy as np
import torch

from hpo.data.source import Source


def digits() -> Source:
    """Return 1797 images [1, 8, 8] in ten classes (Alpaydin & Kaynak 1998). Pixels are 0 to 16. There is no test split."""
    # Imported here since it takes a second, which other sources do not need.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Source(
        images=torch.from_numpy(images.astype(np.uint8)).view(-1, 1, 8, 8),
        labels=torch.from_numpy(labels.astype(np.int64)),
        num_classes=10,
    )
