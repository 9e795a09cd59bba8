"""Evaluation of a model on one split, during and after training."""

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

EVALUATION_BATCH = 1024  # images; limits the memory of activations; larger batches are not faster
LOSS_AND_ACCURACY = ("loss", "accuracy")


def batch_size(accumulation: int) -> int:
    """Return the batch size of validation for a model that is trained in `accumulation` micro-batches."""
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
    """Return mean loss, accuracy and further metrics of a split by name. The model is left in eval mode.

    Args:
        mean: mean of each channel in raw pixel values [C].
        std: standard deviation of each channel in raw pixel values [C].
        precision: number type of the forward pass.
        accumulation: as in training; batches of validation are smaller by this factor.
        loss: maps logits [B, classes] and labels [B] to losses [B].
        metrics: names of further metrics.
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
    """Return mean loss and accuracy as a float64 tensor [2] on the device.

    Call it under `no_grad`, not under `inference_mode`: tensors that a user's model caches there could not be used in
    training again.

    Args:
        batch: images per batch.
        laid_out: lays out images in memory.
        loss_of: maps logits [B, classes] and labels [B] to losses [B].
        logits_too: gets the logits [B, classes] of each batch appended, if given.
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
