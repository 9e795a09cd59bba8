"""Metrics of the validation part beside loss and accuracy, by torchmetrics: each a function of probabilities and labels.

torchmetrics is imported when the first one is computed: that takes longer than torch itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpo.errors import SpecError
from hpo.spec.metrics import TOP_K

Measure = Callable[[Tensor, Tensor], Tensor]  # probabilities [N, classes], labels [N] -> a number
BINS = 15  # of the calibration error, equally wide


def macro_f1(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the classes' F1 scores, each class counting the same; a class that neither occurs nor is predicted
    is left out.
    """
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    return classification.multiclass_f1_score(probabilities, labels, classes, average="macro", validate_args=False)


def auroc(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the classes' areas under the receiver operating characteristic, one class against the rest; a class
    that does not occur is left out. Not a number if fewer than two do.
    """
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    areas = classification.multiclass_auroc(probabilities, labels, classes, average="none", validate_args=False)
    count = torch.bincount(labels, minlength=classes)
    return areas[(count > 0) & (count < len(labels))].mean()  # torchmetrics' own mean counts the others as 0


def calibration_error(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the expected calibration error: the gap between confidence and accuracy, mean over images, in 15 bins
    (Guo et al., 2017).
    """
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    return classification.multiclass_calibration_error(
        probabilities, labels, classes, n_bins=BINS, norm="l1", validate_args=False
    )


def top_k(k: int) -> Measure:
    """Return the share of images whose label is among the k most probable classes."""

    def measure(probabilities: Tensor, labels: Tensor) -> Tensor:
        from torchmetrics.functional import classification

        return classification.multiclass_accuracy(
            probabilities, labels, probabilities.shape[1], average="micro", top_k=k, validate_args=False
        )

    return measure


MEASURES: dict[str, Measure] = {"macro_f1": macro_f1, "auroc": auroc, "calibration_error": calibration_error}


def compute(names: Sequence[str], logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return metrics by name.

    Args:
        logits: [N, classes], of which probabilities are made by softmax, in float64.
        labels: [N], integers.

    All are not-a-number where some logit is not finite.
    """
    if not names:
        return {}
    probabilities = logits.double().softmax(1)
    if not torch.isfinite(probabilities).all():
        return dict.fromkeys(names, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class that does not occur
        found = torch.stack([_measure(name)(probabilities, labels).double() for name in names])
    return dict(zip(names, found.tolist(), strict=True))


def _measure(name: str) -> Measure:
    match = TOP_K.fullmatch(name)
    return top_k(int(match[1])) if match else MEASURES[name]


def check(names: Sequence[str], classes: int) -> None:
    """Raise SpecError for a metric that says nothing of so many classes."""
    for name in names:
        match = TOP_K.fullmatch(name)
        if match and int(match[1]) >= classes:
            raise SpecError(
                f"{name}: is 1 for every model, the data has {classes} classes; use a K below {classes} or remove it"
            )
