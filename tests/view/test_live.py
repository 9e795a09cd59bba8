from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from hpo.study.status import Best, FailureCount, ParkedTrial, RunningTrial, Summary
from hpo.study.trial_history import FinishedTrial
from hpo.view import live
from hpo.view.live import LiveView

COUNTS = dict.fromkeys(("complete", "pruned", "fail", "running", "parked", "foreign", "waiting"), 0)


def summary(**changes: Any) -> Summary:
    counts = COUNTS | {"complete": 3, "running": 1}
    base: dict[str, Any] = {
        "name": "digits",
        "direction": "maximize",
        "sampler": "tpe",
        "pruner": "median",
        "counts": counts | changes.pop("counts", {}),
        "budget": 8,
        "spent": 4,
        "best": Best(number=2, value=0.97411),
        "stop_reason": None,
        "hold": None,
        "running": [running(3, [0.5, 0.75, 1.0])],
        "parked": [],
        "failures": [],
        "seconds": 12.0,
        "seconds_per_trial": 4.0,
        "seconds_left": 18.0,
    }
    return Summary(**(base | changes))


def running(number: int, curve: list[float], attempt: int = 1) -> RunningTrial:
    return RunningTrial(
        number=number, epochs=len(curve), worker="box:41:1f2e", attempt=attempt, curve=curve, seconds=2.0
    )


def ended(number: int, **changes: Any) -> FinishedTrial:
    base: dict[str, Any] = {
        "count": number + 1,
        "number": number,
        "state": "complete",
        "value": 0.963,
        "outcome": "complete",
        "epochs": 7,
        "seconds": 1.3,
        "params": {"optimizer.lr": 0.0031234, "optimizer.name": "sgd", "model.widths": [64, 32]},
    }
    return FinishedTrial(**(base | changes))


def drawn(one: Summary, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(live.render(one, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


# --- the picture ------------------------------------------------------------------------------------------------------


def test_what_the_picture_shows() -> None:
    """The picture shows time budget states best and the running curves."""
    assert [line.rstrip() for line in drawn(summary(), 60)] == [
        "digits  maximize · tpe · median   12.0 s · about 18.0 s left",
        "━━━━━━━━━━━━━━━━━━━┅┅┅┅┅┅┅┅────────────────────────── 3 of 8",
        "3 complete · 1 running",
        "best 0.9741 by trial 2",
        "",
        "3  epoch 3  1.0000  ▁▅█  2.0 s  box:41",
    ]


def test_the_picture_tells_failures_and_a_stop() -> None:
    lines = drawn(
        summary(
            failures=[FailureCount(kind="exception", count=2, retried=1, message="ValueError: no")],
            stop_reason="enough",
            counts={"fail": 2},
        ),
        80,
    )
    assert "stopped: enough" in lines
    assert "2 × exception (1 tried again)  ValueError: no" in lines


@pytest.mark.parametrize("width", [40, 80, 140])
def test_no_line_of_the_picture_is_wider_than_the_terminal(width: int) -> None:
    one = summary(
        name="a-very-long-name-" * 5,
        running=[running(number, [number / 100] * 300, attempt=3) for number in range(100)],
        failures=[FailureCount(kind="exception", count=1, retried=0, message="x" * 500)],
        stop_reason="y" * 500,
    )
    lines = drawn(one, width)
    assert max(map(len, lines)) <= width
    assert lines[-1].strip() == f"and {100 - live.RUNNING_SHOWN} more running"


def test_the_bar_is_full_when_the_budget_is_spent_or_overspent() -> None:
    for complete in (8, 11):
        lines = drawn(summary(counts={"complete": complete, "running": 0}, spent=complete, running=[]), 60)
        assert set(lines[1].split()[0]) == {"━"}


def test_a_study_that_has_not_begun_can_be_drawn() -> None:
    empty = summary(counts=COUNTS, spent=0, best=None, running=[], seconds=0.0, seconds_left=None)
    assert [line.rstrip() for line in drawn(empty, 60)][2:] == ["no trial has begun", "no trial is complete yet"]


def test_a_finished_study_is_told_as_done() -> None:
    done = summary(counts={"complete": 8, "running": 0}, spent=8, running=[], seconds_left=0.0)
    assert drawn(done, 60)[0].endswith("done in 12.0 s")


def test_a_study_with_trials_to_go_is_not_told_as_done_whatever_its_pace() -> None:
    fork = summary(counts={"running": 0}, spent=3, running=[], seconds=0.0, seconds_left=0.0)
    assert "done" not in drawn(fork, 60)[0]
    parked = summary(counts={"complete": 7, "running": 0, "parked": 1}, spent=8, running=[], seconds_left=0.0)
    assert "done" not in drawn(parked, 60)[0]


def test_a_stopped_study_is_told_as_done_once_nothing_is_open() -> None:
    stopped = {"spent": 4, "running": [], "seconds_left": None, "stop_reason": "enough"}
    assert "done" in drawn(summary(counts={"complete": 4, "running": 0}, **stopped), 60)[0]
    assert "done" not in drawn(summary(counts={"running": 1}, **stopped), 60)[0]


# --- sparklines -------------------------------------------------------------------------------------------------------


def test_a_sparkline_goes_from_the_lowest_to_the_highest_value() -> None:
    assert live.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert live.sparkline([7.0, 0.0], 8) == "█▁"


def test_a_sparkline_marks_what_is_no_number() -> None:
    assert live.sparkline([0.0, math.nan, 1.0], 8) == "▁×█"
    assert live.sparkline([0.0, math.inf, 1.0, -math.inf], 8) == "▁██▁"
    assert live.sparkline([math.nan, math.nan], 8) == "××"


def test_a_flat_or_empty_curve_has_a_sparkline() -> None:
    assert live.sparkline([0.5, 0.5], 8) == "▄▄"
    assert live.sparkline([], 8) == ""


def test_a_long_curve_is_squeezed_into_the_width() -> None:
    assert live.sparkline([0.0, 0.0, 1.0, 1.0], 2) == "▁█"
    assert len(live.sparkline([float(step) for step in range(1000)], 37)) == 37


# --- a run ------------------------------------------------------------------------------------------------------------


def plain_view(**settings: Any) -> tuple[LiveView, io.StringIO]:
    file = io.StringIO()
    return LiveView(console=Console(file=file, force_terminal=False), **settings), file


def test_without_a_terminal_each_finished_trial_is_one_plain_line() -> None:
    view, file = plain_view()
    with view:
        view.update(summary(), [])
        view.update(summary(), [ended(1), ended(2, state="fail", outcome="exception", value=None, epochs=1, params={})])
        view.say("stopping")
    assert file.getvalue() == (
        "trial 1  complete  0.9630  7 epochs  1.3 s   "
        "optimizer.lr=0.003123 optimizer.name=sgd model.widths=[64,32]   (best 0.9741 by trial 2)  2/8\n"
        "trial 2  failed (exception)  -  1 epoch  1.3 s   (best 0.9741 by trial 2)  3/8\n"
        "stopping\n"
    )


UNREAD = """
import sys
from rich.console import Console
from hpo.view.live import LiveView
from tests.view.test_live import ended, summary

with LiveView(console=Console(file=sys.stdout, force_terminal={drawn})) as view:
    for number in range(3):
        view.update(summary(), [ended(number)])
        view.say("stopping")
    assert view.is_quiet and view.live is None
print("no reader", flush=True)
print("the search went on", file=sys.stderr)
"""


@pytest.mark.parametrize("drawn", [False, True])
def test_a_reader_that_leaves_does_not_end_the_run(drawn: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", UNREAD.format(drawn=drawn)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "the search went on\n")


def test_once_unheard_the_view_stays_silent() -> None:
    class Full(io.StringIO):
        tries = 0

        def write(self, text: str) -> int:
            self.tries += 1
            raise OSError(28, "No space left on device")

    file = Full()
    view = LiveView(console=Console(file=file, force_terminal=False))
    with view:
        for number in range(3):
            view.update(summary(), [ended(number)])
            view.say("stopping")
    assert file.tries == 1


def test_json_keeps_the_view_silent() -> None:
    view, file = plain_view(json=True)
    with view:
        view.update(summary(), [ended(1)])
        view.say("stopping")
    assert file.getvalue() == ""


def test_json_keeps_the_view_silent_in_a_terminal_too() -> None:
    file = io.StringIO()
    with LiveView(json=True, console=Console(file=file, force_terminal=True)) as view:
        view.update(summary(), [ended(1)])
    assert file.getvalue() == ""


def test_in_a_terminal_the_picture_is_drawn_and_the_cursor_given_back() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with LiveView(console=console) as view:
        view.update(summary(), [ended(1)])
        view.say("stopping")
    assert "best " in file.getvalue()
    assert "stopping" in file.getvalue()
    assert "trial 1  complete" not in file.getvalue()
    assert file.getvalue().endswith("\x1b[?25h")


# --- hpo status -------------------------------------------------------------------------------------------------------


def test_the_status_of_a_study_is_told_in_plain_lines() -> None:
    one = summary(
        counts={"parked": 1, "pruned": 1},
        parked=[ParkedTrial(number=5, epoch=4)],
        running=[running(3, [0.5], attempt=2)],
        failures=[FailureCount(kind="diverged", count=1, retried=0, message="")],
        stop_reason="enough",
    )
    assert live.status_text(one).splitlines() == [
        "digits  (maximize, sampler tpe, pruner median)",
        "trials   4 of 8 finished: 3 complete · 1 pruned · 1 running · 1 parked",
        "best     0.9741 by trial 2",
        "time     12.0 s · about 18.0 s left",
        "stopped  enough",
        "failures 1 × diverged, the last: no reason given",
        "running  trial 3, epoch 1, 0.5000, 2.0 s, box:41:1f2e, attempt 2",
        "parked   trial 5, goes on after epoch 4",
    ]


def test_the_status_of_all_studies_is_a_table_in_columns() -> None:
    table = live.status_table([summary(), summary(name="b", best=None, stop_reason="enough")])
    assert table.splitlines() == [
        "STUDY   TRIALS  BEST    TIME                        STATES",
        "digits  3/8     0.9741  12.0 s · about 18.0 s left  3 complete · 1 running",
        "b       3/8     -       12.0 s · about 18.0 s left  3 complete · 1 running (stopped)",
    ]
    assert live.status_table([]) == "no studies yet; `hpo run FILE` makes one"


def test_a_summary_in_json_has_null_for_what_is_no_number() -> None:
    plain = live.to_json(summary(running=[running(3, [math.nan, 0.5, math.inf])]))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["running"][0]["curve"] == [None, 0.5, None]
    assert plain["best"] == {"number": 2, "value": 0.97411}
    assert plain["counts"]["complete"] == 3


def test_the_view_loads_neither_torch_nor_optuna_nor_sqlalchemy() -> None:
    code = "import sys, hpo.view.live; print([m for m in ('torch', 'optuna', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
