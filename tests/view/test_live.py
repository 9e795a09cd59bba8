from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from hpo.study.details import BestTrial, Details, RunningDetails
from hpo.study.status import Best, FailureCount, RunningTrial, Summary
from hpo.study.trial_history import FinishedTrial
from hpo.view import picture
from hpo.view.live import LiveView
from hpo.view.picture import Around

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


def running(number: int, curve: list[float], attempt: int = 1, failed: int = 0) -> RunningTrial:
    return RunningTrial(
        number=number,
        epochs=len(curve),
        worker="box:41:1f2e",
        attempt=attempt,
        failed=failed,
        curve=curve,
        seconds=2.0,
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


def drawn(one: Summary, width: int, height: int = 40, around: Around | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(picture.render(one, width, height, around))
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
        "trial  epoch   value  ▁ 0.5000  █ 1.0000   time  parameters",
        "    3      3  1.0000  ▁▅█                 2.0 s",
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
    params = {"optimizer.lr": 0.1, "model.widths": [64] * 99}
    more = [RunningDetails(number=number, params=params, epochs=300) for number in range(100)]
    best = [BestTrial(number=number, value=0.5, params=params) for number in range(5)]
    for height in (24, 40):
        lines = drawn(one, width, height, Around(details=Details(best=best, running=more), machine="z" * 500))
        assert max(map(len, lines)) <= width
        assert len(lines) == height - 1  # the cursor takes one
        table = [line for line in lines if line.startswith("tr")]
        shown = len(lines) - lines.index(table[0]) - 2
        assert lines[-1].strip() == f"and {100 - shown} more running"


def test_running_trials_are_shown_with_epochs_to_go_raw_curves_and_parameters() -> None:
    """The number is the best so far; the curve is the raw one, whose last values are worse."""
    params = {"optimizer.name": "sgd", "optimizer.lr": 0.05, "schedule.name": "cosine", "model.widths": [64, 32]}
    more = RunningDetails(number=3, params=params, raw=[0.5, 1.0, 0.5], epochs=40)
    one = summary(running=[running(3, [0.5, 1.0, 1.0])], value_rule="best", metric="accuracy")
    lines = drawn(one, 120, around=Around(details=Details(running=[more])))
    assert lines[0].startswith("digits  maximize accuracy · tpe · median  ")
    assert lines[-2].split() == ["trial", "epoch", "best", "▁", "0.5000", "█", "1.0000", "time", "parameters"]
    shown = ["3", "3/40", "1.0000", "▁█▁", "2.0", "s", "optimizer=sgd", "lr=0.05", "schedule=cosine", "widths=[64,32]"]
    assert lines[-1].split() == shown


def test_all_curves_have_one_scale() -> None:
    """The worst trial does not look the fullest, and one that diverges does not flatten the others."""
    curves = [[0.0, 0.1, 0.2], [0.8, 0.9, 1.0]]
    one = summary(running=[running(number, curve) for number, curve in enumerate(curves)], direction="maximize")
    assert [line.split()[3] for line in drawn(one, 80)[-2:]] == ["▁▁▂", "▇██"]
    losses = [[1.0, 0.5, 0.0], [1.0] * 7, [1e9]]
    one = summary(running=[running(number, curve) for number, curve in enumerate(losses)], direction="minimize")
    assert [line.split()[3] for line in drawn(one, 80)[-3:]] == ["█▅▁", "███████", "█"]


def test_attempts_that_lost_nothing_are_not_shown() -> None:
    """A trial is taken up again whenever it has waited for a stack; only failures are worth a word."""
    waited, failed = running(3, [0.5], attempt=7), running(4, [0.5], attempt=3, failed=2)
    lines = drawn(summary(running=[waited, failed], counts={"parked": 2}), 80)
    assert "attempt" not in "".join(lines)
    assert [line.split()[6:] for line in lines[-2:]] == [[], ["failed", "2", "times", "before"]]
    assert lines[2].startswith("3 complete · 1 running · 2 parked (parked ones wait for a worker or a stack)")


def test_the_five_best_trials_are_shown_with_their_parameters() -> None:
    best = [BestTrial(number=9 - place, value=0.9 - place / 10, params={"lr": 0.1}) for place in range(5)]
    lines = drawn(summary(), 80, around=Around(details=Details(best=best), machine="2 workers on the CPU"))
    start = lines.index(next(line for line in lines if line.startswith("best   value")))
    assert [line.split() for line in lines[start + 1 : start + 6]] == [
        [f"{9 - place}", f"{0.9 - place / 10:.4f}", "lr=0.1"] for place in range(5)
    ]
    assert lines[3].rstrip() == "2 workers on the CPU"


def test_the_terminal_s_echo_of_ctrl_c_has_room_behind_the_picture() -> None:
    """Else it wraps, and the next picture begins a line too low."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24, _environ={"TERM": "xterm-256color"})
    with LiveView(console=console) as view:
        view.update(summary(), [], Around(details=Details(running=[RunningDetails(number=3, params={"a": "b" * 99})])))
    lines = [Text.from_ansi(line).cell_len for line in file.getvalue().split("\n")]
    assert max(lines) == 80 - 2


def test_nothing_is_left_of_the_picture_after_a_resize() -> None:
    """A terminal wraps lines anew, so the old picture may take any number of lines; what was said stays."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ={"TERM": "xterm-256color"})
    console.size = (80, 24)
    with LiveView(console=console) as view:
        view.say("a word")
        view.update(summary(), [])
        file.truncate(0)
        for size, cleared in (((80, 24), 0), ((40, 24), 1), ((40, 24), 0), ((80, 30), 1)):
            console.size = size
            view.update(summary(), [])
            said = file.getvalue()
            assert said.count("\x1b[2J\x1b[H") == said.count("a word") == cleared
            assert said.count("\x1b[1A") == len(drawn(summary(), size[0])) - 1
            file.truncate(0)


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


def test_what_workers_do_that_train_nothing_yet_is_shown() -> None:
    waiting = summary(counts=COUNTS, spent=0, best=None, running=[])
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    console.print(picture.render(waiting, 60, 40, Around(doing={"preparing the data: digits": 2, "x" * 99: 1})))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[-3:-1] == ["2 workers: preparing the data: digits", f"1 worker: {'x' * 49}…"]


def test_a_run_says_at_once_what_it_waits_for(tmp_path: Path) -> None:
    """Here it waits for the import of an objective; what it says is wiped off once there is something to tell."""
    (tmp_path / "own.toml").write_text('name = "own"\nobjective = "mine.py:objective"\ndirection = "minimize"\n')
    (tmp_path / "mine.py").write_text(
        "import pathlib, time\n"
        "while not pathlib.Path(__file__).with_name('go').exists():\n    time.sleep(0.02)\n"
        "raise ImportError('enough')\n"
    )
    terminal, its_side = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hpo", "run", "own.toml"],
        stdout=its_side,
        stderr=its_side,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(its_side)
    with process, open(terminal, "rb", buffering=0) as screen:
        seen = b""
        while b"own: loading your objective" not in seen:
            seen += screen.read(4096)
        assert b"reading own.toml" in seen
        (tmp_path / "go").touch()
        while b"enough" not in seen:
            seen += screen.read(4096)
        assert b"\x1b[2K" in seen.partition(b"your objective")[2].partition(b"error:")[0]
        assert process.wait() == 2


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
from rich.text import Text
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


def test_stderr_of_the_caller_is_not_silenced() -> None:
    """A search from Python shows its progress there."""
    code = """
import os, sys
from hpo.view import notebook
with notebook.view(is_quiet=False) as view:
    view.say("lost")
assert view.is_quiet
assert os.readlink("/proc/self/fd/2") == "/dev/full"
"""
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stderr=full, check=False).returncode == 0


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
    view, file = plain_view(is_quiet=True)
    with view:
        view.update(summary(), [ended(1)])
        view.say("stopping")
    assert file.getvalue() == ""


def test_json_keeps_the_view_silent_in_a_terminal_too() -> None:
    file = io.StringIO()
    with LiveView(is_quiet=True, console=Console(file=file, force_terminal=True)) as view:
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


def test_the_view_loads_neither_torch_nor_optuna_nor_sqlalchemy() -> None:
    code = "import sys, hpo.view.live; print([m for m in ('torch', 'optuna', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
