"""Losses are torch's own, image by image, alone and for K runs at once."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo.data import MixedLabels
from hpo.train.optim import losses
from hpo.train.optim.losses import LOSSES, KnownLoss, Loss, RowLosses

CLASSES, IMAGES = 4, 6
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


def hot(smoothing: float) -> Tensor:
    return F.one_hot(LABELS, CLASSES).double() * (1 - smoothing) + smoothing / CLASSES


REFERENCES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "cross_entropy": ("cross_entropy", {}, lambda x, s: F.cross_entropy(x, LABELS, label_smoothing=s)),
    "cross_entropy on targets": ("cross_entropy", {}, lambda x, s: F.cross_entropy(x, hot(s))),
    "bce": ("bce_with_logits", {}, lambda x, s: F.binary_cross_entropy_with_logits(x, hot(s))),
    "mse": ("mse", {}, lambda x, s: F.mse_loss(F.softmax(x, 1), hot(s))),
    "mse of logits": ("mse", {"of": "logits"}, lambda x, s: F.mse_loss(x, hot(s))),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_batch_s_mean_is_torch_s_own_with_its_gradient(name: str, smoothing: float) -> None:
    kind, options, reference = REFERENCES[name]
    loss = LOSSES[kind](label_smoothing=smoothing, **options)
    logits, again, third = (draw(IMAGES, CLASSES).requires_grad_() for _ in range(3))
    found, expected = loss(logits, LABELS), reference(again, smoothing)
    assert found.shape == (IMAGES,)
    torch.testing.assert_close(found.mean(), expected, rtol=1e-12, atol=1e-14)
    found.mean().backward()
    expected.backward()
    losses.reduced(loss, third, LABELS, "mean").backward()
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(third.grad, again.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(losses.reduced(loss, logits, LABELS, "sum"), expected * IMAGES, rtol=1e-12, atol=0)


def test_every_loss_has_a_reference_here() -> None:
    assert {kind for kind, _, _ in REFERENCES.values()} == LOSSES.keys()


@pytest.mark.parametrize("kind", LOSSES)
def test_validation_judges_without_smoothing(kind: str) -> None:
    smoothed, plain, logits = LOSSES[kind](label_smoothing=0.3), LOSSES[kind](), draw(IMAGES, CLASSES)
    assert torch.equal(losses.judging(smoothed)(logits, LABELS), plain(logits, LABELS))
    assert not torch.equal(smoothed(logits, LABELS), plain(logits, LABELS))


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_short_numbers_are_taken_in_long_ones(kind: str) -> None:
    logits = draw(IMAGES, CLASSES).bfloat16()
    assert torch.equal(LOSSES[kind]()(logits, LABELS), LOSSES[kind]()(logits.float(), LABELS))


class Focal(nn.Module):
    """A user's own (Lin et al. 2017)."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logs = F.log_softmax(logits, 1).gather(1, labels[:, None]).squeeze(1)
        return -((1 - logs.exp()) ** 2) * logs


MANY: dict[str, list[Loss]] = {
    "one kind": [losses.cross_entropy()] * 3,
    "smoothings": [losses.cross_entropy(label_smoothing=s) for s in (0.0, 0.3, 0.1)],
    "all kinds": [
        losses.mse(of="logits"),
        losses.cross_entropy(label_smoothing=0.2),
        losses.bce_with_logits(),
        losses.mse(label_smoothing=0.1),
        losses.cross_entropy(),
        losses.bce_with_logits(label_smoothing=0.4),
    ],
    "own": [Focal(), Focal()],
    "torch's": [nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)],
}


@pytest.mark.parametrize("name", MANY)
def test_losses_of_k_runs_are_each_run_s_own(name: str) -> None:
    functions, filling = MANY[name], 2
    logits = draw(len(functions), CLASSES, IMAGES + filling).requires_grad_()
    labels = torch.stack([LABELS.roll(row) for row in range(len(functions))])
    found = RowLosses(functions, CPU)(logits, labels, filling)
    assert torch.equal(found[:, IMAGES:], torch.zeros(len(functions), filling, dtype=torch.float64))
    found.sum().backward()
    assert logits.grad is not None
    for row, function in enumerate(functions):
        alone = logits[row, :, :IMAGES].t().detach().requires_grad_()
        expected = function(alone, labels[row, :IMAGES])
        expected.sum().backward()
        torch.testing.assert_close(found[row, :IMAGES], expected, rtol=1e-12, atol=1e-14)
        assert alone.grad is not None
        torch.testing.assert_close(logits.grad[row, :, :IMAGES].t(), alone.grad, rtol=1e-12, atol=1e-14)
        assert not logits.grad[row, :, IMAGES:].any()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e308])
def test_a_run_gone_wrong_reaches_no_other_loss(number: float) -> None:
    functions, labels = MANY["all kinds"], LABELS.expand(6, -1)
    for ill in range(len(functions)):
        logits = draw(len(functions), CLASSES, IMAGES)
        expected = RowLosses(functions, CPU)(logits, labels)
        logits[ill] = number
        logits.requires_grad_()
        found = RowLosses(functions, CPU)(logits, labels)
        found.sum().backward()
        assert logits.grad is not None
        others = torch.arange(len(functions)) != ill
        assert torch.equal(found[others], expected[others])
        assert logits.grad[others].isfinite().all()


class Learning(nn.Module):
    """A loss with something to learn, which no optimizer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(logits, labels, reduction="none")


WRONG: dict[str, tuple[Loss, str]] = {
    "a mean": (nn.CrossEntropyLoss(), r'gave shape \[\] for 2 rows, .* \(reduction = "none"\)'),
    "by class": (lambda logits, labels: logits.square(), r"gave shape \[2, 4\] for 2 rows"),
    "no tensor": (lambda logits, labels: cast(Tensor, 1.0), "gave a float for 2 rows"),
    "learning": (Learning(), "has parameters, but the optimizer"),
    "cut off": (lambda logits, labels: logits.detach().sum(1), "without a gradient to the logits"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_loss_is_told_before_training(name: str) -> None:
    loss, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        losses.try_out(loss, CLASSES, torch.tensor([0, CLASSES - 1]), CPU)


def test_a_stack_tells_losses_of_ones_own_apart_by_name() -> None:
    assert losses.own_kind(losses.mse()) == ""
    assert losses.own_kind(Focal()) == f"{__name__}.Focal"
    assert losses.own_kind(F.cross_entropy) == "torch.nn.functional.cross_entropy"
    assert isinstance(losses.CROSS_ENTROPY, KnownLoss)


@pytest.mark.parametrize("kind", LOSSES)
def test_images_that_are_mixed_have_the_mixture_of_their_labels_losses(kind: str) -> None:
    loss, logits, weight = LOSSES[kind](label_smoothing=0.1), draw(IMAGES, CLASSES), torch.linspace(0, 1, IMAGES)
    mixed = MixedLabels(own=LABELS, partners=LABELS.flip(0), weight=weight)
    expected = weight * loss(logits, LABELS) + (1 - weight) * loss(logits, LABELS.flip(0))
    torch.testing.assert_close(mixed.losses(lambda labels: loss(logits, labels)), expected, rtol=1e-12, atol=0)
    if kind == "cross_entropy":  # which is that of the mixed targets
        targets = weight[:, None] * hot(0.1) + (1 - weight[:, None]) * hot(0.1).flip(0)
        torch.testing.assert_close(expected.mean(), F.cross_entropy(logits, targets), rtol=1e-12, atol=0)
