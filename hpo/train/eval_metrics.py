"""Further validation metrics by torchmetrics. Each is a function of probabilities and labels.

torchmetrics is imported when the first one is computed, since its import takes longer than torch's.
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
BINS = 15  # bins of the calibration error, of equal width


def macro_f1(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the unweighted mean of the F1 scores of all classes that occur or are predicted."""
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    return classification.multiclass_f1_score(probabilities, labels, classes, average="macro", validate_args=False)


def auroc(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the area under the receiver operating characteristic, one class against the rest, averaged over the classes.

    Classes that do not occur are left out. NaN if fewer than two classes occur.
    """
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    areas = classification.multiclass_auroc(probabilities, labels, classes, average="none", validate_args=False)
    count = torch.bincount(labels, minlength=classes)
    return areas[(count > 0) & (count < len(labels))].mean()  # torchmetrics' own mean takes the others as 0


def calibration_error(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the expected calibration error in 15 bins: mean gap between confidence and accuracy (Guo et al., 2017)."""
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    return classification.multiclass_calibration_error(
        probabilities, labels, classes, n_bins=BINS, norm="l1", validate_args=False
    )


def top_k(k: int) -> Measure:
    """Return the measure of the share of images whose label is among the k most probable classes."""

    def measure(probabilities: Tensor, labels: Tensor) -> Tensor:
        from torchmetrics.functional import classification

        return classification.multiclass_accuracy(
            probabilities, labels, probabilities.shape[1], average="micro", top_k=k, validate_args=False
        )

    return measure


MEASURES: dict[str, Measure] = {"macro_f1": macro_f1, "auroc": auroc, "calibration_error": calibration_error}


def compute(names: Sequence[str], logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return metrics by name. All are NaN if a probability is not finite.

    Args:
        names: keys of MEASURES, or names such as top_5.
        logits: [N, classes]; softmax in float64 makes them probabilities.
        labels: integers [N].
    """
    if not names:
        return {}
    probabilities = logits.double().softmax(1)
    if not torch.isfinite(probabilities).all():
        return dict.fromkeys(names, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # warns of classes that do not occur
        found = torch.stack([_measure(name)(probabilities, labels).double() for name in names])
    return dict(zip(names, found.tolist(), strict=True))


def _measure(name: str) -> Measure:
    match = TOP_K.fullmatch(name)
    return top_k(int(match[1])) if match else MEASURES[name]


def check(names: Sequence[str], classes: int) -> None:
    """Raise SpecError for a metric that is the same for every model with this number of classes."""
    for name in names:
        match = TOP_K.fullmatch(name)
        if match and int(match[1]) >= classes:
            raise SpecError(
                f"{name}: is 1 for every model, since the data has {classes} classes; use a K below {classes} or remove it"
            )
