"""What is told of one trial says how often it was taken up, and why, where nothing failed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.queue.models import Checkpoint
from hpo.spec.failures import Failure, Kind
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.study.trial_history import history
from hpo.view.pages import history_text, status_text, to_json
from tests.support.trials import begin

MakeStudy = Callable[..., Study]


def park(study: Study) -> None:
    ledger, claim, _ = begin(study)
    ledger.park(claim)


def fail(study: Study) -> None:
    ledger, claim, _ = begin(study)
    ledger.fail(claim, Failure(kind=Kind.DATA_ERROR, message="no such file"))


WAITED = "which is not a failure: it waited for its turn in a stack or for a worker"


@pytest.mark.both
@pytest.mark.parametrize(
    ("before", "told"),
    [
        ([], "attempt  1, by w"),
        ([park], f"attempt  2, by w; parked once before, {WAITED}"),
        ([fail], "attempt  2, by w"),
        ([park, fail, park], f"attempt  4, by w; parked twice before, {WAITED}"),
        ([park] * 3, f"attempt  4, by w; parked 3 times before, {WAITED}"),
    ],
)
def test_an_attempt_after_one_that_was_parked_is_told_as_no_failure(
    make_study: MakeStudy, before: list[Callable[[Study], None]], told: str
) -> None:
    study = make_study()
    for end in before:
        end(study)
    begin(study)
    found = history(study, 0)
    assert told in history_text(found).splitlines()
    assert to_json(found)["parked"] == before.count(park)
    assert [one.attempt for one in found.failures] == [at for at, end in enumerate(before, start=1) if end is fail]


def test_what_the_objective_set_and_reported_is_told(make_study: MakeStudy) -> None:
    _, _, trial = begin(study := make_study())
    trial.set_user_attr("note", "two words")
    trial.set_user_attr("sizes", [1, 2])
    for step, value in ((2, 0.5), (4, 0.25), (6, 0.0)):
        trial.report(value, step)
    found = history(study, 0)
    told = {"note": "two words", "sizes": [1, 2]}
    assert (found.attributes, found.curve) == (told, {2: 0.5, 4: 0.25, 6: 0.0})
    assert "value    - after 3 reports" in history_text(found).splitlines()
    assert "running  trial 0, step 6, 0.0000," in status_text(summarize(study))
    lines = history_text(found).splitlines()
    assert {"set      note = two words", "set      sizes = [1, 2]"} <= {*lines}
    assert [line.endswith("  0.5000 at step 2 to 0.0000 at step 6") for line in lines if line.startswith("curve")] == [
        True
    ]


def test_a_checkpoint_is_named_while_its_file_is_there(make_study: MakeStudy, tmp_path: Path) -> None:
    study, file = make_study(), tmp_path / "attempt-1-epoch-2-1.pt"
    ledger, claim, _ = begin(study)
    ledger.record_checkpoint(claim, Checkpoint(epoch=2, path=str(file), digest="d"))
    file.touch()
    found = history(study, 0)
    assert (found.checkpoint, f"saved    {file}" in history_text(found).splitlines()) == (str(file), True)
    file.unlink()
    found = history(study, 0)
    assert (found.checkpoint, "saved" in history_text(found)) == (None, False)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (
            [0.5, 0.75, 0.25],
            [
                "curve    ▅█▁  0.5000 at step 1 to 0.2500 at step 3",
                "judged   ▁██  0.5000 at step 1 to 0.7500 at step 3",
            ],
        ),
        ([0.5, 0.75], ["curve    ▁██  0.5000 at step 1 to 0.7500 at step 3"]),  # the last value is not written yet
        ([], ["curve    ▁██  0.5000 at step 1 to 0.7500 at step 3"]),
    ],
)
def test_the_raw_curve_is_told_beside_the_one_that_is_judged(
    make_study: MakeStudy, raw: list[float], told: list[str]
) -> None:
    _, _, trial = begin(study := make_study())
    for step, value in ((1, 0.5), (2, 0.75), (3, 0.75)):
        trial.report(value, step)
    page = history_text(replace(history(study, 0), raw=raw)).splitlines()
    assert [line for line in page if line.startswith(("curve", "judged"))] == told


def test_a_curve_that_ends_in_nan_is_told_once(make_study: MakeStudy) -> None:
    _, _, trial = begin(study := make_study())
    for step, value in ((1, 0.5), (2, math.nan)):
        trial.report(value, step)
    page = history_text(replace(history(study, 0), raw=[0.5, math.nan])).splitlines()
    assert [line.split()[0] for line in page if line.startswith(("curve", "judged"))] == ["curve"]
