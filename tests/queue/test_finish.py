"""A failed attempt is parked or ends the trial as the study's policy says, and too many ends by one kind stop the study."""

from __future__ import annotations

import math

import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import LostLease
from hpo.queue.claiming import Idle
from hpo.queue.ledger import Ledger
from hpo.queue.models import Checkpoint, Claim
from hpo.spec.failures import Failure, Kind, Policies, Verdict
from hpo.storage.tables import Hold, hpo_failures, hpo_studies
from hpo.study import control
from hpo.study.study import Study
from tests.support.rows import recorded_failures
from tests.support.trials import (
    MakeStudy,
    begin,
    claim_one,
    finish_claim,
    row_of,
    trial_of,
)

pytestmark = pytest.mark.both

RETRY, FAIL, PRUNE, DROP = Verdict.RETRY, Verdict.FAIL, Verdict.PRUNE, Verdict.DROP
AN_EXCEPTION = Failure(kind=Kind.EXCEPTION, message="ValueError: no", traceback="Traceback: ...")
OF_MEMORY = Failure(kind=Kind.OUT_OF_MEMORY, message="CUDA out of memory")
NO_DATA = Failure(kind=Kind.DATA_ERROR, message="no such file")
AT = {1: Checkpoint(epoch=1, path="/c.pt", digest="abc")}


def failure(kind: Kind) -> Failure:
    return Failure(kind=kind, message=f"by {kind}")


def attempt(study: Study, failed: Failure, *curve: float, accumulation: int | None = None) -> Verdict:
    """Take up a trial, report this curve, and fail."""
    ledger, claim, trial = begin(study)
    for step, value in enumerate(curve, start=1):
        trial.report(value, step)
    return ledger.fail(claim, failed, accumulation=accumulation)


def standing(study: Study) -> tuple[str | None, str | None, int]:
    """Return what has stopped the study, how, and how many trials in a row one kind has ended."""
    with study.storage.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_studies).where(hpo_studies.c.uid == study.uid)).one()
        return row.stop_reason, row.hold, row.streak


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.LEASE_LOST}))
def test_a_trial_is_retried_as_its_failure_allows(kind: Kind, make_study: MakeStudy) -> None:
    """A trial is retried as often as its kind of failure allows and then ends."""
    study = make_study(trials=1)
    policy = Policies().of(kind)
    end = PRUNE if policy.then == "prune" else FAIL
    verdicts = [attempt(study, failure(kind), 0.5) for _ in range(policy.retries + 1)]
    assert verdicts == [RETRY] * policy.retries + [end]
    assert recorded_failures(study) == [(n, kind, verdict) for n, verdict in enumerate(verdicts, start=1)]
    trial = trial_of(study, 0)
    assert (trial.state.name, trial.value) == (("PRUNED", 0.5) if end == PRUNE else ("FAIL", None))
    assert claim_one(study.ledger("w")) is Idle.DONE


def test_retries_are_counted_for_each_kind_by_itself(make_study: MakeStudy) -> None:
    study = make_study(trials=1, failures={"exception": {"retries": 1}, "data_error": {"retries": 1}})
    verdicts = [attempt(study, failed) for failed in (AN_EXCEPTION, NO_DATA, OF_MEMORY, AN_EXCEPTION)]
    assert verdicts == [RETRY, RETRY, RETRY, FAIL]


def test_retries_are_counted_for_each_trial_by_itself(make_study: MakeStudy) -> None:
    study = make_study(trials=2, failures={"exception": {"retries": 1}})
    (one, first, _), (_, second, _) = begin(study), begin(study)
    assert [one.fail(claim, AN_EXCEPTION) for claim in (first, second)] == [RETRY, RETRY]
    assert [attempt(study, AN_EXCEPTION) for _ in range(2)] == [FAIL, FAIL]


def test_an_attempt_that_was_parked_without_failing_is_no_retry(make_study: MakeStudy) -> None:
    study = make_study(trials=1, failures={"exception": {"retries": 1}})
    for _ in range(3):
        ledger, claim, _ = begin(study)
        ledger.park(claim)
    assert [attempt(study, AN_EXCEPTION) for _ in range(2)] == [RETRY, FAIL]


def test_a_retried_trial_keeps_its_number_and_curve(make_study: MakeStudy) -> None:
    """A retried trial is parked and keeps its number its parameters and its curve."""
    study = make_study(trials=1)
    ledger, claim, trial = begin(study, "first")
    x = trial.suggest_float("x", 0, 1)
    trial.report(0.5, 1)
    ledger.record_checkpoint(claim, AT[1])
    assert ledger.fail(claim, NO_DATA) is RETRY
    row = row_of(study, claim)
    assert (row.settled, row.lease_until, row.outcome, row.reason) == (False, None, None, None)
    _, again, trial = begin(study, "second")
    assert (again.number, again.attempt, again.checkpoint) == (0, 2, AT[1])
    assert trial.params == {"x": x}
    assert trial_of(study, 0).intermediate_values == {1: 0.5}


def test_a_trial_without_retries_left_says_why_it_ended(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger, claim, _ = begin(study)
    assert ledger.fail(claim, AN_EXCEPTION) is FAIL
    row = row_of(study, claim)
    assert (row.settled, row.lease_until) == (True, None)
    assert (row.outcome, row.reason) == ("exception", "ValueError: no")
    assert trial_of(study, 0).datetime_complete is not None


@pytest.mark.parametrize(
    ("curve", "value"),
    [((0.5, 0.25), 0.25), ((0.5, math.nan), 0.5), ((0.5, math.inf, -math.inf), 0.5), ((math.nan,), None), ((), None)],
)
def test_a_trial_pruned_for_a_failure_keeps_a_value(
    curve: tuple[float, ...], value: float | None, make_study: MakeStudy
) -> None:
    """A trial pruned for a failure keeps the last finite value it reported."""
    study = make_study(trials=1)
    assert attempt(study, failure(Kind.DIVERGED), *curve) is PRUNE
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (TrialState.PRUNED, value)


def test_a_failed_trial_has_no_value_whatever_it_reported(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    attempt(study, AN_EXCEPTION, 0.5)
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (TrialState.FAIL, None)


# --- memory -----------------------------------------------------------------------------------------------------------


def fail_at_a_checkpoint(study: Study, failed: Failure, accumulation: int | None) -> Claim:
    """Fail after two epochs, the first of which is in a checkpoint; return the claim of the next attempt."""
    ledger, claim, trial = begin(study)
    trial.report(0.5, 1)
    ledger.record_checkpoint(claim, AT[1])
    trial.report(0.25, 2)
    assert ledger.fail(claim, failed, accumulation=accumulation) is RETRY
    assert trial_of(study, 0).intermediate_values == {1: 0.5, 2: 0.25}  # a curve is cut when the trial is taken up
    return begin(study)[1]


def test_out_of_memory_starts_over_with_smaller_batches(make_study: MakeStudy) -> None:
    """A trial out of memory that can accumulate starts over with smaller batches."""
    study = make_study(trials=1)
    again = fail_at_a_checkpoint(study, OF_MEMORY, accumulation=2)
    assert (again.attempt, again.accumulation, again.checkpoint) == (2, 2, None)
    assert trial_of(study, 0).intermediate_values == {}
    assert study.ledger("w").curve(again, "value") == []


def test_out_of_memory_without_accumulation_goes_on(make_study: MakeStudy) -> None:
    """A trial out of memory that cannot accumulate goes on from its checkpoint."""
    study = make_study(trials=1)
    again = fail_at_a_checkpoint(study, OF_MEMORY, accumulation=None)
    assert (again.attempt, again.accumulation, again.checkpoint) == (2, 1, AT[1])
    assert trial_of(study, 0).intermediate_values == {1: 0.5}


def test_a_study_that_does_not_halve_goes_on_from_the_checkpoint(make_study: MakeStudy) -> None:
    study = make_study(trials=1, failures={"out_of_memory": {"halve": False}})
    again = fail_at_a_checkpoint(study, OF_MEMORY, accumulation=2)
    assert (again.accumulation, again.checkpoint) == (1, AT[1])


def test_only_memory_makes_batches_smaller(make_study: MakeStudy) -> None:
    again = fail_at_a_checkpoint(make_study(trials=1), NO_DATA, accumulation=2)
    assert (again.accumulation, again.checkpoint) == (1, AT[1])


def test_the_accumulation_stays_over_other_failures(make_study: MakeStudy) -> None:
    """The accumulation stays over attempts that fail by something else."""
    study = make_study(trials=1)
    for failed, accumulation in ((OF_MEMORY, 2), (NO_DATA, 4), (OF_MEMORY, 4)):
        assert attempt(study, failed, accumulation=accumulation) is RETRY
    assert begin(study)[1].accumulation == 4


# --- written once, and anything can be written ------------------------------------------------------------------------


@pytest.mark.parametrize("failed", [AN_EXCEPTION, NO_DATA], ids=["at its end", "with retries left"])
def test_failing_twice_for_one_attempt_is_failing_once(failed: Failure, make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    ledger, claim, _ = begin(study)
    first = ledger.fail(claim, failed)
    before = row_of(study, claim), recorded_failures(study), standing(study)
    assert ledger.fail(claim, failed) is first  # the commit's answer was lost, and the call is made again
    assert (row_of(study, claim), recorded_failures(study), standing(study)) == before


def test_a_second_end_of_another_kind_changes_nothing(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger, claim, _ = begin(study)
    ledger.fail(claim, AN_EXCEPTION)
    for end in (
        lambda: ledger.fail(claim, failure(Kind.DIVERGED)),
        lambda: finish_claim(ledger, claim, TrialState.COMPLETE, 1.0, outcome="complete"),
        lambda: ledger.end_as_stopped(claim),
    ):
        with pytest.raises(LostLease):
            end()
    assert recorded_failures(study) == [(1, "exception", "fail")]
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (TrialState.FAIL, None)


def test_a_failure_of_another_s_trial_is_not_written(make_study: MakeStudy) -> None:
    """A failure of a trial that another worker has by now is not written."""
    study = make_study(trials=1)
    ledger, claim, _ = begin(study, "old")
    ledger.park(claim)
    _, again, _ = begin(study, "new")
    with pytest.raises(LostLease):
        ledger.fail(claim, AN_EXCEPTION)
    assert recorded_failures(study) == []
    assert row_of(study, again).worker == "new"
    assert trial_of(study, 0).state == TrialState.RUNNING


@pytest.mark.parametrize("failed", [AN_EXCEPTION, NO_DATA], ids=["at its end", "with retries left"])
def test_a_failure_of_a_trial_that_was_ended_elsewhere_is_not_written(failed: Failure, make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger, claim, _ = begin(study)
    study.optuna.tell(0, 0.5)
    assert ledger.fail(claim, failed) is DROP
    assert recorded_failures(study) == []
    assert (trial_of(study, 0).state, trial_of(study, 0).value) == (TrialState.COMPLETE, 0.5)


def test_a_dropped_trial_is_written_down_and_not_touched(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    ledger, claim, _ = begin(study, "old")
    ledger.park(claim)
    _, again, _ = begin(study, "new")
    before = row_of(study, again)
    ledger.drop(claim, "it was taken up")
    assert recorded_failures(study) == [(1, "lease_lost", "drop")]
    assert row_of(study, again) == before


@pytest.mark.parametrize("failed", [AN_EXCEPTION.kind, NO_DATA.kind])
def test_any_message_and_any_traceback_can_be_stored(failed: Kind, make_study: MakeStudy) -> None:
    study = make_study(trials=2, failures={"in_a_row": 1})
    text = "a NUL \0, a lone surrogate \udcff, an emoji \N{SNOWMAN}"
    shown = "a NUL \\0, a lone surrogate \\udcff, an emoji \N{SNOWMAN}"
    ledger, claim, _ = begin(study)
    ledger.fail(claim, Failure(kind=failed, message=text, traceback=text * 10_000))
    with study.storage.engine.connect() as connection:
        row = connection.execute(sa.select(hpo_failures)).one()
    assert (row.message, row.traceback) == (shown, shown * 10_000)
    if row.verdict == FAIL:
        assert row_of(study, claim).reason == shown
        assert standing(study)[0] == f"1 trials in a row ended by {failed}, the last: {shown}"


def test_a_failure_without_a_traceback_has_none(make_study: MakeStudy) -> None:
    study = make_study(trials=1)
    attempt(study, NO_DATA)
    with study.storage.engine.connect() as connection:
        assert connection.execute(sa.select(hpo_failures.c.traceback)).scalar_one() is None


# --- too many in a row ------------------------------------------------------------------------------------------------


def complete(study: Study, state: TrialState = TrialState.COMPLETE) -> None:
    ledger, claim, _ = begin(study)
    finish_claim(ledger, claim, state, 0.5, outcome=state.name.lower())


def test_trials_ended_by_one_kind_one_after_the_other_break_the_study(make_study: MakeStudy) -> None:
    study = make_study(trials=10, failures={"in_a_row": 3})
    for _ in range(2):
        attempt(study, AN_EXCEPTION)
    assert standing(study) == (None, None, 2)
    attempt(study, AN_EXCEPTION)
    reason, hold, _ = standing(study)
    assert reason == "3 trials in a row ended by exception, the last: ValueError: no"
    assert hold == Hold.BROKEN
    assert claim_one(study.ledger("w")) is Idle.DONE


@pytest.mark.parametrize("kind", [Kind.DIVERGED, Kind.TIME_LIMIT])
def test_trials_pruned_for_a_failure_count_as_well(kind: Kind, make_study: MakeStudy) -> None:
    study = make_study(trials=10, failures={"in_a_row": 2})
    for _ in range(2):
        attempt(study, failure(kind), 0.5)
    assert standing(study)[1] == Hold.BROKEN


def test_another_kind_in_between_begins_the_count_anew(make_study: MakeStudy) -> None:
    study = make_study(trials=10, failures={"in_a_row": 3})
    for failed in [AN_EXCEPTION, AN_EXCEPTION, failure(Kind.DIVERGED), AN_EXCEPTION, AN_EXCEPTION]:
        attempt(study, failed)
    assert standing(study) == (None, None, 2)


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED])
def test_a_trial_that_does_not_fail_ends_the_row(state: TrialState, make_study: MakeStudy) -> None:
    study = make_study(trials=10, failures={"in_a_row": 2})
    attempt(study, AN_EXCEPTION)
    complete(study, state)
    assert standing(study) == (None, None, 0)
    attempt(study, AN_EXCEPTION)
    assert standing(study) == (None, None, 1)


def test_retries_and_lost_leases_are_not_counted(make_study: MakeStudy) -> None:
    study = make_study(trials=10, failures={"in_a_row": 2, "exception": {"retries": 5}})
    ledger, claim, _ = begin(study, "old")
    ledger.park(claim)
    ledger.drop(claim, "taken")
    for _ in range(5):
        assert attempt(study, AN_EXCEPTION) is RETRY
    assert standing(study) == (None, None, 0)
    assert attempt(study, AN_EXCEPTION) is FAIL
    assert standing(study) == (None, None, 1)


def test_trials_that_a_person_ended_neither_count_nor_end_the_row(make_study: MakeStudy) -> None:
    study = make_study(trials=10, failures={"in_a_row": 2})
    attempt(study, AN_EXCEPTION)
    ledger, claim, _ = begin(study)
    ledger.end_as_stopped(claim)
    assert standing(study) == (None, None, 1)


def test_a_broken_study_goes_on_by_hand_and_counts_from_nought(make_study: MakeStudy) -> None:
    study = make_study(trials=10, failures={"in_a_row": 2})
    for _ in range(2):
        attempt(study, AN_EXCEPTION)
    control.resume(study)
    assert standing(study) == (None, None, 0)
    attempt(study, AN_EXCEPTION)
    assert standing(study) == (None, None, 1)
    attempt(study, AN_EXCEPTION)
    assert standing(study)[1] == Hold.BROKEN


def test_trials_that_run_as_a_study_breaks_may_end(make_study: MakeStudy) -> None:
    """Trials that run in a study as it breaks may end and the first reason stands."""
    study = make_study(trials=10, failures={"in_a_row": 2})
    others: list[tuple[Ledger, Claim]] = [begin(study)[:2] for _ in range(2)]
    for _ in range(2):
        attempt(study, AN_EXCEPTION)
    broken = standing(study)
    (ledger, failing), (_, good) = others
    assert not ledger.commands_of([good])[good].park
    assert ledger.fail(failing, AN_EXCEPTION) is FAIL
    finish_claim(ledger, good, TrialState.COMPLETE, 0.5, outcome="complete")
    assert standing(study)[:2] == broken[:2]
    assert trial_of(study, good.number).value == 0.5


def test_one_study_s_failures_do_not_break_another(make_study: MakeStudy) -> None:
    one, other = (make_study(trials=10, name=name, failures={"in_a_row": 2}) for name in ("one", "other"))
    for study in (one, other):
        attempt(study, AN_EXCEPTION)
    assert standing(one) == standing(other) == (None, None, 1)
