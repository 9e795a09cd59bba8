"""All names and options that a study file may choose in a run, dealt to a few runs so that each appears in one of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from hpo.train.optim.averaging import AVERAGINGS
from hpo.train.optim.losses import for_task
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.optim.schedules import SCHEDULES
from hpo.train.optim.warmup import WARMUPS

Section = dict[str, Any]

#: Where gradients are next to none, adaptive steps blow rounding up. By a large eps they do not.
LARGE_EPS = {"eps": 1e-3}
WITHOUT_EPS = ("sgd",)
AUGMENTS: Section = {
    "crop": 1,
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "resized_crop": 0.5,
    "rotation": 20.0,
    "translation": 0.2,
    "scale": 0.2,
    "shear": 10.0,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "hue": 0.1,
    "trivial_augment": 0.5,
    "erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
}
#: Options of `augment` that say how another one is done.
MANNERS = {"fill": "crop", "resized_crop_ratio": "resized_crop", "erasing_area": "erasing", "mix_probability": "mixup"}
TRAINING: Section = {
    "clip_norm": 0.1,
    "clip_value": 0.01,
    "l1": 1e-3,
    "l2": 1e-2,
    "max_norm": 0.8,
    "sampling": "balanced",
}
#: Options of losses, by task.
LOSS_OPTIONS: dict[str, dict[str, Section]] = {
    "classification": {
        "cross_entropy": {"label_smoothing": 0.1, "class_weights": "balanced"},
        "bce_with_logits": {"label_smoothing": 0.1},
        "mse": {"of": "logits", "label_smoothing": 0.1},
    },
    "binary": {"bce_with_logits": {"pos_weight": "balanced"}},
    "multilabel": {"bce_with_logits": {"label_smoothing": 0.1, "pos_weight": 2.0}},
    "regression": {"smooth_l1": {"beta": 0.3}, "huber": {"delta": 0.3}},
}


def losses_of(task: str) -> list[Section]:
    """Return the losses that go with a task, each without its options and with each of them."""
    options = LOSS_OPTIONS[task]
    return [
        {"name": name, **given}
        for name in for_task(task)
        for given in ({}, *({key: value} for key, value in options.get(name, {}).items()))
    ]


def own_sections(*, alone: bool) -> dict[str, list[Section]]:
    """Return by section all that a run on images of classes may have, each value once.

    Args:
        alone: with what no stack can do: batch norm's statistics anew, each batch twice, and eigenbases.
    """
    sgd: Section = {"name": "sgd", "lr": 0.05}
    return {
        "optimizer": [
            *(
                {"name": name, "lr": 0.01, **({} if name in WITHOUT_EPS else LARGE_EPS)}
                for name in OPTIMIZERS
                if alone or name != "soap"
            ),
            sgd | {"momentum": 0.9},
            sgd | {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            sgd | {"momentum": 0.9, "decoupled": True, "weight_decay": 0.01, "decay": "all"},
            {"name": "rmsprop", "lr": 0.01, "momentum": 0.9, **LARGE_EPS},
        ],
        "schedule": [{"name": name} for name in SCHEDULES],
        "warmup": [{}, *({"name": name, "epochs": 0.5} for name in WARMUPS)],
        "averaging": [{"name": name} for name in AVERAGINGS if alone or name != "swa"],
        "training": [{}, *({key: value} for key, value in TRAINING.items())],
        "sam": [{}, {"rho": 0.05}] if alone else [{}],
        "loss": losses_of("classification"),
        "augment": [
            *({key: value} for key, value in AUGMENTS.items()),
            *({"crop": 1, "rotation": 10.0, "fill": fill} for fill in ("mean", "edge", "reflect")),
        ],
    }


def deal(sections: dict[str, list[Section]], seed: int) -> list[dict[str, Section]]:
    """Return as many runs as the longest section has values. Each run has a value of every section, drawn by the seed."""
    rng = random.Random(seed)
    count = max(map(len, sections.values()))
    columns = {section: _drawn(rng, values, count) for section, values in sections.items() if values}
    return [{section: column[row] for section, column in columns.items() if column[row]} for row in range(count)]


def _drawn(rng: random.Random, values: Sequence[Section], count: int) -> list[Section]:
    """Return values in a random order, each at least once, or as near as can be equally often."""
    repeated = [value for _ in range(-(-count // len(values))) for value in rng.sample(values, len(values))]
    return repeated[:count]
