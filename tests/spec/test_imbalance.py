"""Balanced weights of the loss together with balanced batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpo.spec.imbalance import corrected_twice
from hpo.spec.study_file import StudySpec
from hpo.study import resolve
from tests.support.declared import DOCUMENT

BOTH = {"choices": ["none", "balanced"]}
CROSS = {"name": "cross_entropy", "class_weights": "balanced"}


@pytest.mark.parametrize(
    ("loss", "sampling", "named"),
    [
        (CROSS, "balanced", "loss.class_weights"),
        ({**CROSS, "class_weights": BOTH}, {"choices": ["shuffled", "balanced"]}, "loss.class_weights"),
        ({"name": "bce_with_logits", "pos_weight": "balanced"}, "balanced", "loss.pos_weight"),
        (
            {"name": {"choices": ["cross_entropy", "mse"]}, "cross_entropy": {"class_weights": BOTH}},
            "balanced",
            "loss.cross_entropy.class_weights",
        ),
        (CROSS, "shuffled", None),
        ({**CROSS, "class_weights": [1.0] * 10}, "balanced", None),
        ({"name": "cross_entropy"}, "balanced", None),
    ],
)
def test_a_double_correction_is_named(loss: Any, sampling: Any, named: str | None, tmp_path: Path) -> None:
    document = {**DOCUMENT, "metric": "accuracy", "loss": loss, "training": {"epochs": 3, "sampling": sampling}}
    lines = list(corrected_twice(resolve.resolve(StudySpec.from_document(document), tmp_path)))
    assert [line.partition(" = ")[0] for line in lines] == ([named] if named else [])
    assert all("and training.sampling = " in line for line in lines)


def test_a_space_of_the_user_s_own_may_use_the_same_words() -> None:
    space = {"training": {"sampling": {"choices": ["balanced", "none"]}}, "loss": {"low": 0.0, "high": 1.0}}
    document = {"name": "s", "train": "mine.py:f", "direction": "minimize", "space": space}
    assert list(corrected_twice(StudySpec.from_document(document))) == []
