"""How good a model is on one part of the data, while it is trained and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpo.data import Split
from hpo.train import eval_metrics
from hpo.train.optim import losses
from hpo.train.optim.losses import Loss
from hpo.train.pixels import Layout, Pixels, layout_of, pixels
from hpo.train.precision import Precision, autocasting, number_type

EVALUATION_BATCH = 1024  # images; bounds the memory that activations take, and no longer matters for speed
LOSS_AND_ACCURACY = ("loss", "accuracy")


def batch_size(accumulation: int) -> int:
    """Return how many images are shown at once to a model that is trained in so many micro-batches."""
    return max(1, EVALUATION_BATCH // accumulation)


@torch.no_grad()
def assess(
    model: nn.Module,
    split: Split,
    *,
    mean: Tensor,
    std: Tensor,
    precision: Precision = "float32",
    accumulation: int = 1,
    loss: Loss = losses.CROSS_ENTROPY,
    metrics: Sequence[str] = (),
) -> dict[str, float]:
    """Return mean loss, accuracy and further metrics by name over one part, in batches as small as a run's with this
    accumulation; the model is left in eval mode.
    """
    images = pixels(split.images, mean, std, number_type(model))
    logits: list[Tensor] | None = [] if metrics else None
    size, laid_out = batch_size(accumulation), layout_of(model, images)
    totals = measure(model, images, split.labels, precision, size, laid_out, loss, logits)
    found = dict(zip(LOSS_AND_ACCURACY, totals.tolist(), strict=True))
    return found | (eval_metrics.compute(metrics, torch.cat(logits), split.labels) if logits else {})


def measure(
    model: nn.Module,
    images: Pixels,
    labels: Tensor,
    precision: Precision,
    batch: int,
    laid_out: Layout,
    loss_of: Loss,
    logits_too: list[Tensor] | None = None,
) -> Tensor:
    """Return mean loss and accuracy as a float64 tensor [2] on the device; call under `no_grad`.

    Args:
        logits_too: takes each batch's logits [B, classes], if it is given.

    Not under `inference_mode`: tensors that a user's model caches there could never be trained through again.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=labels.device)
    for x, y in zip(images.split(batch), torch.split(labels, batch), strict=True):
        with autocasting(y.device, precision):
            logits = model(laid_out(x))
            loss = losses.reduced(loss_of, logits, y, "sum")
        totals += torch.stack([loss.double(), (logits.argmax(1) == y).sum().double()])
        if logits_too is not None:
            logits_too.append(logits)
    return totals / len(labels)
