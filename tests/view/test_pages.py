"""The pages that commands print."""

from __future__ import annotations

import json
import math

from hpo.study.status import FailureCount, ParkedTrial
from hpo.view import pages
from tests.view.test_live import drawn, ended, running, summary


def test_the_status_of_a_study_is_told_in_plain_lines() -> None:
    one = summary(
        counts={"parked": 1, "pruned": 1},
        parked=[
            ParkedTrial(number=5, epoch=4, has_checkpoint=True),
            ParkedTrial(number=6, epoch=0, has_checkpoint=True),
            ParkedTrial(number=7, epoch=0),
            ParkedTrial(number=8, epoch=3, unit="step", has_checkpoint=True),
        ],
        running=[running(3, [0.5], attempt=3, failed=1)],
        failures=[FailureCount(kind="diverged", count=1, retried=0, message="")],
        stop_reason="enough",
    )
    assert pages.status_text(one).splitlines() == [
        "digits  (maximize, sampler tpe, pruner median)",
        "trials   4 of 8 finished: 3 complete · 1 pruned · 1 running · 1 parked",
        "best     0.9741 by trial 2",
        "time     12.0 s · about 18.0 s left",
        "stopped  enough",
        "failures 1 × diverged, the last: no reason given",
        "running  trial 3, epoch 1, 0.5000, 2.0 s, box:41:1f2e, failed 1 time before",
        "parked   trial 5, continues after epoch 4",
        "parked   trial 6, continues within its first epoch",
        "parked   trial 7, starts again, with its parameters",
        "parked   trial 8, continues from its checkpoint",
    ]


def test_trials_that_a_fork_brought_along_are_not_told_as_a_part_of_the_budget() -> None:
    """`--trials 22` after a fork that took 20 along ends with 22 of 22."""
    one = summary(counts={"complete": 42, "running": 0}, budget=42, spent=42, running=[], imported=20)
    states = "42 complete · 20 of these taken from another study"
    assert pages.status_text(one).splitlines()[1] == f"trials   22 of 22 finished: {states}"
    assert pages.status_table([one]).splitlines()[1].split()[:2] == ["digits", "22/22"]
    assert drawn(one, 60)[1].endswith("━ 22 of 22")
    assert pages.finished_line(ended(41, count=22), one).endswith("  22/22")


def test_a_budget_below_what_has_finished_is_told_as_such() -> None:
    one = summary(counts={"complete": 24, "running": 0}, budget=10, spent=24, running=[])
    assert pages.status_text(one).splitlines()[1] == "trials   24 finished, more than the budget of 10: 24 complete"
    assert pages.status_table([one]).splitlines()[1].startswith("digits  24, budget 10  0.9741")
    assert drawn(one, 60)[1].endswith("━ 24, budget 10")
    assert pages.finished_line(ended(23), one).endswith("  24, budget 10")


def test_the_status_of_all_studies_is_a_table_in_columns() -> None:
    table = pages.status_table([summary(), summary(name="b", best=None, stop_reason="enough")])
    assert table.splitlines() == [
        "STUDY   TRIALS  BEST    TIME                        STATES",
        "digits  3/8     0.9741  12.0 s · about 18.0 s left  3 complete · 1 running",
        "b       3/8     -       12.0 s · about 18.0 s left  3 complete · 1 running (stopped)",
    ]
    assert pages.status_table([]) == "no studies yet; `hpo run FILE` makes one"


def test_a_summary_in_json_has_null_for_what_is_no_number() -> None:
    plain = pages.to_json(summary(running=[running(3, [math.nan, 0.5, math.inf])]))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["running"][0]["curve"] == [None, 0.5, None]
    assert plain["best"] == {"number": 2, "value": 0.97411, "interval": None, "rivals": None, "task": None}
    assert plain["counts"]["complete"] == 3
