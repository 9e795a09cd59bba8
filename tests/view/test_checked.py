"""The pages of `hpo check`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from hpo import data
from hpo.data import Source
from hpo.spec.study_file import StudySpec
from hpo.study import resolve
from hpo.view import checked
from tests.support.declared import DOCUMENT


def constants(folder: Path, data: dict[str, object]) -> list[str]:
    spec = resolve.resolve(StudySpec.from_document({**DOCUMENT, "data": data}), folder)
    return [line.strip() for line in checked.spec_text(spec).splitlines() if line.startswith("  data.")]


def test_the_reading_is_shown_where_it_is_not_the_usual_one(tmp_path: Path) -> None:
    table = {"name": "csv", "images": "images.csv", "labels": "labels.csv", "shape": [8, 8]}
    usual = constants(tmp_path, table)
    assert usual[0] == 'data.name = "csv"'
    assert [line for line in usual if "reading" in line] == []
    assert "data.reading = 1" in constants(tmp_path, {**table, "reading": 1})


def test_a_model_that_reads_padding_is_named_with_its_share() -> None:
    tokens = torch.arange(1, 41).repeat(20)[: 20 * 8].view(20, 8) % 9 + 1
    tokens[:, 6:] = 0
    source = Source(inputs=tokens, targets=torch.arange(20) % 2, num_classes=2)
    found = data.overview(source, data.load(source, split_seed=0, device="cpu"), split_seed=0)

    def lines(name: object) -> list[str]:
        return checked._padding_lines(StudySpec.from_document({**DOCUMENT, "model": {"name": name}}), found)

    assert [line.partition(", so ")[0] for line in lines({"choices": ["gru", "cnn1d"]})] == [
        "note: cnn1d reads padding as steps of the text, 25% of all in training"
    ]
    assert lines("gru") == []
    found = replace(found, padding=0.004)
    assert "of the text, less than 1% of all in training, so" in lines("cnn1d")[0]
    assert (
        checked._padding_lines(
            StudySpec.from_document({**DOCUMENT, "model": {"name": "cnn1d"}}), replace(found, padding=0.0)
        )
        == []
    )


def test_constants_are_headed_only_if_there_are_some() -> None:
    document = {"name": "s", "train": "mine.py:f", "direction": "minimize", "space": {"x": {"low": 0.0, "high": 1.0}}}
    assert checked.spec_text(StudySpec.from_document(document)).splitlines()[-1] == "  x  { low = 0.0, high = 1.0 }"
    document["space"] = {"x": {"low": 0.0, "high": 1.0}, "y": 2}
    assert checked.spec_text(StudySpec.from_document(document)).splitlines()[-2:] == ["constants:", "  y = 2"]


def test_what_auto_stands_for_is_shown_with_its_reason(tmp_path: Path) -> None:
    document = {**DOCUMENT, "sampler": {"name": "auto"}, "pruner": {"name": "auto"}, "training": {"epochs": 27}}
    lines = checked.spec_text(resolve.resolve(StudySpec.from_document(document), tmp_path)).splitlines()
    (sampler,) = [line for line in lines if line.startswith("sampler: ")]
    assert sampler.startswith("sampler: auto: fidelity_tpe (n_startup_trials = 10, ")
    assert sampler.endswith("), since the space is no grid")
    assert (
        "pruner: auto (reduction_factor = 3): rungs at epochs 1, 3, 9 of 27; one trial in 27 trains to its end" in lines
    )
