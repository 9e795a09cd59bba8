"""Losses are torch's own, image by image, alone and for K runs at once."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from hpo.data import MixedLabels
from hpo.train.optim import losses
from hpo.train.optim.losses import LOSSES, KnownLoss, Loss, RowLosses

CLASSES, ROWS = 4, 6
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
TARGETS: dict[str, Tensor] = {
    "classification": LABELS,
    "binary": torch.tensor([[True], [False], [False], [True], [False], [False]]),
    "multilabel": draw(ROWS, CLASSES, seed=1) > 0.5,
    "regression": draw(ROWS, CLASSES, seed=2),
}
FACTORS = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


def outputs_for(kind: str, task: str) -> int:
    return (1 if task == "binary" else CLASSES) * losses.outputs_per_target(LOSSES[kind]())


def hot(smoothing: float) -> Tensor:
    return F.one_hot(LABELS, CLASSES).double() * (1 - smoothing) + smoothing / CLASSES


def soft(task: str, smoothing: float) -> Tensor:
    return TARGETS[task].double() * (1 - smoothing) + smoothing / 2


Y = TARGETS["regression"]
#: Kind of loss, its options, the task, and torch's own by outputs and label smoothing.
REFERENCES: dict[str, tuple[str, dict[str, Any], str, Any]] = {
    "cross_entropy": (
        "cross_entropy",
        {},
        "classification",
        lambda x, s: F.cross_entropy(x, LABELS, label_smoothing=s),
    ),
    "cross_entropy on targets": ("cross_entropy", {}, "classification", lambda x, s: F.cross_entropy(x, hot(s))),
    "cross_entropy with weights": (
        "cross_entropy",
        {"class_weights": FACTORS.tolist()},
        "classification",
        lambda x, s: F.cross_entropy(x, LABELS, FACTORS, label_smoothing=s, reduction="none").mean(),
    ),
    "bce": ("bce_with_logits", {}, "classification", lambda x, s: F.binary_cross_entropy_with_logits(x, hot(s))),
    "bce with weights": (
        "bce_with_logits",
        {"pos_weight": FACTORS.tolist()},
        "classification",
        lambda x, s: F.binary_cross_entropy_with_logits(x, hot(s), pos_weight=FACTORS),
    ),
    "bce of labels": (
        "bce_with_logits",
        {},
        "multilabel",
        lambda x, s: F.binary_cross_entropy_with_logits(x, soft("multilabel", s)),
    ),
    "bce of one label with weight": (
        "bce_with_logits",
        {"pos_weight": 2.5},
        "binary",
        lambda x, s: F.binary_cross_entropy_with_logits(x, soft("binary", s), pos_weight=torch.tensor(2.5)),
    ),
    "mse": ("mse", {}, "classification", lambda x, s: F.mse_loss(F.softmax(x, 1), hot(s))),
    "mse of logits": ("mse", {"of": "logits"}, "classification", lambda x, s: F.mse_loss(x, hot(s))),
    "mse of a label's logit": (
        "mse",
        {"of": "logits"},
        "binary",
        lambda x, s: F.mse_loss(x, 2 * soft("binary", s) - 1),  # so the decision lies at 0, as for other losses
    ),
    "mse of labels": ("mse", {}, "multilabel", lambda x, s: F.mse_loss(x.sigmoid(), soft("multilabel", s))),
    "mse of numbers": ("mse", {}, "regression", lambda x, s: F.mse_loss(x, Y)),
    "l1": ("l1", {}, "regression", lambda x, s: F.l1_loss(x, Y)),
    "smooth_l1": ("smooth_l1", {"beta": 0.7}, "regression", lambda x, s: F.smooth_l1_loss(x, Y, beta=0.7)),
    "huber": ("huber", {"delta": 2.0}, "regression", lambda x, s: F.huber_loss(x, Y, delta=2.0)),
    "gaussian_nll": (
        "gaussian_nll",
        {},
        "regression",
        lambda x, s: F.gaussian_nll_loss(x[:, :CLASSES], Y, x[:, CLASSES:].exp()),
    ),
}
SMOOTHED = ("cross_entropy", "bce_with_logits", "mse")  # have label smoothing


def make(kind: str, options: dict[str, Any], task: str) -> Loss:
    """Build a loss with its weights, if it wants some, from the targets of the task."""
    targets = TARGETS[task]
    return losses.weighted(LOSSES[kind](**options), targets, CLASSES if targets.ndim == 1 else targets.shape[1])


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_batch_s_mean_is_torch_s_own_with_its_gradient(name: str, smoothing: float) -> None:
    kind, options, task, reference = REFERENCES[name]
    loss = make(kind, options | ({"label_smoothing": smoothing} if kind in SMOOTHED else {}), task)
    size = (ROWS, outputs_for(kind, task))
    outputs, again, third = (draw(*size).requires_grad_() for _ in range(3))
    found, expected = loss(outputs, TARGETS[task]), reference(again, smoothing)
    assert found.shape == (ROWS,)
    torch.testing.assert_close(found.mean(), expected, rtol=1e-12, atol=1e-14)
    found.mean().backward()
    expected.backward()
    losses.reduced(loss, third, TARGETS[task], "mean").backward()
    torch.testing.assert_close(outputs.grad, again.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(third.grad, again.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(losses.reduced(loss, outputs, TARGETS[task], "sum"), expected * ROWS, rtol=1e-12, atol=0)


def test_every_loss_has_a_reference_here_for_every_task() -> None:
    assert {(kind, task) for kind, _, task, _ in REFERENCES.values()} == {
        (kind, task) for kind, tasks in losses.TASKS.items() for task in tasks
    }
    assert losses.TASKS.keys() == LOSSES.keys()
    assert all(task in losses.TASKS[kind] for task, kind in losses.BY_TASK.items())


@pytest.mark.parametrize("kind", SMOOTHED)
def test_validation_judges_without_smoothing(kind: str) -> None:
    smoothed, plain, logits = LOSSES[kind](label_smoothing=0.3), LOSSES[kind](), draw(ROWS, CLASSES)
    assert torch.equal(losses.judging(smoothed)(logits, LABELS), plain(logits, LABELS))
    assert not torch.equal(smoothed(logits, LABELS), plain(logits, LABELS))


@pytest.mark.parametrize(("kind", "option"), [("cross_entropy", "class_weights"), ("bce_with_logits", "pos_weight")])
def test_validation_judges_without_weights(kind: str, option: str) -> None:
    plain, logits = LOSSES[kind](), draw(ROWS, CLASSES)
    weighted = make(kind, {option: "balanced"}, "classification")
    assert torch.equal(losses.judging(weighted)(logits, LABELS), plain(logits, LABELS))
    assert not torch.equal(weighted(logits, LABELS), plain(logits, LABELS))
    assert torch.equal(make(kind, {option: "none"}, "classification")(logits, LABELS), plain(logits, LABELS))


def test_balanced_weights_are_scikit_learn_s() -> None:
    loss = make("cross_entropy", {"class_weights": "balanced"}, "classification")
    assert isinstance(loss, KnownLoss)
    expected = compute_class_weight("balanced", classes=np.arange(CLASSES), y=LABELS.numpy())
    torch.testing.assert_close(loss.weights, torch.from_numpy(expected))
    assert loss.weights is not None
    assert loss.weights[LABELS].mean() == pytest.approx(1.0)


def test_balanced_positives_weigh_as_much_as_negatives() -> None:
    """A label that is always or never set keeps weight 1."""
    targets = torch.tensor([[True, True, False], [False, True, False], [False, True, False], [False, True, False]])
    loss = losses.weighted(LOSSES["bce_with_logits"](pos_weight="balanced"), targets, 3)
    assert isinstance(loss, KnownLoss)
    assert loss.weights is not None
    assert loss.weights.tolist() == [3.0, 1.0, 1.0]


def test_a_class_that_the_training_part_lacks_has_weight_0() -> None:
    loss = losses.weighted(LOSSES["cross_entropy"](class_weights="balanced"), torch.tensor([0, 0, 2]), 3)
    assert isinstance(loss, KnownLoss)
    assert loss.weights is not None
    assert loss.weights.tolist() == [0.75, 0.0, 1.5]


def test_weights_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="3 weights for 4 classes or labels; give one for each"):
        losses.weighted(LOSSES["cross_entropy"](class_weights=[1.0, 2.0, 3.0]), LABELS, CLASSES)


@pytest.mark.parametrize("kind", losses.for_task("regression"))
def test_outputs_of_another_shape_are_not_repeated(kind: str) -> None:
    loss = LOSSES[kind]()
    count = losses.outputs_per_target(loss)
    for outputs in (draw(ROWS, count), draw(ROWS, count * (CLASSES + 1))):
        with pytest.raises(ValueError, match=r"outputs for \[6, 4\] targets; give one for each"):
            loss(outputs, Y)


def test_a_tiny_variance_is_bounded_and_its_gradient_goes_on() -> None:
    outputs = torch.tensor([[0.0, -1000.0], [0.0, 1000.0]], requires_grad=True)
    found = LOSSES["gaussian_nll"]()(outputs, torch.tensor([[0.5], [0.5]]))
    found.sum().backward()
    assert found.isfinite().all()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    assert outputs.grad[0, 1] < 0 < outputs.grad[1, 1]  # the first variance must grow, the second shrink


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_short_numbers_are_taken_in_long_ones(kind: str) -> None:
    task = losses.TASKS[kind][0]
    outputs, targets = draw(ROWS, outputs_for(kind, task)).bfloat16(), TARGETS[task]
    targets = targets.float() if task == "regression" else targets
    assert torch.equal(LOSSES[kind]()(outputs, targets), LOSSES[kind]()(outputs.float(), targets))


class Focal(nn.Module):
    """A user's own (Lin et al. 2017)."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logs = F.log_softmax(logits, 1).gather(1, labels[:, None]).squeeze(1)
        return -((1 - logs.exp()) ** 2) * logs


MANY: dict[str, tuple[str, list[Loss]]] = {
    "one kind": ("classification", [losses.cross_entropy()] * 3),
    "smoothings": ("classification", [losses.cross_entropy(label_smoothing=s) for s in (0.0, 0.3, 0.1)]),
    "all kinds": (
        "classification",
        [
            losses.mse(of="logits"),
            losses.cross_entropy(label_smoothing=0.2),
            losses.bce_with_logits(),
            losses.mse(label_smoothing=0.1),
            losses.cross_entropy(),
            losses.bce_with_logits(label_smoothing=0.4),
        ],
    ),
    "weights": (
        "classification",
        [
            make("cross_entropy", {"class_weights": "balanced"}, "classification"),
            make("cross_entropy", {"class_weights": FACTORS.tolist(), "label_smoothing": 0.2}, "classification"),
            losses.cross_entropy(),
            make("cross_entropy", {"class_weights": FACTORS.tolist()}, "classification"),
            make("bce_with_logits", {"pos_weight": 3.0}, "classification"),
        ],
    ),
    "labels": (
        "multilabel",
        [
            losses.bce_with_logits(),
            losses.mse(),
            make("bce_with_logits", {"pos_weight": "balanced"}, "multilabel"),
            losses.mse(of="logits", label_smoothing=0.1),
        ],
    ),
    "numbers": (
        "regression",
        [losses.mse(), losses.l1(), losses.huber(), losses.smooth_l1(beta=0.2), losses.huber(delta=3.0), losses.mse()],
    ),
    "variances": ("regression", [losses.gaussian_nll()] * 2),
    "own": ("classification", [Focal(), Focal()]),
    "torch's": (
        "classification",
        [nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)],
    ),
    "own of numbers": ("regression", [lambda x, y: (x - y).abs().sum(1)] * 2),
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("filling", [0, 2])
def test_losses_of_k_runs_are_each_run_s_own(name: str, filling: int) -> None:
    task, functions = MANY[name]
    count = 2 * CLASSES if name == "variances" else CLASSES
    outputs = draw(len(functions), count, ROWS + filling).requires_grad_()
    targets = torch.stack([TARGETS[task].roll(row, 0) for row in range(len(functions))])
    found = RowLosses(functions, CPU)(outputs, targets, filling)
    assert torch.equal(found[:, ROWS:], torch.zeros(len(functions), filling, dtype=torch.float64))
    found.sum().backward()
    assert outputs.grad is not None
    for row, function in enumerate(functions):
        alone = outputs[row, :, :ROWS].t().detach().requires_grad_()
        expected = function(alone, targets[row])
        expected.sum().backward()
        torch.testing.assert_close(found[row, :ROWS], expected, rtol=1e-12, atol=1e-14)
        assert alone.grad is not None
        torch.testing.assert_close(outputs.grad[row, :, :ROWS].t(), alone.grad, rtol=1e-12, atol=1e-14)
        assert not outputs.grad[row, :, ROWS:].any()


@pytest.mark.parametrize("name", ["all kinds", "numbers"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e308])
def test_a_run_gone_wrong_reaches_no_other_loss(name: str, number: float) -> None:
    task, functions = MANY[name]
    targets = TARGETS[task].expand(6, *TARGETS[task].shape)
    for ill in range(len(functions)):
        outputs = draw(len(functions), CLASSES, ROWS)
        expected = RowLosses(functions, CPU)(outputs, targets)
        outputs[ill] = number
        outputs.requires_grad_()
        found = RowLosses(functions, CPU)(outputs, targets)
        found.sum().backward()
        assert outputs.grad is not None
        others = torch.arange(len(functions)) != ill
        assert torch.equal(found[others], expected[others])
        assert outputs.grad[others].isfinite().all()


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
    "cut off": (lambda logits, labels: logits.detach().sum(1), "without a gradient to the outputs"),
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


@pytest.mark.parametrize("kind", SMOOTHED)
def test_images_that_are_mixed_have_the_mixture_of_their_labels_losses(kind: str) -> None:
    loss, logits, weight = LOSSES[kind](label_smoothing=0.1), draw(ROWS, CLASSES), torch.linspace(0, 1, ROWS)
    mixed = MixedLabels(own=LABELS, partners=LABELS.flip(0), weight=weight)
    expected = weight * loss(logits, LABELS) + (1 - weight) * loss(logits, LABELS.flip(0))
    torch.testing.assert_close(mixed.losses(lambda labels: loss(logits, labels)), expected, rtol=1e-12, atol=0)
    if kind == "cross_entropy":  # which is that of the mixed targets
        targets = weight[:, None] * hot(0.1) + (1 - weight[:, None]) * hot(0.1).flip(0)
        torch.testing.assert_close(expected.mean(), F.cross_entropy(logits, targets), rtol=1e-12, atol=0)
