"""The configurations of `[[start]]`: checked with the file, queued once with the study, part of its identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpo.errors import MismatchError, SpecError
from hpo.launch import search
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import connect
from hpo.study import resolve, status
from hpo.study import study as studies
from hpo.study.resolve import StudyFile
from hpo.study.study import Study
from hpo.view import checked
from tests.conftest import OWN_OBJECTIVE
from tests.support import racing
from tests.support.trials import MakeStudy, claim_one

SMALL = """
name = "small"
[data]
name = "digits"
[model]
name = "mlp"
widths = { choices = [[16], [32, 16]] }
[optimizer]
name = { choices = ["sgd", "adamw"] }
lr = { low = 1e-3, high = 0.1, log = true }
[optimizer.sgd]
momentum = { low = 0.0, high = 0.9 }
"""
START = """
[[start]]
optimizer.lr = 0.01
model.widths = [16]
[[start]]
optimizer = { name = "sgd", sgd.momentum = 0.5 }
"""


def read(tmp_path: Path, text: str) -> StudyFile:
    (tmp_path / "small.toml").write_text(text)
    return resolve.read(tmp_path / "small.toml")


def made(study: Study, file: StudyFile) -> Study:
    return studies.create_or_join(study.storage, file.spec, code_folder=file.code_folder, code_digest="")


def queued(study: Study) -> list[dict[str, Any]]:
    return [trial.system_attrs["fixed_params"] for trial in study.optuna.get_trials() if trial.state.name == "WAITING"]


def test_a_file_without_start_keeps_its_fingerprint_and_one_with_it_has_another(tmp_path: Path) -> None:
    without, with_start = read(tmp_path, SMALL).spec, read(tmp_path, SMALL + START).spec
    assert "start" not in without.document
    assert without.fingerprint != with_start.fingerprint
    quoted = START.replace("optimizer.lr", '"optimizer.lr"').replace("model.widths", '"model.widths"')
    assert read(tmp_path, SMALL + quoted).spec.fingerprint == with_start.fingerprint
    assert with_start.start == [
        {"optimizer.lr": 0.01, "model.widths": [16]},
        {"optimizer.name": "sgd", "optimizer.sgd.momentum": 0.5},
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "[[start]]\noptimizer.lr = 1\n",
            r"\[\[start\]\]: optimizer\.lr = 1: is not in .*; the nearest legal value is 0\.1",
        ),
        (
            "[[start]]\nlr = 0.1\n",
            r"\[\[start\]\]: lr: the study does not search it \(did you mean 'optimizer\.lr'\?\)",
        ),
        (
            "[[start]]\noptimizer.lr = 0.1\nseed = 3\n",
            r"^[^:]*: seed: stands below \[\[start\]\], so .*; write it above$",
        ),
        ("[[start]]\n", r"\[\[start\]\]: no value that the study searches is given"),
        ("[[start]]\ntraining.epochs = 20\n", r"\[\[start\]\]: no value that the study searches is given"),
        ("[start]\noptimizer.lr = 0.1\n", r"start = .*: is one table; write \[\[start\]\], with two brackets"),
        ("[[start]]\noptimizer.lr = 2026-01-01\n", r"start\.optimizer\.lr: 2026-01-01 is a date"),
    ],
)
def test_a_wrong_start_is_refused_with_its_place(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=why):
        read(tmp_path, SMALL + text)


@pytest.mark.both
def test_it_is_queued_with_the_study_and_not_again(make_study: MakeStudy, tmp_path: Path) -> None:
    file = read(tmp_path, SMALL + START)
    study = made(make_study(), file)
    first = [
        {"optimizer.lr": 0.01, "model.widths": "[16]"},
        {"optimizer.name": "sgd", "optimizer.sgd.momentum": 0.5},
    ]
    assert queued(study) == first
    assert queued(made(study, file)) == first
    claim_one(study.ledger("w"))
    assert queued(made(study, file)) == first[1:]
    summary = status.summarize(study)
    assert (summary.spent, summary.counts["waiting"], summary.budget) == (1, 1, 64)


def test_another_start_is_refused_with_the_difference_and_the_way_on(make_study: MakeStudy, tmp_path: Path) -> None:
    study = made(make_study(), read(tmp_path, SMALL + START))
    for text, line in {
        SMALL + START.replace("0.5", "0.6"): "  start.2.optimizer.sgd.momentum: the study has 0.5, the file has 0.6",
        SMALL: "  start.1.model.widths: the study has [16], the file has nothing",
    }.items():
        with pytest.raises(MismatchError) as refused:
            made(study, read(tmp_path, text))
        assert line in refused.value.lines
        told = "(The configurations of start are queued once, when the study is made; `hpo enqueue small` queues more.)"
        assert told in refused.value.lines


@pytest.mark.both
def test_of_eight_processes_one_killed_amid_it_the_configurations_are_queued_once(
    bare_url: str, tmp_path: Path
) -> None:
    document = {**OWN_OBJECTIVE, "checkpoints": str(tmp_path), "start": [{"x": 0.25}, {"x": 0.5}]}
    uids = racing.race_with_a_kill(bare_url, document, 8)
    assert len(set(uids)) == 1
    place = connect(bare_url)
    try:
        assert queued(studies.join(place, "own")) == [{"x": 0.25}, {"x": 0.5}]
    finally:
        place.close()


def test_code_may_change_while_nothing_but_start_is_there(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(start=[{"x": 0.25}])
    again = {"code_folder": tmp_path, "code_digest": "new"}
    assert studies.create_or_join(study.storage, study.spec, **again).uid == study.uid
    claim_one(study.ledger("w"))
    with pytest.raises(MismatchError, match="your own code"):
        studies.create_or_join(study.storage, study.spec, code_folder=tmp_path, code_digest="newer")


def test_a_new_study_that_no_worker_could_join_is_known_by_its_start_alone(make_study: MakeStudy) -> None:
    study = make_study(start=[{"x": 0.25}])
    opened = search.Opened(study=study, code_folder=study.code_folder, is_new=True, standing=status.summarize(study))
    assert search._is_ours_alone(opened)
    claim_one(study.ledger("w"))
    assert not search._is_ours_alone(opened)


def test_check_shows_it(tmp_path: Path) -> None:
    shown = checked.spec_text(read(tmp_path, SMALL + START).spec).splitlines()
    assert shown[-3:] == [
        "start, tried first:",
        "  optimizer.lr = 0.01, model.widths = [16]",
        "  optimizer.name = 'sgd', optimizer.sgd.momentum = 0.5",
    ]
    spec = StudySpec.from_document({**OWN_OBJECTIVE, "start": [{"x": 0.25}]})
    assert checked.spec_text(spec).splitlines()[-2:] == [
        "start, tried first, not checked: hpo does not know the objective's space:",
        "  x = 0.25",
    ]
