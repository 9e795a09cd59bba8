"""Averages of weights are those of torch's AveragedModel; what is judged, kept and repeated is the average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from hpo.data import Splits
from hpo.final import train as final
from hpo.models import cnn
from hpo.train import checkpoint, loop
from hpo.train.optim import averaging
from hpo.train.optim.averaging import Average, Averaging
from hpo.train.run import Run
from hpo.train.validation import assess
from tests.support.declared import quiet
from tests.support.stacks import CLASSES, Trial, stop_before


def small_cnn() -> nn.Module:
    return cnn((1, 8, 8), CLASSES, channels=[4, 3])


def watched(run: Run, each_step: Callable[[], None]) -> None:
    """Call a function after each step of a run's optimizer."""
    run.optimizer.register_step_post_hook(lambda *_: each_step())


def trial_of(splits: Splits, found: Averaging, build: Callable[[], nn.Module] = small_cnn) -> Trial:
    return Trial(splits=splits, build=build, epochs=4, lr=0.1, options={"averaging": found})


def test_ema_without_warm_up_is_torch_s(splits: Splits) -> None:
    run = trial_of(splits, averaging.ema(decay=0.8, warm_up=False)).run()
    reference = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    watched(run, lambda: reference.update_parameters(run.model))
    results = list(loop.train(run))
    for name, tensor in reference.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(run.judged_weights()[name], tensor, rtol=1e-10, atol=1e-12)
    # Each epoch's validation judged it, and the counter is that of the weights.
    assert judged_anew(run) == (results[-1].validation_loss, results[-1].validation_accuracy)
    assert run.judged_weights()["1.num_batches_tracked"] == run.model.get_buffer("1.num_batches_tracked") == 16


def judged_anew(run: Run) -> tuple[float, float]:
    net = copy.deepcopy(run.model)
    net.load_state_dict(run.judged_weights())
    found = assess(net, run.splits.validation, splits=run.splits)
    return found["loss"], found["accuracy"]


def test_the_decay_warms_up_as_tensorflow_s() -> None:
    found = averaging.ema(decay=0.9)
    kept = [1 - found.share(count) for count in range(1, 200)]
    assert kept[0] == 0
    assert kept[1:] == pytest.approx([min(0.9, (1 + t) / (10 + t)) for t in range(1, 199)])
    assert {round(1 - averaging.ema(decay=0.9, warm_up=False).share(count), 9) for count in range(2, 9)} == {0.9}


def without_norms() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, CLASSES))


@pytest.mark.parametrize("build", [small_cnn, without_norms])
def test_swa_is_torch_s_with_batch_norm_s_statistics_anew(splits: Splits, build: Callable[[], nn.Module]) -> None:
    run = trial_of(splits, averaging.swa(start=0.5), build).run()
    plain = replace(trial_of(splits, averaging.none(), build)).run()
    reference = AveragedModel(run.model)
    results = []
    for result, other in zip(loop.train(run), loop.train(plain), strict=True):
        results.append(result)
        if result.epoch > 2:
            reference.update_parameters(plain.model)
        judged_as_trained = result.epoch <= (2 if build is small_cnn else 3)  # the first average is of one
        assert (result.validation_loss == other.validation_loss) == judged_as_trained
        assert result.train_loss == other.train_loss  # nothing of the average reaches the training
    run.epoch -= 1  # as when it was judged
    update_bn(list(loop.plain_batches(run)), reference.module)
    for name, tensor in reference.module.state_dict().items():
        torch.testing.assert_close(run.judged_weights()[name], tensor, rtol=1e-10, atol=1e-12)
    assert judged_anew(run)[0] == pytest.approx(results[-1].validation_loss, rel=1e-12)


def test_the_optimizer_s_own_weights_are_untouched(splits: Splits) -> None:
    averaged, plain = (trial_of(splits, found).run() for found in (averaging.swa(start=0.0), averaging.none()))
    list(loop.train(averaged))
    list(loop.train(plain))
    for mine, theirs in zip(averaged.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_gets_its_own_weights_back_whatever_happens(splits: Splits) -> None:
    run = trial_of(splits, averaging.ema(decay=0.5)).run()
    next(loop.train(run))
    average, before = run.average, copy.deepcopy(run.model.state_dict())
    assert average is not None

    def fail() -> None:
        assert average is not None
        with average.shown_in(run.model):
            assert not torch.equal(run.model.state_dict()["0.weight"], before["0.weight"])
            raise KeyError("judged")

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), run.model.state_dict().values(), strict=True))


class Tied(nn.Module):
    """Two names of one parameter, two of one buffer, and one buffer that is not kept."""

    mask: Tensor
    again: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.two = nn.Linear(64, 64)
        self.two.weight = self.one.weight
        self.head = nn.Linear(64, CLASSES)
        self.register_buffer("mask", torch.ones(64), persistent=False)
        self.register_buffer("again", self.mask)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x.flatten(1) * self.mask).relu())
        return self.head(x)


def test_tensors_of_several_names_are_averaged_once(splits: Splits) -> None:
    run = trial_of(splits, averaging.ema(decay=0.9, warm_up=False), Tied).run()
    list(loop.train(run))
    state = run.judged_weights()
    assert state.keys() == run.model.state_dict().keys()
    assert torch.equal(state["one.weight"], state["two.weight"])
    assert not torch.equal(state["one.weight"], run.model.state_dict()["one.weight"])
    assert torch.equal(state["again"], torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("found", [averaging.ema(decay=0.9), averaging.swa(start=0.2)])
def test_a_state_goes_through_a_file_and_is_copied(splits: Splits, tmp_path: Path, found: Averaging) -> None:
    trial = trial_of(splits, found)
    run = trial.run()
    assert len(list(loop.train(run, stop_before(6)))) == 1
    digest = checkpoint.save(tmp_path / "run.pt", run.state_dict())
    state = checkpoint.load(tmp_path / "run.pt", digest)
    other = trial.run()
    other.load_state_dict(state)
    left = copy.deepcopy(state)
    results = [list(loop.train(one)) for one in (other, run)]
    assert [r.validation_loss for r in results[0]] == [r.validation_loss for r in results[1]]
    for name, tensor in other.judged_weights().items():
        assert torch.equal(tensor, run.judged_weights()[name])
    assert all(torch.equal(t, left["average"]["values"][n]) for n, t in state["average"]["values"].items())


def test_no_average_is_kept_for_a_run_without_one(splits: Splits) -> None:
    run = trial_of(splits, averaging.none()).run()
    assert run.average is None
    assert run.state_dict()["average"] is None
    assert run.judged_weights().keys() == run.model.state_dict().keys()
    fresh = Average(averaging.ema(), run.model, 4)
    assert (
        averaging.judged_weights(run.model, fresh)["0.weight"].data_ptr()
        == run.model.get_parameter("0.weight").data_ptr()
    )


PINNED: dict[str, Any] = {
    "name": "digits",
    "seed": 3,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [16], "dropout": 0.1},
    "training": {"epochs": 3, "batch_size": 64, "l2": 0.001, "max_norm": 2.0},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "loss": {"name": "bce_with_logits", "label_smoothing": 0.1},
    "averaging": {"name": "ema", "decay": 0.95},
}


def test_the_final_training_keeps_the_average(tmp_path: Path) -> None:
    """The final training keeps and tests the average and replays bit for bit."""
    path = tmp_path / "best.toml"
    path.write_text(tomli_w.dumps(PINNED | {"value": "last"}))
    training = final.prepare(path)
    run = training.run()
    results = list(loop.train(run))
    metrics = final.train(training, tmp_path / "run", stop=lambda: False, progress=quiet, before_test=lambda: None)
    assert metrics is not None
    assert [row["validation_loss"] for row in metrics["history"]] == [r.validation_loss for r in results]
    kept = checkpoint.load(tmp_path / "run" / final.WEIGHTS)
    assert all(torch.equal(kept[name], tensor) for name, tensor in run.judged_weights().items())
    assert not torch.equal(kept["1.weight"], run.model.state_dict()["1.weight"])

    curves = {name: [getattr(r, name) for r in results] for name in ("train_loss", "validation_loss")}
    path.write_text(tomli_w.dumps(PINNED | {"receipt": {"seed": training.seed, "curves": curves}}))
    assert final.replay(final.prepare(path), quiet) == []
    path.write_text(
        tomli_w.dumps(PINNED | {"averaging": {"name": "none"}, "receipt": {"seed": training.seed, "curves": curves}})
    )
    assert {difference.metric for difference in final.replay(final.prepare(path), quiet)} == {"validation_loss"}
