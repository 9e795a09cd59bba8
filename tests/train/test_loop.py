from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpo import data
from hpo.data import Splits
from hpo.errors import CheckpointError
from hpo.models import Dropout, cnn, mlp
from hpo.spec.seeds import derive
from hpo.spec.training import Stopping
from hpo.train import checkpoint, inputs, loop, validation
from hpo.train.batches import can_halve, steps_per_epoch
from hpo.train.epoch import EpochResult
from hpo.train.monitors import Watch
from hpo.train.optim import averaging, losses
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.penalties import Penalties
from hpo.train.optim.schedules import constant, cosine, onecycle, plateau
from hpo.train.randomness import initial_model
from hpo.train.run import Run
from hpo.train.validation import assess
from tests.support.stacks import stop_before, timeless

EPOCHS, BATCH = 3, 16
STEPS = 5  # per epoch: 84 training images, the last 4 of each order left out


class Noisy(nn.Module):
    """A user's model, which draws from torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.dropout(x.flatten(1), 0.3, self.training))


def build_mlp() -> nn.Module:
    return mlp((1, 8, 8), 3, widths=[8, 6], dropout=0.3)


def build_cnn() -> nn.Module:
    return cnn((1, 8, 8), 3, channels=[3, 4], dropout=0.3, activation="silu")


def make(
    splits: Splits, build: Callable[[], nn.Module] = build_mlp, kind: str = "adamw", seed: int = 7, **changes: Any
) -> Run:
    model = initial_model(build, seed)
    options: dict[str, Any] = {
        "model": model,
        "optimizer": OPTIMIZERS[kind](model.parameters(), lr=0.01),
        "schedule": cosine(EPOCHS * STEPS),
        "splits": splits,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "seed": seed,
    }
    return Run(**(options | changes))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(run: Run) -> dict[str, Any]:
    return run.state_dict() | {"seconds": 0.0}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mlp adamw": {},
    "cnn sgd cycled": {
        "build": build_cnn,
        "kind": "sgd",
        "schedule": onecycle(EPOCHS * STEPS, cycle_momentum=True),
    },
    "user model rmsprop": {"build": Noisy, "kind": "rmsprop"},
    "mlp adagrad": {"kind": "adagrad", "schedule": constant(1)},
    "mlp muon on a plateau": {"kind": "muon", "schedule": plateau(1, patience=0, threshold=0.5, factor=0.5)},
    "cnn soap": {"build": build_cnn, "kind": "soap"},
    "cnn sharpness-aware": {"build": build_cnn, "sam_rho": 0.1},
    "mlp bfloat16": {"precision": "bfloat16"},
    "cnn in micro-batches": {"build": build_cnn, "accumulation": 2},
    "user model in micro-batches": {"build": Noisy, "accumulation": 3},
    "mlp regularised": {
        "loss": losses.bce_with_logits(label_smoothing=0.1),
        "penalised": Penalties(l1=1e-3, l2=1e-2, max_norm=1.0),
        "averaging": averaging.ema(decay=0.9),
    },
    "mlp mixed": {"loss": losses.mse(label_smoothing=0.1), "augment": data.Strength(mixup=0.5), "accumulation": 2},
    "cnn averaged by step": {"build": build_cnn, "averaging": averaging.ema(decay=0.9, warm_up=False)},
    "cnn averaged by epoch": {"build": build_cnn, "averaging": averaging.swa(start=0.3), "accumulation": 2},
}


BROKEN_BEFORE = [0, 1, 3, STEPS - 1, STEPS, STEPS + 2, 2 * STEPS - 1, 3 * STEPS - 1]  # steps
FEW = (3, STEPS, 2 * STEPS - 1)  # amid an epoch, between two, before the last batch of one


@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(name, step, marks=() if name == "mlp adamw" or step in FEW else pytest.mark.soak)
        for name in CONFIGURATIONS
        for step in BROKEN_BEFORE
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(splits: Splits, tmp_path: Path, name: str, step: int) -> None:
    unbroken = make(splits, **CONFIGURATIONS[name])
    expected = timeless(list(loop.train(unbroken)))

    first = make(splits, **CONFIGURATIONS[name])
    results = list(loop.train(first, stop_before(step)))
    assert len(results) == first.epoch == step // STEPS
    torch.randn(3)  # what happens to the global generator meanwhile is no matter
    digest = checkpoint.save(tmp_path / "run.pt", first.state_dict())

    second = make(splits, **CONFIGURATIONS[name])
    second.load_state_dict(checkpoint.load(tmp_path / "run.pt", digest))
    torch.randn(3)
    results += loop.train(second)
    assert timeless(results) == expected
    assert same(state(second), state(unbroken))


def test_a_state_that_was_loaded_is_not_changed_by_training_on(splits: Splits) -> None:
    first = make(splits)
    next(loop.train(first))
    left = copy.deepcopy(first.state_dict())
    results = []
    for _ in range(2):
        run = make(splits)
        run.load_state_dict(left)
        results.append(timeless(list(loop.train(run))))
    assert results[0] == results[1]
    assert same(left, first.state_dict())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"averaging": averaging.ema()}, "the run has an average of weights, but the state has not"),
        ({"stopping": Stopping(gl=5.0)}, "the run has the curve train_loss, but the state has not"),
        ({"watch": Watch(norms=True)}, "the run has sums of gradients, but the state has not"),
    ],
)
def test_a_state_of_another_configuration_is_refused(splits: Splits, changes: dict[str, Any], said: str) -> None:
    """A state of another configuration is refused before anything of it is taken."""
    first, other = make(splits), make(splits, **changes)
    list(loop.train(first, stop_before(STEPS + 2)))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=f"{said}: their configurations differ; start again from epoch 0"):
        other.load_state_dict(first.state_dict())
    assert same(before, other.state_dict())


def test_a_state_of_another_version_is_told_by_what_it_lacks(splits: Splits) -> None:
    run = make(splits)
    old = {key: value for key, value in run.state_dict().items() if key not in ("executors", "curves")}
    with pytest.raises(CheckpointError, match="the state has no executors, no curves: another version of hpo wrote it"):
        run.load_state_dict(old)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_resumes_amid_an_epoch(splits: Splits, tmp_path: Path) -> None:
    def on_gpu() -> Run:
        part = {
            name: data.Split(inputs=getattr(splits, name).inputs.cuda(), targets=getattr(splits, name).targets.cuda())
            for name in ("train", "validation")
        }
        there = dataclasses.replace(splits, mean=splits.mean.cuda(), std=splits.std.cuda(), **part)
        model = initial_model(Noisy, 7).cuda()
        return make(there, model=model, optimizer=OPTIMIZERS["adamw"](model.parameters(), lr=0.01))

    expected = [result.validation_loss for result in loop.train(on_gpu())]
    first = on_gpu()
    results = list(loop.train(first, stop_before(STEPS + 2)))
    digest = checkpoint.save(tmp_path / "run.pt", first.state_dict())
    second = on_gpu()
    second.load_state_dict(checkpoint.load(tmp_path / "run.pt", digest))
    results += loop.train(second)
    assert [result.validation_loss for result in results] == pytest.approx(expected, rel=1e-4)


def test_a_stopped_run_goes_on_in_place_even_batch_by_batch(splits: Splits) -> None:
    expected = timeless(list(loop.train(make(splits, build=Noisy))))
    run, results = make(splits, build=Noisy), []
    while not run.finished:
        results += loop.train(run, stop_before(1))
        torch.randn(3)
    assert timeless(results) == expected


def test_two_runs_in_turn_do_not_disturb_each_other(splits: Splits) -> None:
    expected = [timeless(list(loop.train(make(splits, build=Noisy, seed=seed)))) for seed in (1, 2)]
    pairs = zip(*(loop.train(make(splits, build=Noisy, seed=seed)) for seed in (1, 2)), strict=True)
    assert [timeless(list(results)) for results in zip(*pairs, strict=True)] == expected


def test_a_run_depends_on_its_seed(splits: Splits) -> None:
    assert timeless(list(loop.train(make(splits)))) == timeless(list(loop.train(make(splits))))
    assert timeless(list(loop.train(make(splits, seed=1)))) != timeless(list(loop.train(make(splits, seed=2))))


def test_a_run_is_what_a_plain_loop_over_the_same_batches_does(splits: Splits) -> None:
    run = make(splits, lambda: mlp((1, 8, 8), 3, widths=[8, 6]))
    results = list(loop.train(run))

    model = initial_model(lambda: mlp((1, 8, 8), 3, widths=[8, 6]), 7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(EPOCHS * STEPS)(step).factor)
    images = (splits.train.inputs.float() - splits.mean) * (1 / splits.std)
    validation = (splits.validation.inputs.float() - splits.mean) * (1 / splits.std)
    for epoch in range(EPOCHS):
        model.train()
        losses = []
        order = torch.randperm(84, generator=torch.Generator().manual_seed(derive(7, "order", epoch)))
        for rows in order.split(BATCH)[:STEPS]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[rows]), splits.train.targets[rows])
            loss.backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            scheduler.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            logits = model(validation)
        assert results[epoch].epoch == epoch + 1
        assert results[epoch].train_loss == pytest.approx(sum(losses) / STEPS, rel=1e-12)
        expected = F.cross_entropy(logits, splits.validation.targets).item()
        assert results[epoch].validation_loss == pytest.approx(expected, rel=1e-6)
        assert results[epoch].validation_accuracy == (logits.argmax(1) == splits.validation.targets).double().mean()
        assert results[epoch].learning_rate == pytest.approx(rate, rel=1e-12)


def test_dropout_draws_from_the_trial_and_not_from_the_global_generator(splits: Splits) -> None:
    run = make(splits)
    list(loop.train(run))
    generator = torch.Generator().manual_seed(derive(7, "global", EPOCHS - 1))
    assert torch.equal(torch.get_rng_state(), generator.get_state())


def test_normalising_batch_by_batch_changes_no_bit(splits: Splits, monkeypatch) -> None:
    expected = timeless(list(loop.train(make(splits))))
    monkeypatch.setattr(inputs, "FLOAT_COPY_BYTES", 0)
    inputs.prepared.cache_clear()
    assert timeless(list(loop.train(make(splits)))) == expected


def test_validation_in_several_batches_covers_every_image_once(splits: Splits, monkeypatch) -> None:
    model = initial_model(build_mlp, 0)
    whole = assess(model, splits.validation, splits=splits)
    monkeypatch.setattr(validation, "EVALUATION_BATCH", 7)
    assert assess(model, splits.validation, splits=splits) == pytest.approx(whole, rel=1e-6)


def test_assessing_gives_what_the_run_reports(splits: Splits) -> None:
    run = make(splits)
    *_, last = loop.train(run)
    found = assess(run.model, splits.validation, splits=splits)
    assert found == {"loss": last.validation_loss, "accuracy": last.validation_accuracy}


def test_a_model_in_float64_is_trained_in_float64(splits: Splits) -> None:
    results = list(loop.train(make(splits, lambda: build_mlp().double())))
    single = list(loop.train(make(splits)))
    assert results[0].train_loss != single[0].train_loss
    assert results[0].train_loss == pytest.approx(single[0].train_loss, rel=1e-4)


def test_bfloat16_keeps_weights_in_float32(splits: Splits) -> None:
    run = make(splits, precision="bfloat16")
    results = list(loop.train(run))
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert results[0].train_loss != next(loop.train(make(splits))).train_loss
    assert math.isfinite(results[-1].validation_loss)


def test_the_last_short_batch_is_dropped_and_a_small_part_is_one_batch() -> None:
    assert [steps_per_epoch(images, 16) for images in (1, 15, 16, 17, 31, 32, 84)] == [1, 1, 1, 1, 1, 2, 5]


def test_a_training_part_smaller_than_a_batch_is_trained_whole(splits: Splits) -> None:
    seen: list[int] = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(len(x))
            return super().forward(x.flatten(1))

    list(loop.train(make(splits, lambda: Counting(64, 3), batch_size=1000)))
    assert seen == [84] * EPOCHS


def test_stop_is_asked_before_every_batch(splits: Splits) -> None:
    asked: list[None] = []
    list(loop.train(make(splits), lambda: asked.append(None) is not None))
    assert len(asked) == EPOCHS * STEPS


def test_a_finished_run_yields_nothing_more(splits: Splits) -> None:
    run = make(splits)
    assert not run.finished
    assert [result.epoch for result in loop.train(run)] == [1, 2, 3]
    assert run.finished
    assert list(loop.train(run)) == []


def test_a_loss_that_is_not_finite_is_reported_and_not_raised(splits: Splits) -> None:
    model = initial_model(build_mlp, 0)
    run = make(splits, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e30))
    results = list(loop.train(run))
    assert len(results) == EPOCHS
    assert not math.isfinite(results[-1].train_loss)
    assert not math.isfinite(results[-1].validation_loss)


def test_the_state_may_be_taken_between_epochs_but_not_within_one(splits: Splits) -> None:
    run = make(splits)
    next(loop.train(run))
    assert run.state_dict()["batch"] == 0

    def stop() -> bool:
        run.state_dict()
        return False

    with pytest.raises(RuntimeError, match=r"within epoch 2.*let `stop` end"):
        list(loop.train(run, stop))


def test_time_spent_before_a_stop_counts(splits: Splits) -> None:
    run = make(splits)
    list(loop.train(run, stop_before(STEPS - 1)))
    spent = run.state_dict()["seconds"]
    assert spent > 0
    assert next(loop.train(run)).seconds > spent
    assert run.state_dict()["seconds"] == 0.0


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Initial weights depend on the seed alone and leave the global generator."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initial_model(build_mlp, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first.state_dict(), initial_model(build_mlp, 5).state_dict())
    assert not same(first.state_dict(), initial_model(build_mlp, 6).state_dict())


def test_initial_models_of_users_get_our_dropout() -> None:
    model = initial_model(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), 0)
    assert type(model[1]) is Dropout


class Recorder(nn.Module):
    """A model without noise or norm, which notes how many images each forward pass takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
        self.taken: dict[bool, list[int]] = {True: [], False: []}  # by whether the model was in train mode

    def forward(self, x: Tensor) -> Tensor:
        self.taken[self.training].append(len(x))
        return self.layers(x)


def make_plain(splits: Splits, kind: str = "sgd", **changes: Any) -> Run:
    """Make a run in float64 whose curve depends on micro-batches by rounding alone."""
    model = initial_model(lambda: Recorder().double(), 7)
    options = {"lr": 0.1, "momentum": 0.9} if kind == "sgd" else {"lr": 0.01}
    return make(splits, model=model, optimizer=OPTIMIZERS[kind](model.parameters(), **options), **changes)


def numbers(results: list[EpochResult]) -> list[float]:
    return [value for result in results for value in dataclasses.replace(result, seconds=0.0).numbers.values()]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_micro_batches_train_as_whole_batches_do(splits: Splits, kind: str, accumulation: int) -> None:
    whole, pieces = make_plain(splits, kind), make_plain(splits, kind, accumulation=accumulation)
    expected = numbers(list(loop.train(whole)))
    assert numbers(list(loop.train(pieces))) == pytest.approx(expected, rel=0, abs=1e-10)
    for one, other in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_a_batch_that_does_not_divide_evenly_weighs_each_row_the_same(splits: Splits) -> None:
    runs = [make_plain(splits, batch_size=7, accumulation=pieces) for pieces in (1, 3)]
    for run in runs:
        assert list(loop.train(run, stop_before(1))) == []  # one batch, its gradients still there
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-14)
    assert [run.model.taken[True] for run in runs] == [[7], [3, 2, 2]]


def test_an_accumulation_of_one_changes_no_bit(splits: Splits) -> None:
    plain, one = make(splits), make(splits, accumulation=1)
    assert timeless(list(loop.train(one))) == timeless(list(loop.train(plain)))
    assert same(state(one), state(plain))


def test_stop_is_not_asked_before_every_micro_batch(splits: Splits) -> None:
    """Stop is asked before every batch and not before every micro batch."""
    asked: list[None] = []
    list(loop.train(make(splits, accumulation=4), lambda: asked.append(None) is not None))
    assert len(asked) == EPOCHS * STEPS


def test_a_micro_batch_has_two_images_at_least(splits: Splits) -> None:
    """A micro batch has two images where the training part is smaller than a batch."""
    few = data.Split(inputs=splits.train.inputs[:5], targets=splits.train.targets[:5])
    run = make_plain(dataclasses.replace(splits, train=few), accumulation=8)
    list(loop.train(run))
    assert run.model.taken[True] == [3, 2] * EPOCHS


def test_validation_takes_fewer_images_at_once_with_micro_batches(splits: Splits, monkeypatch) -> None:
    monkeypatch.setattr(validation, "EVALUATION_BATCH", 9)
    images = len(splits.validation.targets)
    for accumulation, size in ((1, 9), (2, 4), (4, 2)):
        run = make_plain(splits, accumulation=accumulation)
        next(loop.train(run))
        assert run.model.taken[False] == [min(size, images - start) for start in range(0, images, size)]
    monkeypatch.setattr(validation, "EVALUATION_BATCH", 1)
    run = make_plain(splits, accumulation=4)
    next(loop.train(run))
    assert run.model.taken[False] == [1] * images


@pytest.mark.parametrize(("accumulation", "last"), [(0, 8), (-1, 8), (9, 8), (16, 8), (1000, 8)])
def test_an_accumulation_that_leaves_fewer_than_two_images_is_refused(
    splits: Splits, accumulation: int, last: int
) -> None:
    make(splits, accumulation=last)
    with pytest.raises(ValueError, match=rf"accumulation = {accumulation} with batch_size = 16; .*from 1 to {last}$"):
        make(splits, accumulation=accumulation)


def test_a_batch_of_one_image_is_trained_whole_and_never_cut(splits: Splits) -> None:
    next(loop.train(make(splits, Noisy, batch_size=1)))
    with pytest.raises(ValueError, match=r"from 1 to 1$"):
        make(splits, batch_size=1, accumulation=2)


def test_a_run_can_be_halved_while_each_half_has_two_images(splits: Splits) -> None:
    assert [size for size in range(1, 9) if can_halve(size, 1)] == [4, 5, 6, 7, 8]
    assert [pieces for pieces in range(1, 20) if can_halve(16, pieces)] == [1, 2, 3, 4]
    for size in range(1, 20):
        accumulation = 1
        while can_halve(size, accumulation):
            accumulation *= 2
            make(splits, batch_size=size, accumulation=accumulation)
        with pytest.raises(ValueError, match="accumulation"):
            make(splits, batch_size=size, accumulation=2 * accumulation)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"batch_size": 0}])
def test_a_run_over_nothing_is_refused(splits: Splits, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        make(splits, **changes)


def test_a_model_on_another_device_than_the_images_is_refused(splits: Splits) -> None:
    model = build_mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the model is on meta, the data on cpu"):
        make(splits, model=model.to("meta"), optimizer=optimizer)


class Viewing(nn.Module):
    """A user's model that goes by where numbers lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.convolution(x)
        return self.linear(maps.view(len(x), -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_laid_out_for_convolutions_are_the_same_images(channels: int) -> None:
    images = torch.rand(5, channels, 8, 6)
    laid_out = inputs.channels_last(images)
    assert laid_out.stride() == (48 * channels, 1, 6 * channels, channels)
    assert torch.equal(laid_out, images)
    maps = nn.Conv2d(channels, 4, 3)(laid_out)
    assert maps.stride(1) == 1  # passed on by the layer


def test_a_run_lays_images_out_for_convolutions(splits: Splits) -> None:
    """A run lays images out for convolutions and leaves weights and states as they are."""
    run = make(splits, build_cnn)
    assert run.layout is inputs.channels_last
    assert make(splits, build_mlp).layout is inputs.as_they_lie
    list(loop.train(run))
    tensors = [*run.model.parameters(), *(t for s in run.optimizer.state.values() for t in s.values() if t.ndim)]
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_a_model_that_goes_by_memory_gets_its_images_as_they_lie(splits: Splits) -> None:
    run = make(splits, Viewing)
    assert run.layout is inputs.as_they_lie
    assert [result.epoch for result in loop.train(run)] == [1, 2, 3]
