"""Losses, penalties and averages in a study file: all searchable, checked before a worker starts, exported and replayed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo.data import Splits
from hpo.errors import SpecError
from hpo.final import train as final
from hpo.spec import space
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.storage.connect import connect
from hpo.study import export, resolve, results
from hpo.study import study as studies
from hpo.train import loop
from hpo.train.build import assemble, check, registry
from hpo.train.optim import losses
from hpo.train.optim.averaging import AVERAGINGS
from hpo.worker import loop as worker_loop
from hpo.worker.objective import declared
from hpo.worker.signals import StopSignal

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [16], "dropout": 0.1},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "training": {"epochs": 2, "batch_size": 64},
}
LOSSES = losses.for_task("classification")
SMOOTHING = {"low": 0.0, "high": 0.2}
SEARCHED: dict[str, Any] = {
    "loss": {
        "name": {"choices": LOSSES},
        "label_smoothing": SMOOTHING,
        "mse": {"of": {"choices": ["softmax", "logits"]}},
    },
    "averaging": {
        "name": {"choices": list(AVERAGINGS)},
        "ema": {"decay": {"low": 0.5, "high": 0.99}, "warm_up": {"choices": [True, False]}},
        "swa": {"start": {"low": 0.0, "high": 0.5}},
    },
    "training": {
        "epochs": 2,
        "batch_size": 64,
        "l1": {"low": 1e-6, "high": 1e-4, "log": True},
        "l2": {"low": 1e-6, "high": 1e-3, "log": True},
        "max_norm": {"low": 1.0, "high": 4.0},
    },
}
OWN = """
import torch.nn.functional as F
from torch import nn

def focal(*, gamma: float = 2.0):
    def loss(logits, labels):
        found = F.cross_entropy(logits, labels, reduction="none")
        return (1 - (-found).exp()) ** gamma * found
    return loss

def mean():
    return nn.CrossEntropyLoss()

def broken():
    def loss(logits, labels):
        return logits.nonsense()
    return loss
"""


def resolved(folder: Path, **changes: Any) -> StudySpec:
    (folder / "mine.py").write_text(OWN)
    return registry.resolve(StudySpec.from_document(BASE | changes), folder)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    folder = tmp_path_factory.mktemp("digits")
    return assemble.load_splits(TrainConfig.from_tree(resolved(folder).tree), 0, folder, CPU)


@pytest.mark.parametrize(("loss", "averaging"), [*itertools.product([*LOSSES, "mine.py:focal"], AVERAGINGS)])
def test_every_loss_under_every_average_learns_digits(
    digits: Splits, tmp_path: Path, loss: str, averaging: str
) -> None:
    sections = {"loss": {"name": loss}, "averaging": {"name": averaging}}
    training = {**BASE["training"], "l1": 1e-5, "l2": 1e-4, "max_norm": 3.0}
    tree = resolved(tmp_path, **sections, training=training).tree
    first, second = loop.train(assemble.build_run(TrainConfig.from_tree(tree), digits, 1, tmp_path, CPU))
    assert second.train_loss < first.train_loss
    assert second.validation_loss < first.validation_loss


def test_all_of_it_is_searched_and_every_end_can_be_built(digits: Splits, tmp_path: Path) -> None:
    spec = resolved(tmp_path, **SEARCHED)
    assert dict(space.parameters(spec.tree)).keys() == {
        "loss.name",
        "loss.label_smoothing",
        "loss.mse.of",
        "averaging.name",
        "averaging.ema.decay",
        "averaging.ema.warm_up",
        "averaging.swa.start",
        "training.l1",
        "training.l2",
        "training.max_norm",
    }
    assert registry.resolve(spec, tmp_path) == spec
    runs = [
        assemble.build_run(TrainConfig.from_tree(tree), digits, 1, tmp_path, CPU) for tree in space.variants(spec.tree)
    ]
    assert {run.penalised.max_norm for run in runs} == {1.0, 2.5, 4.0}
    assert {getattr(run.loss, "label_smoothing", None) for run in runs} == {0.0, 0.1, 0.2}
    assert {None if run.average is None else run.average.averaging.every for run in runs} == {None, "step", "epoch"}


def test_sections_that_are_left_out_are_no_part_of_a_study_s_identity(tmp_path: Path) -> None:
    spec = resolved(tmp_path)
    assert not spec.document.keys() & {"loss", "averaging"}
    assert not spec.document["training"].keys() & {"l1", "l2", "max_norm"}
    config = TrainConfig.from_tree(spec.tree)
    assert (config.loss, config.averaging.name) == (None, "none")  # the task decides the loss
    assert resolved(tmp_path, loss={"name": "cross_entropy"}).loss == {"name": "cross_entropy", "label_smoothing": 0.0}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown loss": (
        {"loss": {"name": "cross_entropi"}},
        "loss.name: there is no loss 'cross_entropi' (did you mean 'cross_entropy'?); your own is \"package.module:name\"",
    ),
    "unknown average": (
        {"averaging": {"name": "emma"}},
        "averaging.name: there is no averaging 'emma' (did you mean 'ema'?); your own is \"package.module:name\"",
    ),
    "no name": ({"loss": {"label_smoothing": 0.1}}, 'loss.name: missing; write name = "..."'),
    "smoothing": (
        {"loss": {"name": "mse", "label_smoothing": {"low": 0.5, "high": 1.0}}},
        "loss.label_smoothing = 1.0: input should be less than 1",
    ),
    "decay": (
        {"averaging": {"name": "ema", "decay": {"choices": [0.9, 1.0]}}},
        "averaging.decay = 1.0: input should be less than 1",
    ),
    "swa's decay": (
        {"averaging": {"name": "swa", "decay": 0.9}},
        "averaging.decay: averaging swa takes no 'decay' (known: start)",
    ),
    "penalty": (
        {"training": {"l1": -1.0}},
        "training.l1 = -1.0: input should be greater than or equal to 0",
    ),
    "bound": ({"training": {"max_norm": 0.0}}, "training.max_norm = 0.0: input should be greater than 0"),
    "two measures": (
        {"metric": "loss", "loss": {"name": {"choices": ["mse", "cross_entropy"]}}},
        'loss.name = { choices = ["mse", "cross_entropy"] }: losses of several kinds cannot be compared; '
        'give one value, or another metric: metric = "accuracy", or "rmse" for a regression',
    ),
    "two scales": (
        {"metric": "loss", "loss": {"name": "mine.py:focal", "gamma": {"low": 0.0, "high": 2.0}}},
        "loss.gamma = { low = 0.0, high = 2.0 }: losses of several kinds cannot be compared; "
        'give one value, or another metric: metric = "accuracy", or "rmse" for a regression',
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_told_in_a_line(tmp_path: Path, name: str) -> None:
    changes, message = FAULTS[name]
    with pytest.raises(SpecError) as caught:
        resolved(tmp_path, **changes)
    assert str(caught.value) == message


def test_a_loss_as_metric_may_differ_in_label_smoothing(tmp_path: Path) -> None:
    for loss in ({"label_smoothing": SMOOTHING}, {"cross_entropy": {"label_smoothing": SMOOTHING}}):
        spec = resolved(tmp_path, metric="loss", loss={"name": "cross_entropy", **loss})
        assert len(list(space.parameters(spec.tree))) == 1
        assert spec.direction == "minimize"


def examine(folder: Path, **changes: Any) -> check.Findings:
    spec = resolved(folder, executor="loop", **changes)
    return check.examine(resolve.resolve(spec, folder), folder, workers=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r'^loss mine.py:mean: ValueError: gave shape \[\] for 2 rows, .* \(reduction = "none"\)$'),
        ("broken", "^loss mine.py:broken: AttributeError: 'Tensor' object has no attribute 'nonsense'"),
    ],
)
def test_an_own_loss_that_is_none_is_told_by_check(tmp_path: Path, name: str, message: str) -> None:
    """A loss of one's own that is none is told by check whichever is tried."""
    with pytest.raises(SpecError, match=message):
        examine(tmp_path, loss={"name": {"choices": [f"mine.py:{name}", "mse", "cross_entropy"]}})


def test_check_finds_what_an_average_does_not_use_and_nothing_else(tmp_path: Path) -> None:
    changes = {**SEARCHED, "averaging": {"name": "ema", "decay": {"low": 0.9, "high": 0.99}, "warm_up": False}}
    assert examine(tmp_path, **changes).unused == []
    slow = {"averaging": {"name": "ema", "decay": {"low": 0.99, "high": 0.999}}}  # it has not warmed up in 2 epochs
    late = {"averaging": {"name": "swa", "start": {"low": 0.1, "high": 0.2}}}  # both begin with the first epoch
    for averaging in (slow, late):
        [warning] = examine(tmp_path, **averaging).unused
        assert warning.startswith("averaging.")
        assert warning.endswith("has no effect on a training; nothing uses it, remove it")


@pytest.mark.parametrize("executor", ["loop", "stack"])
def test_a_search_over_all_of_it_exports_trials_that_replay_bit_for_bit(tmp_path: Path, executor: str) -> None:
    search = {
        "executor": executor,
        "slots": 4,
        "budget": {"trials": 8},
        "sampler": {"name": "random"},
        "pruner": {"name": "none"},
    }
    spec = resolved(tmp_path, **SEARCHED, **(search if executor == "stack" else search | {"slots": 1}))
    spec = resolve.resolve(spec, tmp_path).model_copy(update={"checkpoints": str(tmp_path / "checkpoints")})
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    study = studies.create_or_join(place, spec, code_folder=tmp_path, code_digest="")
    worker_loop.work(study, declared(study, tmp_path), study.ledger("w"), StopSignal())
    trials = study.optuna.get_trials(deepcopy=False)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 8
    assert len({(t.params["loss.name"], t.params["averaging.name"]) for t in trials}) > 3
    used = set()
    for trial in trials:
        [path] = export.export(study, tmp_path / f"{trial.number}.toml", number=trial.number)
        training = final.prepare(path)
        used.add(training.executor)
        assert final.replay(training, lambda result: None) == []
        assert results.best(study, number=trial.number)[0].params == trial.params
    assert executor in used
    place.close()
