"""A study in the terminal: the live view of a run, plain lines without a terminal, and the pages of `hpo status`.

It shows what `hpo.study` has read and accesses no database. It imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from hpo import text
from hpo.study.format import STATES, amount_text, duration, range_text, value_text, with_interval
from hpo.view import words
from hpo.view.picture import Around, render, sparkline, states

if TYPE_CHECKING:
    from hpo.study.results import TrialResult
    from hpo.study.status import ParkedTrial, Summary
    from hpo.study.trial_history import FinishedTrial, TrialHistory

FRONT = "front    "  # the head of the Pareto front's table
ECHO = 2  # characters of the ^C that a terminal writes behind the last line, which must not wrap there
CURVE_WIDTH = 40  # characters of a curve on the page of one trial


class Picture(Protocol):
    """A picture that is replaced in place, as `rich.live.Live` does it in a terminal."""

    transient: bool

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update(self, picture: RenderableType, /) -> None: ...
    def refresh(self) -> None: ...


class LiveView:
    """The output of a search: a live picture in a terminal or notebook, else one plain line per finished trial.

    Args:
        is_quiet: show nothing.
        console: where it is shown. By default stdout; of a command it is silenced for good once its reader is gone.
        live: draws the picture; by default rich, if the console is a terminal that can show it.
    """

    def __init__(self, *, is_quiet: bool = False, console: Console | None = None, live: Picture | None = None) -> None:
        self.console = console or Console(file=sys.stdout, emoji=False)
        self._owns_stream = live is None and self.console.file is sys.stdout  # stderr and a notebook are the caller's
        self.is_quiet = is_quiet
        can_draw = self.console.is_terminal and not self.console.is_dumb_terminal
        if can_draw and self.console.encoding.startswith("utf"):
            # No refresh thread: the caller updates several times a second anyway, and can fork or exit at any time.
            live = live or Live(console=self.console, auto_refresh=False)
        self.live = None if is_quiet else live
        self.has_drawn = False  # whether the terminal shows a picture
        self.size = self.console.size  # when something was drawn last
        self.said: list[str] = []  # lines above the picture

    def __enter__(self) -> LiveView:
        if self.live:
            with self._heard():
                self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            with self._heard():
                self.live.transient = not self.has_drawn
                self.live.stop()

    def stage(self, words: str) -> None:
        """Show what is being waited for before there is a study to show."""
        with self._heard():
            if self.live:
                line = Text(text.safe(words), style="dim", no_wrap=True, overflow="ellipsis")
                self._draw(line)

    def update(self, summary: Summary, newly_finished: Sequence[FinishedTrial], around: Around | None = None) -> None:
        """Show the study as it is now.

        Args:
            summary: the study.
            newly_finished: trials that have finished since the last call.
            around: what the picture shows besides.
        """
        with self._heard():
            if self.live:
                width, height = self.console.size
                self._draw(render(summary, width - ECHO, height, around))
                self.has_drawn = True
            elif not self.is_quiet:
                for trial in newly_finished:
                    text.say(finished_line(trial, summary), to=self.console.file)

    def _draw(self, picture: RenderableType) -> None:
        """Draw the picture in place of the last one; after a resize, on a cleared screen: the terminal has wrapped lines anew."""
        assert self.live
        self.live.update(picture)
        if isinstance(self.live, Live) and self.console.size != self.size:
            self.size = self.console.size
            self.console.clear()
            self.live._live_render._shape = None  # else rich goes up by as many lines as the old picture had
            for line in self.said:
                self._print(line)
        self.live.refresh()

    def _print(self, line: str) -> None:
        self.console.print(Text(line, style="yellow"))

    def say(self, line: str) -> None:
        """Print a line, above the picture if there is one."""
        with self._heard():
            if self.live:
                self.said.append(text.safe(line))
                self._print(self.said[-1])
            elif not self.is_quiet:
                text.say(line, to=self.console.file)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Stop all output when the reader is gone, as after `hpo run ... | head`. The search continues."""
        try:
            yield
        except (OSError, SystemExit):  # rich raises SystemExit for a broken pipe
            self.is_quiet = True
            live, self.live = self.live, None
            if self._owns_stream:
                with suppress(OSError), open(os.devnull, "w") as nowhere:
                    # Buffered output is discarded too; else flushing it at the exit of the process would fail.
                    os.dup2(nowhere.fileno(), self.console.file.fileno())
            with suppress(OSError, SystemExit, IndexError):  # IndexError: from rich, if it was interrupted in its start
                if live:
                    live.stop()


# --- plain text -------------------------------------------------------------------------------------------------------


def finished_line(trial: FinishedTrial, summary: Summary) -> str:
    """Return one line on a finished trial: its end, its parameters, and the progress of the study."""
    trial, summary = text.all_safe(trial), text.all_safe(summary)
    params = " ".join(f"{name}={words.param(value)}" for name, value in trial.params.items())
    state = STATES[trial.state]
    ending = state if trial.outcome in (trial.state, state) else f"{state} ({trial.outcome})"
    value = words.named_values(trial.values) if trial.values else value_text(trial.value)
    if trial.violated:
        value += f" (violates {', '.join(trial.violated)})"
    told = [f"trial {trial.number}", ending, value, words.trained(trial), duration(trial.seconds)]
    if params:
        told.append(f" {params}")
    if summary.objectives:
        told.append(f" (front of {len(summary.front)})")
    elif summary.best:
        told.append(f" (best {value_text(summary.best.value)} by trial {summary.best.number})")
    return text.safe("  ".join([*told, words.of_budget(trial.count, summary, "/")]))


def status_table(summaries: Sequence[Summary]) -> str:
    """Return a table with one line per study."""
    if not summaries:
        return "no studies yet; `hpo run FILE` makes one"
    rows = [("STUDY", "TRIALS", "BEST", "TIME", "STATES")]
    for summary in map(text.all_safe, summaries):
        stopped = " (stopped)" if summary.stop_reason else " (paused)" if summary.hold else ""
        best = value_text(summary.best.value) if summary.best else "-"
        best += f" ({range_text(summary.best.interval)})" if summary.best and summary.best.interval else ""
        best += f" (front of {len(summary.front)})" if summary.objectives else ""
        trials = words.of_budget(summary.own_finished, summary, "/")
        rows.append((summary.name, trials, best, words.clock(summary), states(summary).plain + stopped))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return text.page(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    )


def status_text(found: Summary) -> str:
    """Return the status of a study in plain lines."""
    summary = text.all_safe(found)
    lines = [
        f"{summary.name}  ({words.goal(summary)}, {summary.searched_by})",
        f"trials   {_finished(summary)}: {states(summary).plain}",
        *_best_lines(summary),
        f"time     {words.clock(summary)}",
    ]
    if summary.infeasible and summary.best:
        lines.append(f"bounds   {words.violating(summary)}")
    if why := words.held(found):
        word, _, why = why.partition(": ")
        lines.append(f"{word.ljust(9)}{why}")
    for failure in summary.failures:
        lines.append(f"failures {words.failures(failure)}, the last: {failure.message or 'no reason given'}")
    for trial in summary.running:
        value = value_text(trial.curve[-1]) if trial.curve else "-"
        again = f", {words.again(trial)}" if trial.failed else ""
        lines.append(
            f"running  trial {trial.number}, {trial.unit} {trial.epochs}, {value}, {duration(trial.seconds)}, "
            f"{trial.worker}{again}"
        )
    if summary.code_changes:
        changes = f"{summary.code_changes} change{'s' if summary.code_changes > 1 else ''} of your code"
        lines.append(f"code     {changes} accepted by --allow-code-change; trials of different code are compared")
    if summary.logs:
        lines.append(f"logs     {summary.logs}")
    for parked in summary.parked:
        lines.append(f"parked   trial {parked.number}, {_then(parked)}")
    return text.page(lines)


def _then(parked: ParkedTrial) -> str:
    if not parked.has_checkpoint:
        return "starts again, with its parameters"
    if parked.unit == "step":
        return "continues from its checkpoint"
    return f"continues after epoch {parked.epoch}" if parked.epoch else "continues within its first epoch"


def _finished(summary: Summary) -> str:
    if summary.own_finished <= summary.own_budget:
        return f"{summary.own_finished} of {summary.own_budget} finished"
    return f"{summary.own_finished} finished, more than the budget of {summary.own_budget}"


def _best_lines(summary: Summary) -> list[str]:
    if summary.best is None:
        return [f"best     {words.none_best(summary)}"]
    if not summary.objectives:
        value = with_interval(summary.best.value, summary.best.interval)
        return [f"best     {value} by trial {summary.best.number}"]
    return [f"front    {words.named_values(trial.values)} by trial {trial.number}" for trial in summary.front]


def history_text(history: TrialHistory) -> str:
    """Return all details of one trial, the tracebacks of its failures last."""
    found = text.all_safe(history)
    value = words.named_values(found.values) or value_text(found.value)
    lines = [
        f"trial    {found.number}, {STATES[found.state]}"
        + (f" ({found.outcome})" if found.outcome not in (None, found.state) else ""),
        f"value    {value} after {words.trained(found)}",
    ]
    if found.reason:
        lines.append(f"reason   {found.reason}")
    if found.attempt:
        lines.append(f"attempt  {found.attempt}, by {found.worker}{_waited(found.parked)}")
    if found.checkpoint:
        lines.append(f"saved    {found.checkpoint}")
    if found.tested:
        lines.append(f"tested   {openings_text(found.tested)}")
    lines += [f"cost     {name} = {amount_text(cost)}" for name, cost in found.costs.items()]
    for name, violation in found.constraints.items():
        lines.append(f"bound    {name}: {f'violated by {violation:.1%}' if violation > 0 else 'kept'}")
    lines += [f"param    {name} = {words.param(value)}" for name, value in found.params.items()]
    lines += [f"measured {name} = {value_text(value)}" for name, value in found.metrics.items()]
    shown = history.curve
    if len(history.raw) == len(shown):  # raw metrics follow some seconds late
        shown = dict(zip(shown, history.raw, strict=True))
    curves = dict.fromkeys(_curve_text(curve) for curve in (shown, history.curve) if curve)  # as texts: NaN equals NaN
    lines += [f"{word:<8} {curve}" for word, curve in zip(("curve", "judged"), curves, strict=False)]
    for last, first in found.unread:
        lines.append(f"gap      between epochs {last} and {first}: the program saved epochs that no worker read")
    lines += [f"set      {name} = {text.short(value)}" for name, value in found.attributes.items()]
    if found.overfits_since is not None:
        lines.append(
            f"overfits since epoch {found.overfits_since}: the validation loss rose while the training loss fell"
        )
    for failed in history.failures:  # not of `found`, in which tracebacks are one line
        lines.append(f"failed   attempt {failed.attempt} by {failed.kind}, then {failed.verdict}: {failed.message}")
        lines += [f"           {line}" for line in (failed.traceback or "").splitlines()]
    return text.page(lines)


def _curve_text(curve: Mapping[int, float]) -> str:
    """Return a curve as blocks, with its first and last step."""
    steps = list(curve)
    ends = " to ".join(f"{value_text(curve[step])} at step {step}" for step in dict.fromkeys([steps[0], steps[-1]]))
    return f"{sparkline([*curve.values()], CURVE_WIDTH)}  {ends}"


def openings_text(folders: Sequence[str]) -> str:
    """Return how often the test split was opened for a trial, and the folders of the trainings that opened it."""
    return f"opened {_times(len(folders))}, for {', '.join(dict.fromkeys(folders))}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _waited(parked: int) -> str:
    """Return how often the trial was parked without a failure, which explains further attempts."""
    if not parked:
        return ""
    return (
        f"; parked {_times(parked)} before, which is not a failure: it waited for its turn in a stack or for a worker"
    )


def winner_text(winner: TrialResult) -> str:
    """Return the best trial's value and parameters."""
    winner = text.all_safe(winner)
    longest = max((len(name) for name in winner.params), default=0)
    return text.page(
        [
            f"winner   trial {winner.number} with {with_interval(winner.value, winner.interval)}",
            *(f"           {name.ljust(longest)}  {words.param(value)}" for name, value in winner.params.items()),
        ]
    )


def front_text(front: Sequence[TrialResult], width: int) -> str:
    """Return the Pareto front as a table, the best trial in the first objective first.

    Each trial is a row, or a column if the rows are longer than `width` characters.
    """
    front = [text.all_safe(one) for one in front]
    names = list(front[0].values)
    params = list(dict.fromkeys(name for one in front for name in one.params))
    head = ["trial", *names, *params]
    trials = [
        [
            str(one.number),
            *(amount_text(one.values[name]) for name in names),
            *(words.param(one.params.get(name, "-")) for name in params),
        ]
        for one in front
    ]
    lines = _columns([head, *trials])
    if max(map(len, lines)) + len(FRONT) > width:
        of_names = max(map(len, head))
        per_block = max(
            1, (width - len(FRONT) - of_names) // (2 + max(len(cell) for cells in trials for cell in cells))
        )
        blocks = [trials[start : start + per_block] for start in range(0, len(trials), per_block)]
        lines = [line for block in blocks for line in _columns(list(zip(head, *block, strict=True)))]
    return text.page(f"{FRONT if not number else '':<{len(FRONT)}}{line}" for number, line in enumerate(lines))


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def to_json(shown: Summary | TrialHistory) -> dict[str, Any]:
    """Return a summary or history in plain JSON types. Numbers that are not finite become None."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(shown))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
