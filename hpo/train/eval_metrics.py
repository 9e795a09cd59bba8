"""Further validation metrics by torchmetrics, by task and name.

Those of classes and labels are functions of probabilities and targets. Those of a regression are functions of predictions
and targets, both in the units of the data. With several targets each is the mean over the targets.

torchmetrics is imported when the first one is computed, since its import takes longer than torch's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hpo.data import Task
from hpo.errors import SpecError
from hpo.spec import metrics
from hpo.spec.metrics import TOP_K

Measure = Callable[[Tensor, Tensor], Tensor]  # probabilities or predictions, and targets -> a number
BINS = 15  # bins of the calibration error, of equal width

# --- classes: probabilities [N, classes], targets int64 [N] ---------------------------------------------------------------


def macro_f1(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the unweighted mean of the F1 scores of all classes that occur or are predicted."""
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    return classification.multiclass_f1_score(probabilities, targets, classes, average="macro", validate_args=False)


def micro_f1(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the F1 score over all classes together. With one class for each example it equals the accuracy."""
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    return classification.multiclass_f1_score(probabilities, targets, classes, average="micro", validate_args=False)


def balanced_accuracy(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the mean recall of all classes that occur."""
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    recalls = classification.multiclass_recall(probabilities, targets, classes, average="none", validate_args=False)
    return recalls.double()[torch.bincount(targets, minlength=classes) > 0].mean()


def auroc(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the area under the receiver operating characteristic, one class against the rest, averaged over the classes.

    Classes that do not occur are left out. NaN if fewer than two classes occur.
    """
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    areas = classification.multiclass_auroc(probabilities, targets, classes, average="none", validate_args=False)
    count = torch.bincount(targets, minlength=classes)
    return areas[(count > 0) & (count < len(targets))].mean()  # torchmetrics' own mean takes the others as 0


def average_precision(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the average precision of one class against the rest, averaged over all classes that occur."""
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    found = classification.multiclass_average_precision(
        probabilities, targets, classes, average="none", validate_args=False
    )
    return found[torch.bincount(targets, minlength=classes) > 0].mean()


def calibration_error(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the expected calibration error in 15 bins: mean gap between confidence and accuracy (Guo et al., 2017)."""
    from torchmetrics.functional import classification

    classes = probabilities.shape[1]
    return classification.multiclass_calibration_error(
        probabilities, targets, classes, n_bins=BINS, norm="l1", validate_args=False
    )


def top_k(k: int) -> Measure:
    """Return the measure of the share of examples whose class is among the k most probable ones."""

    def measure(probabilities: Tensor, targets: Tensor) -> Tensor:
        from torchmetrics.functional import classification

        return classification.multiclass_accuracy(
            probabilities, targets, probabilities.shape[1], average="micro", top_k=k, validate_args=False
        )

    return measure


# --- labels: probabilities [N, labels], targets bool [N, labels] ----------------------------------------------------------


def f1_of_labels(average: Literal["macro", "micro"], probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the F1 score of the labels that are set: the mean over the labels (macro), or over all together (micro)."""
    from torchmetrics.functional import classification

    labels = probabilities.shape[1]
    return classification.multilabel_f1_score(
        probabilities, targets.long(), labels, average=average, validate_args=False
    )


def auroc_of_labels(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the mean area over the labels. Those that are set in all examples or in none are left out."""
    from torchmetrics.functional import classification

    labels, count = probabilities.shape[1], targets.sum(0)
    areas = classification.multilabel_auroc(
        probabilities, targets.long(), labels, average="none", validate_args=False
    ).reshape(-1)
    return areas[(count > 0) & (count < len(targets))].mean()


def average_precision_of_labels(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return the mean average precision over the labels that are set in an example at least."""
    from torchmetrics.functional import classification

    labels = probabilities.shape[1]
    found = classification.multilabel_average_precision(
        probabilities, targets.long(), labels, average="none", validate_args=False
    ).reshape(-1)
    return found[targets.any(0)].mean()


def of_two_classes(measure: Measure) -> Measure:
    """Return a measure of classes for a binary task, whose classes are "no" and "yes"."""

    def of_binary(probabilities: Tensor, targets: Tensor) -> Tensor:
        return measure(torch.cat([1 - probabilities, probabilities], 1), targets[:, 0].long())

    return of_binary


# --- numbers: predictions [N, targets] and targets [N, targets], in the units of the data ----------------------------------


def mae(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean absolute error."""
    from torchmetrics.functional import regression

    return regression.mean_absolute_error(predictions, targets)


def rmse(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the root of the mean squared error of each target, averaged over the targets."""
    from torchmetrics.functional import regression

    count = targets.shape[1]
    return regression.mean_squared_error(predictions, targets, squared=False, num_outputs=count).mean()


def r2(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the coefficient of determination, averaged over the targets. NaN for a single example."""
    from torchmetrics.functional import regression

    if len(targets) < 2:
        return torch.tensor(math.nan)
    middle = targets.mean(0)  # torchmetrics subtracts sums of squares, which are large for targets far from 0
    return regression.r2_score(predictions - middle, targets - middle)


def pearson(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return Pearson's correlation of predictions and targets, averaged over the targets. NaN where one is constant."""
    from torchmetrics.functional import regression

    if len(targets) < 2:
        return torch.tensor(math.nan)
    return regression.pearson_corrcoef(predictions, targets).mean()


OF_CLASSES: dict[str, Measure] = {
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "balanced_accuracy": balanced_accuracy,
    "auroc": auroc,
    "average_precision": average_precision,
    "calibration_error": calibration_error,
}
OF_LABELS: dict[str, Measure] = {
    "macro_f1": partial(f1_of_labels, "macro"),
    "micro_f1": partial(f1_of_labels, "micro"),
    "auroc": auroc_of_labels,
    "average_precision": average_precision_of_labels,
}
OF_BINARY: dict[str, Measure] = {
    "f1": partial(f1_of_labels, "micro"),  # there is one label
    "auroc": auroc_of_labels,
    "average_precision": average_precision_of_labels,
    "macro_f1": of_two_classes(macro_f1),
    "balanced_accuracy": of_two_classes(balanced_accuracy),
    "calibration_error": of_two_classes(calibration_error),
}
OF_NUMBERS: dict[str, Measure] = {"mae": mae, "rmse": rmse, "r2": r2, "pearson": pearson}
MEASURES: dict[Task, dict[str, Measure]] = {
    "classification": OF_CLASSES,
    "binary": OF_BINARY,
    "multilabel": OF_LABELS,
    "regression": OF_NUMBERS,
}


def load() -> None:
    """Load torchmetrics, which the first metric would load, so that no epoch's time includes it."""
    import torchmetrics.functional  # noqa: F401


LOG_LOSS = "log_loss"  # computed from outputs: a probability may be too small for its logarithm


def compute(names: Sequence[str], outputs: Tensor, targets: Tensor, task: Task) -> dict[str, float]:
    """Return metrics by name, computed in float64. All are NaN if a probability or prediction is not finite.

    Args:
        names: names of metrics that go with the task.
        outputs: a model's outputs [N, O], or the predictions [N, T] of a regression in the units of the data.
        targets: int64 [N], bool [N, L], or numbers [N, T] in the units of the data.
        task: the task of the data.
    """
    if not names:
        return {}
    outputs = outputs.double().contiguous()  # torchmetrics takes views of it
    judged = _judged(outputs, task)
    if not torch.isfinite(judged).all():
        return dict.fromkeys(names, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # warns of classes that do not occur
        found = [
            log_loss(outputs, targets) if name == LOG_LOSS else _measure(name, task)(judged, targets) for name in names
        ]
    return dict(zip(names, torch.stack([one.double().to(judged.device) for one in found]).tolist(), strict=True))


def _judged(outputs: Tensor, task: Task) -> Tensor:
    """Return probabilities, or the predictions of a regression."""
    if task == "classification":
        return outputs.softmax(1)
    return outputs if task == "regression" else outputs.sigmoid()


def log_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative logarithm of the probability of what is true, in nats."""
    if targets.dtype == torch.int64:
        return F.cross_entropy(outputs, targets)
    return F.binary_cross_entropy_with_logits(outputs, targets.double())


def _measure(name: str, task: Task) -> Measure:
    match = TOP_K.fullmatch(name)
    return top_k(int(match[1])) if match else MEASURES[task][name]


def check(path: str, names: Iterable[str], task: Task, classes: int) -> None:
    """Raise SpecError for a metric that does not go with the task, or is the same for every model with so many classes.

    Args:
        path: where a study file names the metrics.
        names: names of known metrics.
        task: the task of the data.
        classes: number of classes.
    """
    for name in names:
        if not metrics.goes_with(name, task):
            goes = ", ".join(metrics.for_task(task))
            raise SpecError(f'{path} = "{name}": does not go with the task of the data, {task}; take one of {goes}')
        match = TOP_K.fullmatch(name)
        if match and int(match[1]) >= classes:
            raise SpecError(
                f'{path} = "{name}": is 1 for every model, since the data has {classes} classes; use a K below {classes} '
                "or remove it"
            )
