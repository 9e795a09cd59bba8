"""An own objective's reports are stored as Optuna stores them: whatever order their steps come in, and none of them moved.

Steps run downwards, folds report beside one another from threads, the first of all may be step 0.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.queue.models import Claim
from hpo.spec.curve import ValueRule
from hpo.spec.failures import Failure, Kind
from hpo.storage.retry import Retry
from hpo.storage.tables import hpo_curves
from hpo.strategy import pruners
from hpo.study.study import Study
from hpo.worker.attempt import fail, open_trial
from hpo.worker.trial import LeasedTrial
from tests.support.trials import MakeStudy, claim_one, end_trial, held, refused, trial_of

ORDERS = {
    "downwards": [5, 4, 3, 2, 1, 0],
    "upwards from 0": [0, 1, 2, 3],
    "upwards from 1": [1, 2, 3],
    "0 in the middle": [3, 0, 7],
    "0 first, then apart": [0, 100, 50],
    "a step twice": [2, 1, 2, 1, 0, 0],
}


def begun(study: Study) -> LeasedTrial:
    ledger = study.ledger("w")
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    return open_trial(study, *held(ledger, claim, Retry(60.0)))


def raw(study: Study) -> dict[int, float]:
    with study.storage.engine.connect() as connection:
        return {row.epoch: row.value for row in connection.execute(sa.select(hpo_curves).order_by(hpo_curves.c.epoch))}


def reported(trial: Any, steps: list[int]) -> None:
    for count, step in enumerate(steps):
        trial.report(count / 8, step)


@pytest.mark.filterwarnings("ignore:.*already")
@pytest.mark.parametrize("order", ORDERS)
def test_every_step_is_stored_as_optuna_stores_it(order: str, make_study: MakeStudy) -> None:
    study, plain = make_study(direction="maximize"), optuna.create_study(direction="maximize")
    ours, optunas = begun(study), plain.ask()
    for trial in (ours, optunas):
        reported(trial, ORDERS[order])
    end_trial(ours, TrialState.COMPLETE, 0.5)
    plain.tell(optunas, 0.5)
    stored = trial_of(study, 0)
    assert stored.intermediate_values == plain.trials[0].intermediate_values == raw(study)
    assert stored.last_step == plain.trials[0].last_step


def test_a_repeated_step_is_told_and_ignored(make_study: MakeStudy) -> None:
    trial = begun(make_study())
    trial.report(0.5, 1)
    with pytest.warns(UserWarning, match="trial 0: step 1 was reported already; ignored"):
        trial.report(0.75, 1)
    assert trial.curve == [0.5]


def test_folds_that_report_from_threads_are_all_stored(make_study: MakeStudy) -> None:
    study = make_study()
    trial = begun(study)
    together = threading.Barrier(4)

    def fold(first: int) -> None:
        together.wait()
        for step in range(first, 20, 4):
            trial.report(step / 4, step)

    threads = [threading.Thread(target=fold, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trial_of(study, 0).intermediate_values == {step: step / 4 for step in range(20)}


@pytest.mark.parametrize("order", [[1, 2, 3, 4], [4, 3, 2, 1], [3, 1, 4, 2]])
@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("best", [0.25, 0.75, 0.75, 0.75]),
        ("last", [0.25, 0.75, 0.5, 0.0]),
        ("mean of last 2", [0.25, 0.5, 0.625, 0.25]),
    ],
)
def test_the_rule_sees_the_steps_in_their_order(
    rule: str, wanted: list[float], order: list[int], make_study: MakeStudy
) -> None:
    study = make_study(value=rule, direction="maximize")
    trial, curve = begun(study), dict(zip(range(1, 5), [0.25, 0.75, 0.5, 0.0], strict=True))
    for step in order:
        trial.report(curve[step], step)
    assert trial_of(study, 0).intermediate_values == dict(zip(curve, wanted, strict=True))
    assert trial.judge(None) == wanted[-1]
    trial.client.flush()
    assert raw(study) == curve


class Counting(ValueRule):
    """Counts how many numbers it is asked about."""

    numbers: ClassVar[list[int]] = []

    def __call__(self, curve: Sequence[float]) -> float:
        self.numbers.append(len(curve))
        return super().__call__(curve)


@pytest.mark.parametrize(
    ("rule", "curve", "most", "numbers"),
    [
        (Counting(kind="last", direction="minimize"), range(40), 1, 1),
        (Counting(kind="mean", last=3, direction="minimize"), range(40), 3, 6),
        (Counting(kind="best", direction="minimize"), range(40), 1, 1),  # the earlier steps are worse
        (Counting(kind="best", direction="minimize"), range(40, 0, -1), 40, 1),  # each is the best of all behind it
    ],
)
def test_falling_steps_cost_one_statement_each_and_no_look_at_what_does_not_change(
    rule: Counting, curve: Sequence[int], most: int, numbers: int, make_study: MakeStudy
) -> None:
    study = make_study(direction="minimize")
    trial, rows = begun(study), []
    trial.rule = rule

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO trial_intermediate_values" in statement:
            rows.append(statement)

    sa.event.listen(study.storage.engine, "before_cursor_execute", note)
    for step, value in zip(range(40, 1, -1), curve, strict=False):
        rule.numbers.clear()
        trial.report(value, step)
        assert sum(rule.numbers) <= numbers
    assert 0 < len(rows) <= 39  # while the database is slow, several reports are sent by one statement
    assert len(trial._reports_of(curve[-1], 1)) == most


@pytest.mark.parametrize("rule", ["best", "last", "mean of last 1", "mean of last 3"])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_what_changes_behind_a_step_is_what_the_rule_says_of_the_whole(rule: str, direction: Any) -> None:
    judge, dice = ValueRule.parse(rule, direction), random.Random(0)
    numbers = [-math.inf, math.inf, math.nan, 0.0, 0.25, 0.5, 0.75]
    for _ in range(300):
        curve = dice.choices(numbers, k=dice.randint(1, 8))
        place = dice.randrange(len(curve))
        before, number = curve[:place] + curve[place + 1 :], curve[place]
        later = [judge(before[: end + 1]) for end in range(place, len(before))]
        changed = list(judge.changed(curve, place, later))
        wanted = [judge(curve[: end + 1]) for end in range(place + 1, len(curve))]
        assert repr([*changed, *later[len(changed) :]]) == repr(wanted), (before, number)


def test_what_waited_for_the_storage_keeps_the_last_value_of_each_step(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's value by the rule was told twice during the outage; one statement writes all."""
    study = make_study(value="best", direction="maximize")
    trial = begun(study)
    with monkeypatch.context() as away:
        away.setattr(type(trial.client.ledger), "report", refused)
        reported(trial, [5, 4, 3])
        trial.report(0.875, 1)
    assert trial_of(study, 0).intermediate_values == {}
    trial.client.flush()
    assert trial_of(study, 0).intermediate_values == {1: 0.875, 3: 0.875, 4: 0.875, 5: 0.875}


def test_an_attempt_begins_without_the_step_0_of_the_one_before(make_study: MakeStudy) -> None:
    study = make_study(failures={"exception": {"retries": 1}})
    first = begun(study)
    reported(first, [0, 1])
    fail(first, Failure(kind=Kind.EXCEPTION, message="once"))
    again = begun(study)
    again.report(0.75, 0)
    again.client.flush()
    assert trial_of(study, 0).intermediate_values == raw(study) == {0: 0.75}


def test_an_old_study_counts_from_1_as_it_did(make_study: MakeStudy) -> None:
    study = make_study(format=1)
    trial = begun(study)
    reported(trial, [0, 1, 2])
    assert trial_of(study, 0).intermediate_values == {1: 0.0, 2: 0.125, 3: 0.25}


@pytest.mark.parametrize(("format", "warm_up"), [(1, 3), (2, 2)])
def test_a_warm_up_is_optunas_where_steps_are(format: int, warm_up: int, make_study: MakeStudy) -> None:
    pruner = {"name": "median", "n_warmup_steps": 2}
    found = pruners.build(make_study(format=format, pruner=pruner).spec)
    assert isinstance(found, optuna.pruners.MedianPruner)
    assert found._n_warmup_steps == warm_up
