"""Rules of stopping against curves worked out by hand, what a study file may say of them, and how they go with pruning."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hpo.errors import SpecError
from hpo.spec.study_file import StudySpec
from hpo.spec.training import STOPPING_RULES, Stopping, TrainConfig
from hpo.strategy import pruners, samplers
from hpo.strategy.lint import lint
from hpo.train import early_stopping
from hpo.train.early_stopping import generalisation_loss, last_improvement, overfits_since, training_progress, verdict

BASE: dict[str, Any] = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"name": "constant"},
    "training": {"epochs": 9},
}


def stops_at(settings: dict[str, Any], **curves: list[float]) -> int | None:
    """Return the first epoch after which a training of these curves ends; curves that are not given are constant."""
    length = max(map(len, curves.values()))
    whole = {name: [1.0] * length for name in ("train_loss", "validation_loss", "seconds", "gradient_norm")} | curves
    for epoch in range(1, length + 1):
        if verdict(Stopping(**settings), {name: curve[:epoch] for name, curve in whole.items()}):
            return epoch
    return None


def test_every_rule_has_its_key_and_every_key_its_rule() -> None:
    assert set(early_stopping.RULES) == set(STOPPING_RULES)


def test_the_generalisation_loss_is_prechelts() -> None:
    assert generalisation_loss([2.0, 1.0, 1.25]) == pytest.approx(25.0)  # 100 * (1.25 / 1.0 - 1)
    assert generalisation_loss([2.0, 1.25, 1.0]) == 0.0
    assert generalisation_loss([0.0, 0.5]) == math.inf
    assert generalisation_loss([0.0, 0.0]) == 0.0


def test_the_training_progress_is_prechelts() -> None:
    # k = 5: sum 0.9 + 0.8 + 0.7 + 0.6 + 0.5 = 3.5, minimum 0.5: 1000 * (3.5 / (5 * 0.5) - 1) = 400
    assert training_progress([0.9, 0.8, 0.7, 0.6, 0.5]) == pytest.approx(400.0)
    assert training_progress([0.3, 0.3, 0.3]) == 0.0
    assert training_progress([0.3, 0.0]) == math.inf


LOSS = [1.0, 0.8, 0.6, 0.5, 0.52, 0.54, 0.51, 0.56, 0.58, 0.60]  # lowest at epoch 4
# GL in percent: 0 0 0 0 4 8 2 12 16 20


@pytest.mark.parametrize(
    ("settings", "curves", "epoch"),
    [
        ({"gl": 5.0}, {"validation_loss": LOSS}, 6),
        ({"gl": 8.5}, {"validation_loss": LOSS}, 8),
        ({"gl": 20.1}, {"validation_loss": LOSS}, None),
        ({"gl": 5.0, "min_epochs": 7}, {"validation_loss": LOSS}, 8),
        # strips of 3 end at epochs 3, 6, 9 with GL 0, 8, 16; P_3 of the training loss at 6: 1000 * (1.8/1.5 - 1) = 200
        (
            {"pq": 0.039, "strip": 3},
            {"validation_loss": LOSS, "train_loss": [1, 0.9, 0.8, 0.7, 0.6, 0.5] + [0.4] * 4},
            6,
        ),
        # at 9 the training loss stands still: the progress is 0 and any generalisation loss is too much
        (
            {"pq": 0.041, "strip": 3},
            {"validation_loss": LOSS, "train_loss": [1, 0.9, 0.8, 0.7, 0.6, 0.5] + [0.4] * 4},
            9,
        ),
        ({"pq": 0.041, "strip": 5}, {"validation_loss": LOSS}, 5),
        ({"pq": 0.041, "strip": 4}, {"validation_loss": LOSS[:5], "train_loss": [1.0] * 5}, None),  # GL(4) is 0
        # UP, strips of 2: losses at the ends 0.8 0.5 0.54 0.56 0.60
        ({"up": 1, "strip": 2}, {"validation_loss": LOSS}, 6),
        ({"up": 2, "strip": 2}, {"validation_loss": LOSS}, 8),
        ({"up": 3, "strip": 2}, {"validation_loss": LOSS}, 10),
        ({"up": 4, "strip": 2}, {"validation_loss": LOSS}, None),
        ({"up": 1, "strip": 5}, {"validation_loss": [1.0] * 4 + [0.5] + [0.4] * 4 + [0.6]}, 10),
        ({"up": 1, "strip": 5}, {"validation_loss": [1.0] * 4 + [0.5] + [0.9] * 4 + [0.5]}, None),  # equal is not up
        ({"max_seconds": 2.5}, {"seconds": [1.0, 1.0, 0.4, 0.2, 1.0]}, 4),
        ({"max_seconds": 2.4}, {"seconds": [1.0, 1.0, 0.4, 0.2, 1.0]}, 3),
        ({"gradient_norm": 0.1}, {"gradient_norm": [1.0, 0.1, 0.09, 1.0]}, 3),
        ({"gradient_norm": 0.1}, {"gradient_norm": [1.0, math.nan, 1.0]}, None),
        ({"patience": 2, "monitor": "loss"}, {"validation_loss": LOSS}, 6),
        ({"patience": 6, "monitor": "loss"}, {"validation_loss": LOSS}, 10),
        ({"patience": 7, "monitor": "loss"}, {"validation_loss": LOSS}, None),
        ({"patience": 2, "monitor": "accuracy"}, {"validation_accuracy": [0.1, 0.3, 0.2, 0.3, 0.9]}, 4),
        # 0.55 -> 0.6 -> 0.65 improve by 0.05 each: not by more than 0.06 on 0.5 until 0.6
        (
            {"patience": 2, "monitor": "accuracy", "min_delta": 0.06},
            {"validation_accuracy": [0.5, 0.55, 0.6, 0.65, 0.655, 0.7]},
            5,
        ),
        (
            {"patience": 2, "monitor": "accuracy", "min_relative": 0.15},  # 0.5 * 1.15 = 0.575, 0.6 * 1.15 = 0.69
            {"validation_accuracy": [0.5, 0.55, 0.6, 0.65, 0.68, 0.7]},
            5,
        ),
        ({"patience": 1, "gl": 100.0, "monitor": "loss"}, {"validation_loss": [1.0, 3.0]}, 2),  # any rule is enough
    ],
)
def test_a_rule_stops_after_the_epoch_that_was_worked_out_by_hand(
    settings: dict[str, Any], curves: dict[str, list[float]], epoch: int | None
) -> None:
    assert stops_at(settings, **curves) == epoch


def test_a_value_that_is_no_number_is_no_improvement() -> None:
    assert last_improvement([math.nan, 0.5, math.inf, 0.6, math.nan], 0.0, 0.0, maximize=True) == 4
    assert last_improvement([math.nan, math.nan], 0.0, 0.0, maximize=True) == 0
    assert stops_at({"patience": 2, "monitor": "accuracy"}, validation_accuracy=[math.nan, math.nan]) == 2


def test_all_rules_that_say_so_are_named() -> None:
    settings = Stopping(patience=1, monitor="loss", gl=50.0, max_seconds=100.0)
    curves = {"train_loss": [1.0, 1.0], "validation_loss": [1.0, 2.0], "seconds": [1.0, 1.0]}
    assert verdict(settings, curves) == (
        "stopping.patience = 1: validation loss did not improve on the 1 of epoch 1; "
        "stopping.gl = 50: the generalisation loss is 100 %"
    )


@pytest.mark.parametrize(
    ("training", "validation", "since"),
    [
        ([3.0, 2.0, 1.0], [3.0, 2.0, 2.2], 2),  # 10 % above while the training loss fell
        ([3.0, 2.0, 1.0], [3.0, 2.0, 2.09], None),  # 4.5 % above
        ([3.0, 2.0, 2.5], [3.0, 2.0, 2.2], None),  # both rose: that is no overfitting
        ([3.0, 2.0, 1.0], [3.0, 2.0, math.nan], None),
        ([], [], None),
    ],
)
def test_what_overfitting_is(training: list[float], validation: list[float], since: int | None) -> None:
    """Overfitting is a validation loss that rises while the training loss falls."""
    assert overfits_since(training, validation) == since


# --- the study file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"patience": 0}, "stopping.patience = 0: input should be greater than or equal to 1"),
        ({"patiance": 3}, "stopping.patiance: stopping takes no 'patiance' (did you mean 'patience'?)"),
        ({"min_epochs": 3}, "stopping: has no rule; add one of patience, gl, pq, up, max_seconds"),
        (
            {"gl": 5.0, "min_delta": 0.1},
            "stopping.min_delta = 0.1: needs stopping.patience; add it or remove min_delta",
        ),
        ({"gl": 5.0, "strip": 3}, "stopping.strip = 3: needs stopping.pq or stopping.up; add it or remove strip"),
        ({"up": 2, "strip": 1}, "stopping.strip = 1: input should be greater than or equal to 2"),
        ({"gl": 0}, "stopping.gl = 0: input should be greater than 0"),
        ({"patience": 2, "monitor": "acuracy"}, "there is no such metric (did you mean 'accuracy'?)"),
        ({"patience": "none"}, "stopping.patience = 'none': input should be a valid integer"),
    ],
)
def test_what_a_file_says_wrongly_of_stopping_is_told_with_the_mend(table: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as error:
        TrainConfig.from_tree(StudySpec.from_document({**BASE, "stopping": table}).tree)
    assert said in str(error.value)


def test_what_patience_monitors() -> None:
    """Patience monitors what the study is judged by unless it is told otherwise."""

    def monitored(**changes: Any) -> Any:
        return StudySpec.from_document({**BASE, **changes}).stopping.get("monitor")

    assert monitored(stopping={"patience": 3}) == "accuracy"
    assert monitored(stopping={"patience": 3}, metric="macro_f1") == "macro_f1"
    assert monitored(stopping={"patience": 3, "monitor": "loss"}) == "loss"
    assert monitored(stopping={"gl": 3.0}) is None


def test_a_file_without_the_section_has_the_fingerprint_that_it_had() -> None:
    spec = StudySpec.from_document(BASE)
    assert not {"stopping", "watch"} & spec.identity.keys()
    other = StudySpec.from_document({**BASE, "stopping": {"patience": 3}})
    assert other.fingerprint != spec.fingerprint


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"stopping": {"patience": 7}}, None),
        ({"stopping": {"patience": 8}}, "stopping.patience = 8: stops no trial before epoch 9 of 9; lower it"),
        ({"stopping": {"patience": {"low": 3, "high": 30}}}, None),
        ({"stopping": {"up": 2, "strip": 3}}, "stopping.up = 2: stops no trial before epoch 9 of 9"),
        ({"stopping": {"up": 1, "strip": 3}}, None),
        ({"stopping": {"pq": 1.0, "strip": 9}}, "stopping.pq = 1.0: stops no trial before epoch 9 of 9"),
        ({"stopping": {"gl": 1.0, "min_epochs": 9}}, "stopping.min_epochs = 9"),
        (
            {"stopping": {"patience": 5}, "pruner": {"name": "patient", "patience": 3}},
            "pruner.patience = 3 and stopping.patience = 5: the same rule twice",
        ),
    ],
)
def test_what_cannot_stop_anything_or_stops_twice_is_warned_of(changes: dict[str, Any], start: str | None) -> None:
    spec = StudySpec.from_document({**BASE, "pruner": {"name": "none"}, **changes})
    lines = lint(pruners.resolve(samplers.resolve(spec)))
    assert len(lines) == (start is not None)
    assert not start or lines[0].startswith(start)
