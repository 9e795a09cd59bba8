"""Every optimizer, schedule and warm-up of a study file: trains on the digits, and comes again from its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from hpo import data
from hpo.final import train as final
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train import loop
from hpo.train.build import assemble, registry
from hpo.train.epoch import EpochResult
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.schedules import SCHEDULES
from hpo.train.optim.warmup import WARMUPS

DOCUMENT: dict[str, Any] = {
    "name": "digits",
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [16], "dropout": 0.1},
    "training": {"epochs": 2, "batch_size": 32},
    "optimizer": {"name": "adamw", "lr": 0.01},
}
RATES = {"sgd": 0.1, "adagrad": 0.05}  # 0.01 for the others
ENTRIES: dict[str, dict[str, Any]] = {
    **{
        f"optimizer {name}": {"optimizer": {"name": name, "lr": RATES.get(name, 0.01), "weight_decay": 0.01}}
        for name in OPTIMIZERS
    },
    **{f"schedule {name}": {"schedule": {"name": name}} for name in SCHEDULES},
    **{f"warmup {name}": {"warmup": {"name": name}} for name in WARMUPS},
    "warmup of some epochs": {"warmup": {"name": "linear", "epochs": 0.5}, "schedule": {"name": "plateau"}},
    "sam": {"sam": {"rho": 0.05}},
    "decoupled sgd": {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01, "decoupled": True}},
    "decay of all": {"optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.01, "decay": "all"}},
}


@pytest.fixture(scope="module")
def splits() -> data.Splits:
    return data.load(data.SOURCES["digits"](), split_seed=0, device="cpu")


@pytest.mark.parametrize("name", ENTRIES)
def test_two_epochs_lower_the_loss_and_the_export_trains_to_the_same(
    name: str, splits: data.Splits, tmp_path: Path
) -> None:
    spec = registry.resolve(StudySpec.from_document(DOCUMENT | ENTRIES[name]), tmp_path)
    config = TrainConfig.from_tree(spec.tree)
    torch.set_num_threads(1)
    results = list(loop.train(assemble.build_run(config, splits, 5, tmp_path, torch.device("cpu"))))
    assert results[1].train_loss < results[0].train_loss
    assert results[1].validation_loss < results[0].validation_loss

    curves = {key: [getattr(result, key) for result in results] for key in ("train_loss", "validation_loss")}
    pinned = tmp_path / "best.toml"
    pinned.write_text(tomli_w.dumps(spec.document | {"receipt": {"seed": 5, "curves": curves}}))
    assert StudySpec.load(pinned).fingerprint == spec.fingerprint
    seen: list[EpochResult] = []
    assert final.replay(final.prepare(pinned), seen.append) == []
    assert len(seen) == 2
