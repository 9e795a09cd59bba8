"""What is told of one trial says how often it was taken up, and why, where nothing failed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hpo.spec.failures import Failure, Kind
from hpo.study.study import Study
from hpo.study.trial_history import history
from hpo.view.live import history_text, to_json
from tests.support.trials import begin

MakeStudy = Callable[..., Study]


def park(study: Study) -> None:
    ledger, claim, _ = begin(study)
    ledger.park(claim)


def fail(study: Study) -> None:
    ledger, claim, _ = begin(study)
    ledger.fail(claim, Failure(kind=Kind.DATA_ERROR, message="no such file"))


WAITED = "which is no failure: it waited for its turn in a stack or for a worker"


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
