"""Evaluation of a model on one split, during and after training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpo.data import Split, Splits
from hpo.train import eval_metrics
from hpo.train.inputs import Layout, PreparedInputs, in_units, layout_of, prepared
from hpo.train.optim import losses
from hpo.train.optim.losses import Loss
from hpo.train.precision import Precision, autocasting, number_type

EVALUATION_BATCH = 1024  # rows; limits the memory of activations; larger batches are not faster
LOSS_AND_ACCURACY = ("loss", "accuracy")


def batch_size(accumulation: int) -> int:
    """Return the batch size of validation for a model that is trained in `accumulation` micro-batches."""
    return max(1, EVALUATION_BATCH // accumulation)


@torch.no_grad()
def assess(
    model: nn.Module,
    split: Split,
    *,
    splits: Splits,
    precision: Precision = "float32",
    accumulation: int = 1,
    loss: Loss = losses.CROSS_ENTROPY,
    metrics: Sequence[str] = (),
) -> dict[str, float]:
    """Return mean loss, accuracy (not of a regression) and further metrics of a split by name.

    The model is left in eval mode.

    Args:
        splits: the splits by whose training part inputs and targets are standardised.
        precision: number type of the forward pass.
        accumulation: as in training; batches of validation are smaller by this factor.
        loss: maps outputs [B, O] and targets [B, ...] to losses [B].
        metrics: names of further metrics.
    """
    inputs = prepared(split, splits, number_type(model))
    outputs: list[Tensor] | None = [] if metrics else None
    size, laid_out = batch_size(accumulation), layout_of(model, inputs)
    totals = measure(model, inputs, split.targets, precision, size, laid_out, loss, outputs)
    found = dict(zip(LOSS_AND_ACCURACY, totals.tolist(), strict=True))
    if splits.task == "regression":
        del found["accuracy"]
    if not outputs:
        return found
    values = in_units(torch.cat(outputs), splits), in_units(split.targets, splits)
    return found | eval_metrics.compute(metrics, *values, splits.task)


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return which targets the outputs hit, float64 [N, ...]: the class, or the share of a row's labels. NaN for numbers.

    Args:
        outputs: [N, O, ...].
        targets: int64 [N, ...] or bool [N, L, ...]; float [N, T, ...] of a regression.
    """
    if targets.dtype == torch.int64:
        return (outputs.argmax(1) == targets).double()
    if targets.dtype == torch.bool:
        return ((outputs > 0) == targets).double().mean(1)
    return torch.full_like(targets[:, 0], torch.nan, dtype=torch.float64)


def measure(
    model: nn.Module,
    inputs: PreparedInputs,
    targets: Tensor,
    precision: Precision,
    batch: int,
    laid_out: Layout,
    loss_of: Loss,
    outputs_too: list[Tensor] | None = None,
) -> Tensor:
    """Return mean loss and accuracy as a float64 tensor [2] on the device.

    Call it under `no_grad`, not under `inference_mode`: tensors that a user's model caches there could not be used in
    training again.

    Args:
        batch: rows per batch.
        laid_out: lays out inputs in memory.
        loss_of: maps outputs [B, O] and targets [B, ...] to losses [B].
        outputs_too: gets the outputs [B, O] of each batch appended, if given.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=targets.device)
    for x, y in zip(inputs.split(batch), torch.split(targets, batch), strict=True):
        with autocasting(y.device, precision):
            outputs = model(laid_out(x))
            loss = losses.reduced(loss_of, outputs, y, "sum")
        totals += torch.stack([loss.double(), right(outputs, y).sum()])
        if outputs_too is not None:
            outputs_too.append(outputs)
    return totals / len(targets)
