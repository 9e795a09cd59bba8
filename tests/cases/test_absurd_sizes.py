"""A number that no machine could carry out is refused when the file is read, before there is a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SpecError
from hpo.spec.study_file import StudySpec
from hpo.study import resolve

MOST = 2**63 - 1
DOCUMENT: dict[str, Any] = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "optimizer": {"name": "sgd", "lr": 0.1},
}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "widths": (
        {"model": {"name": "mlp", "widths": [MOST]}},
        "model.widths.0 = {most}: input should be less than or equal to 16777216",
    ),
    "an end": (
        {"model": {"name": "mlp", "widths": {"choices": [[8], [MOST, 8]]}}},
        "model.widths.0 = {most}: input should be less than or equal to 16777216",
    ),
    "terabytes": (
        {"model": {"name": "mlp", "widths": [2**20, 2**20]}},
        "model.widths = [1048576, 1048576]: makes 1,102,747,533,322 parameters, 4.4 TB of weights; make the model smaller",
    ),
    "terabytes of a choice": (
        {"model": {"name": {"choices": ["mlp", "cnn"]}, "cnn": {"channels": {"choices": [[8], [2**18, 2**18]]}}}},
        "model.cnn.channels = [262144, 262144]: makes 618,651,189,258 parameters, 2.5 TB of weights; make the model smaller",
    ),
    "layers": ({"model": {"name": "mlp", "widths": [8] * 5000}}, "model.widths = [8, 8, "),
    "layers times layers": (
        {"model": {"name": "mlp", "widths": [8] * 1000, "depth": 1000}},
        "model mlp: has 1,000,000 blocks, but at most 5,000 are possible; make it shallower",
    ),
    "depth": (
        {"model": {"name": "cnn", "depth": MOST}},
        "model.depth = {most}: input should be less than or equal to 1000",
    ),
    "epochs": (
        {"training": {"epochs": MOST}},
        "training.epochs = {most}: input should be less than or equal to 1000000",
    ),
    "the schedule": (
        {"training": {"schedule_epochs": MOST}},
        "training.schedule_epochs = {most}: input should be less than or equal to 1000000",
    ),
    "a batch": (
        {"training": {"batch_size": {"choices": [32, MOST]}}},
        "training.batch_size = {most}: input should be less than or equal to 16777216",
    ),
    "threads": (
        {"training": {"threads": MOST}},
        "training.threads = {most}: input should be less than or equal to 4096",
    ),
    "trials": (
        {"budget": {"trials": MOST}},
        "budget.trials = {most}: input should be less than or equal to 2147483647",
    ),
    "workers": ({"workers": MOST}, "workers = {most}: input should be less than or equal to 4096"),
    "slots": ({"slots": MOST}, "slots = {most}: input should be 'auto', or be less than or equal to 65536"),
    "candidates": (
        {"sampler": {"name": "tpe", "n_ei_candidates": MOST}},
        "sampler.n_ei_candidates = {most}: input should be less than or equal to 1000000",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_there_is_a_study(case: str, tmp_path: Path) -> None:
    changes, message = CASES[case]
    with pytest.raises(SpecError) as refused:
        resolve.resolve(StudySpec.from_document(DOCUMENT | changes), tmp_path)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(message.format(most=MOST))
    assert len(lines) == 1


def test_what_is_merely_large_is_not(tmp_path: Path) -> None:
    large = {"model": {"name": "mlp", "widths": [2**16, 2**16]}, "training": {"epochs": 100_000}}
    assert resolve.resolve(StudySpec.from_document(DOCUMENT | large), tmp_path).model["widths"] == [2**16, 2**16]
