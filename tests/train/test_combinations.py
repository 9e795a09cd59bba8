"""Whatever a study file combines, drawn at random: what one section asks for holds beside what any other does.

Each combination is trained by the loop, whole and left amid an epoch, and by a stack, whole, left amid an epoch, and beside
neighbours who ask for something else.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo import data
from hpo.data import Source, Splits, select
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train import checkpoint, loop
from hpo.train.build import assemble, executor, registry
from hpo.train.epoch import EpochResult
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.run import Run
from hpo.train.stack.forward import StackedForward
from hpo.train.stack.layers import Unstackable
from hpo.train.stack.stack import Stack
from tests.support.stacks import CLASSES, apart, numbers, stop_before, train

# A combination each; the latter once found something.
SEEDS = (*range(2), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 9)), 68, 114, 118, 125)
EPOCHS = 4
CPU = torch.device("cpu")


def source() -> Source:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % CLASSES
    images = torch.randint(0, 180, (120, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0, 0] += (labels * 30).to(torch.uint8)[:, None]
    return Source(inputs=images, targets=labels, num_classes=CLASSES)


@pytest.fixture(scope="module")
def both() -> list[Splits]:
    """The same images in memory and read batch by batch."""
    return [data.load(select(source(), resident=resident), split_seed=0, device=CPU) for resident in (True, False)]


# --- what is drawn ----------------------------------------------------------------------------------------------------


def some(rng: random.Random, options: dict[str, Any], share: float = 0.4) -> dict[str, Any]:
    return {key: value for key, value in options.items() if rng.random() < share}


def model(rng: random.Random, *, alone: bool) -> dict[str, Any]:
    """Return a model; runs of a stack have it in common."""
    name = rng.choice(["mlp", "cnn"])
    sizes = {"widths": [9, 7]} if name == "mlp" else {"channels": [3, 4]}
    more = some(rng, {"residual": True, "freeze": 1, "input_dropout": 0.1, "layer_rate": 0.3}, 0.3)
    norm = rng.choice(["batch", "layer", "none"] if alone or "freeze" not in more else ["layer", "none"])
    if "freeze" in more and alone:
        more |= some(rng, {"unfreeze_every": 1})
    if "residual" in more and rng.random() < 0.5:
        more["stochastic_depth"] = 0.3
    activation = rng.choice(["tanh", "gelu", "prelu", "swiglu"])
    return {"name": name, "dropout": 0.2, "norm": norm, "activation": activation, **sizes, **more}


def optimizer(rng: random.Random) -> dict[str, Any]:
    # Where gradients are next to none, adaptive steps blow rounding up; by a large eps they do not.
    name = rng.choice([name for name in OPTIMIZERS if name not in ("soap", "muon")])
    more = {"eps": 1e-3} if name != "sgd" else some(rng, {"momentum": 0.9, "decoupled": True, "nesterov": True}, 0.6)
    decay = some(rng, {"weight_decay": 0.1, "decay": "all"}, 0.6)
    return {"name": name, "lr": 0.1 if name == "sgd" else 0.02, **more, **decay}


def schedule(rng: random.Random) -> dict[str, Any]:
    name = rng.choice(["constant", "cosine", "warm_restarts", "plateau"])
    return {"name": name, **({"patience": 0, "threshold": 0.3} if name == "plateau" else {})}


def own(rng: random.Random) -> dict[str, Any]:
    """Return sections that each run of a stack may have otherwise than its neighbours."""
    found: dict[str, Any] = {"optimizer": optimizer(rng), "schedule": schedule(rng)}
    loss = rng.choice(["cross_entropy", "bce_with_logits", "mse"])
    found["loss"] = {"name": loss, **some(rng, {"label_smoothing": 0.1})}
    found["augment"] = some(
        rng,
        {"crop": 1, "horizontal_flip": 0.5, "rotation": 20.0, "hue": 0.1, "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0},
        0.3,
    )
    found["averaging"] = rng.choice([{"name": "none"}, {"name": "ema", "decay": 0.8}, {"name": "swa", "start": 0.3}])
    found["training"] = some(rng, {"clip_norm": 1.0, "clip_value": 0.1, "l1": 1e-3, "l2": 1e-2, "max_norm": 0.8})
    if rng.random() < 0.3:
        found["warmup"] = {"name": "linear", "epochs": 1.5}
    if rng.random() < 0.3:
        found["stopping"] = {"patience": 2, "monitor": "accuracy", "gradient_norm": 1e-3}
    return found


def common(rng: random.Random, *, alone: bool) -> dict[str, Any]:
    """Return sections that runs of a stack have in common."""
    watch = some(rng, {"norms": True, "noise": True, "metrics": ["macro_f1"]})
    return {"model": model(rng, alone=alone), "batch_size": rng.choice([16, 21]), "watch": watch}


class Combination:
    """A drawn config, from which the same run can be made again and again."""

    def __init__(self, seed: int, splits: Splits, *, neighbour: int = 0, alone: bool = False) -> None:
        """Draw a combination; those of one seed have in common what runs of a stack must, and in which neighbours differ.

        Args:
            alone: whether there may be in it what no stack can do.
        """
        drawn = common(random.Random(seed), alone=alone)
        rng = random.Random(1000 * neighbour + seed + 1)
        found = own(rng)
        found["training"] |= {"epochs": EPOCHS, "batch_size": drawn["batch_size"]}
        found |= {"name": "s", "data": {"name": "digits"}, "model": drawn["model"]}
        if "layer_rate" in found["model"]:
            found["model"]["layer_rate"] = rng.choice([0.1, 0.3])
        found["watch"] = drawn["watch"]
        if alone:
            found |= some(rng, {"sam": {"rho": 0.05}}, 0.3)
        self.accumulation = 3 if alone and rng.random() < 0.3 else 1
        spec = registry.resolve(StudySpec.from_document(found), Path())
        self.config = TrainConfig.from_tree(spec.tree)
        self.seed, self.splits = seed + neighbour, splits

    def run(self, dtype: torch.dtype = torch.float32, *, by_step: bool = False) -> Run:
        made = {"dtype": dtype, "accumulation": self.accumulation, "by_step": by_step}
        return assemble.build_run(self.config, self.splits, self.seed, Path(), CPU, **made)

    def stack_key(self) -> str:
        return executor.stack_key_of(self.run(), self.config.training)


# --- what is compared -------------------------------------------------------------------------------------------------


def tensors(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.judged_weights().items()}


def assert_same(one: tuple[Run, list[EpochResult]], other: tuple[Run, list[EpochResult]]) -> None:
    known = one[1][0].numbers.keys() - {"seconds"}
    curves = [
        [{key: result.numbers[key] for key in sorted(known)} for result in results] for _, results in (one, other)
    ]
    assert repr(curves[0]) == repr(curves[1])  # not a number is equal to itself there
    for name, tensor in tensors(one[0]).items():
        torch.testing.assert_close(tensors(other[0])[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def through_a_file(run: Run, fresh: Run, path: Path) -> Run:
    checkpoint.save(path, run.state_dict())
    fresh.load_state_dict(checkpoint.load(path))
    return fresh


def stack_of(runs: list[Run]) -> Stack:
    stack = Stack(StackedForward(runs[0].model), runs[0], len(runs))
    for run in runs:
        stack.put(run)
    return stack


def neighbours(one: Combination) -> list[Combination]:
    found = [Combination(one.seed, one.splits, neighbour=number) for number in (1, 2, 3)]
    return [other for other in found if other.stack_key() == one.stack_key()]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_left_amid_an_epoch_goes_on_and_a_replay_repeats_it(
    both: list[Splits], tmp_path: Path, seed: int
) -> None:
    one, read = (Combination(seed, splits, alone=True) for splits in both)
    whole = one.run()
    expected = (whole, list(loop.train(whole)))
    watched = one.run(by_step=True)  # as the final training's
    assert_same(expected, (watched, list(loop.train(watched))))

    run, stop = read.run(), stop_before(6)  # whose images are read batch by batch
    results = list(loop.train(run, stop))
    run = through_a_file(run, read.run(), tmp_path / "state.pt")
    assert_same(expected, (run, results + list(loop.train(run))))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stack_comes_to_what_the_loop_comes_to(both: list[Splits], seed: int) -> None:
    one = Combination(seed, both[0])
    try:
        stack_of([one.run(torch.float64)])
    except Unstackable as reason:
        pytest.skip(str(reason))
    ones = [one, *neighbours(one)]
    runs, alone = [each.run(torch.float64) for each in ones], [each.run(torch.float64) for each in ones]
    results = train(stack_of(runs))
    for run, other in zip(runs, alone, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(other))) <= 1e-10
        for name, tensor in tensors(other).items():
            torch.testing.assert_close(tensors(run)[name], tensor, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_and_a_break_leave_no_trace(both: list[Splits], tmp_path: Path, seed: int) -> None:
    one = Combination(seed, both[0])
    alone = one.run()
    try:
        stack = stack_of([alone])
    except Unstackable as reason:
        pytest.skip(str(reason))
    expected = (alone, train(stack)[alone])
    read = Combination(seed, both[1])
    run, others = read.run(), [other.run() for other in neighbours(read)]
    stack, stop, results = stack_of([*others, run]), stop_before(6), []
    while ended := stack.train_epoch(stop):
        results.append(ended[-1])
    run = through_a_file(run, read.run(), tmp_path / "state.pt")
    stack = stack_of([run, *(other.run() for other in neighbours(read))])
    assert_same(expected, (run, results + train(stack)[run]))
