"""A study in the terminal: the live view of a run, the plain lines when nobody watches, and `hpo status`.

It draws what `summary`, `finished` and `results` read and knows no database; nothing heavy is imported for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hpo import text
from hpo.study.format import STATES, amount_text, counted, duration, value_text

if TYPE_CHECKING:
    from hpo.study.results import TrialResult
    from hpo.study.status import Best, FailureCount, RunningTrial, Summary
    from hpo.study.trial_history import FinishedTrial, TrialHistory

LEVELS = "▁▂▃▄▅▆▇█"
NOT_A_NUMBER = "×"
FRONT = "front    "  # the head of the table of what none beats
RUNNING_SHOWN = 16  # running trials that get a line of their own
COLOURS = {
    "complete": "green",
    "pruned": "yellow",
    "fail": "red",
    "running": "cyan",
    "parked": "magenta",
    "foreign": "blue",
    "waiting": "dim",
}


class LiveView:
    """What `hpo run` shows: a picture that renews itself in a terminal, else one plain line per finished trial."""

    def __init__(self, *, json: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, emoji=False)
        self.is_quiet = json
        can_draw = self.console.is_terminal and not self.console.is_dumb_terminal
        draws = can_draw and self.console.encoding.startswith("utf") and not json
        # No refreshing thread: the caller updates several times a second anyway, and may then fork or exit as it likes.
        self.live = Live(console=self.console, auto_refresh=False) if draws else None
        self.has_drawn = False  # a picture stands in the terminal

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
                self.live.stop()

    def update(self, summary: Summary, newly_finished: Sequence[FinishedTrial]) -> None:
        """Show the study as it is now."""
        with self._heard():
            if self.live:
                self.live.update(render(summary, self.console.width), refresh=True)
                self.has_drawn = True
            elif not self.is_quiet:
                for trial in newly_finished:
                    text.say(finished_line(trial, summary), to=self.console.file)

    def say(self, line: str) -> None:
        """Tell something in a line of its own, above the picture if there is one."""
        with self._heard():
            if self.live:
                self.console.print(Text(text.safe(line), style="yellow"))
            elif not self.is_quiet:
                text.say(line, to=self.console.file)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Fall silent for good once nobody reads, as after `hpo run ... | head`: the search goes on undisturbed."""
        try:
            yield
        except (OSError, SystemExit):  # SystemExit is what rich makes of a broken pipe
            self.is_quiet = True
            live, self.live = self.live, None
            with suppress(OSError), open(os.devnull, "w") as nowhere:
                # What is still buffered goes nowhere too; else flushing it would fail when the process exits.
                os.dup2(nowhere.fileno(), self.console.file.fileno())
            with suppress(OSError, SystemExit, IndexError):  # IndexError: rich, if it was broken off amid its start
                if live:
                    live.stop()


# --- the picture ------------------------------------------------------------------------------------------------------


def render(found: Summary, width: int) -> RenderableType:
    """Draw a study on `width` columns."""
    summary = text.all_safe(found)
    blocks: list[RenderableType] = [
        _header(summary, width),
        _bar(summary, width),
        _states(summary),
        _best_line(summary),
    ]
    if why := text.safe(held(found)):
        blocks.append(Text(why, style="yellow", overflow="ellipsis", no_wrap=True))
    for failure in summary.failures:
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(_failed(failure), style="red")
        line.append(f"  {failure.message}", style="dim")
        blocks.append(line)
    if summary.running:
        blocks += [Text(""), _running(summary.running, width)]
    return Group(*blocks)


def held(summary: Summary) -> str:
    """Return why nothing new is started, "" if it is."""
    if summary.hold and not summary.stop_reason:
        return f"{summary.hold}: workers wait; {text.command('resume', summary.name)}"
    if not summary.stop_reason:
        return ""
    return f"stopped: {summary.stop_reason}" + (f"; {text.command('resume', summary.name)}" if summary.hold else "")


def _failed(failure: FailureCount) -> str:
    """Return how often attempts failed by a kind, and how many of them were tried again."""
    return f"{failure.count} × {failure.kind}" + (f" ({failure.retried} tried again)" if failure.retried else "")


def _header(summary: Summary, width: int) -> RenderableType:
    left = Text.assemble((summary.name, "bold"), (f"  {_goal(summary)} · {summary.sampler} · {summary.pruner}", "dim"))
    right = Text(_clock(summary), style="dim")
    left.truncate(max(10, width - right.cell_len - 2), overflow="ellipsis")
    return Text.assemble(left, " " * max(2, width - left.cell_len - right.cell_len), right, no_wrap=True)


def _clock(summary: Summary) -> str:
    elapsed = duration(summary.seconds)
    if summary.is_over:
        return f"done in {elapsed}"
    return elapsed if summary.seconds_left is None else f"{elapsed} · about {duration(summary.seconds_left)} left"


def _bar(summary: Summary, width: int) -> Text:
    label = f" {summary.finished} of {summary.budget}"
    cells = max(10, width - len(label))
    budget = max(1, summary.budget)
    done = min(cells, int(cells * summary.finished / budget))
    begun = min(cells, math.ceil(cells * max(summary.finished, summary.spent) / budget)) - done
    return Text.assemble(
        ("━" * done, "green"), ("┅" * begun, "cyan"), ("─" * (cells - done - begun), "dim"), (label, "bold")
    )


def _states(summary: Summary) -> Text:
    found = [Text(words, style=COLOURS[state]) for state, words in counted(summary.counts).items()]
    return Text(" · ", style="dim").join(found) if found else Text("no trial has begun", style="dim")


def _best_line(summary: Summary) -> Text:
    if summary.best is None:
        return Text(_none_best(summary), style="dim")
    if summary.objectives:
        line = Text("front", no_wrap=True, overflow="ellipsis")
        for trial in summary.front:
            line.append(f"  {trial.number}: ").append(_values(trial.values), "bold green")
        return line
    return Text.assemble("best ", (value_text(summary.best.value), "bold green"), f" by trial {summary.best.number}")


def _none_best(summary: Summary) -> str:
    if not summary.infeasible:
        return "no trial is complete yet"
    return f"no result yet: {_violating(summary)}"


def _violating(summary: Summary) -> str:
    is_one = summary.infeasible == 1
    return f"{summary.infeasible} complete trial{' violates' if is_one else 's violate'} a constraint"


def _running(running: Sequence[RunningTrial], width: int) -> RenderableType:
    shown = running[:RUNNING_SHOWN]
    rows = [
        (
            f"{trial.number}",
            f"epoch {trial.epochs}",
            value_text(trial.curve[-1]) if trial.curve else "",
            duration(trial.seconds),
            _short(trial.worker) + (f", attempt {trial.attempt}" if trial.attempt > 1 else ""),
        )
        for trial in shown
    ]
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify, style in (("right", "cyan"), ("left", ""), ("right", "bold"), ("left", "green")):
        table.add_column(justify=justify, style=style, no_wrap=True)  # type: ignore[arg-type]
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis", max_width=max(8, width // 4))
    others = [max(len(row[column]) for row in rows) for column in range(4)]
    worker = min(max(len(row[4]) for row in rows), max(8, width // 4))
    room = max(8, width - sum(others) - worker - 12)
    for trial, (number, epoch, value, seconds, name) in zip(shown, rows, strict=True):
        table.add_row(number, epoch, value, sparkline(trial.curve, room), seconds, Text(name))
    if len(running) > len(shown):
        return Group(table, Text(f"and {len(running) - len(shown)} more running", style="dim"))
    return table


def _short(worker: str) -> str:
    """Return host:process of a worker's name; its random part tells nobody anything."""
    return ":".join(worker.split(":")[:2])


def sparkline(curve: Sequence[float], width: int) -> str:
    """Draw a curve with blocks of eight heights, its lowest value at the bottom; × is not a number.

    A curve longer than `width` is drawn by the means of neighbours.
    """
    points = _squeezed(curve, width)
    finite = [value for value in points if math.isfinite(value)]
    if not finite:
        return NOT_A_NUMBER * len(points)
    low, span = min(finite), max(finite) - min(finite)
    return "".join(_block(value, low, span) for value in points)


def _block(value: float, low: float, span: float) -> str:
    if math.isnan(value):
        return NOT_A_NUMBER
    if math.isinf(value):
        return LEVELS[-1] if value > 0 else LEVELS[0]
    if span == 0:
        return LEVELS[3]
    return LEVELS[min(len(LEVELS) - 1, int((value - low) / span * len(LEVELS)))]


def _squeezed(curve: Sequence[float], width: int) -> list[float]:
    if len(curve) <= width:
        return list(curve)
    edges = [round(column * len(curve) / width) for column in range(width + 1)]
    groups = [curve[start:end] for start, end in itertools.pairwise(edges)]
    return [sum(group) / len(group) for group in groups]


# --- plain text -------------------------------------------------------------------------------------------------------


def finished_line(trial: FinishedTrial, summary: Summary) -> str:
    """Tell in one line how a trial ended, what it was given, and how far the study is."""
    trial, summary = text.all_safe(trial), text.all_safe(summary)
    params = " ".join(f"{name}={_param(value)}" for name, value in trial.params.items())
    epochs = f"{trial.epochs} epoch{'' if trial.epochs == 1 else 's'}"
    state = STATES[trial.state]
    ending = state if trial.outcome in (trial.state, state) else f"{state} ({trial.outcome})"
    value = _values(trial.values) if trial.values else value_text(trial.value)
    if trial.violated:
        value += f" (violates {', '.join(trial.violated)})"
    told = [f"trial {trial.number}", ending, value, epochs, duration(trial.seconds)]
    if params:
        told.append(f" {params}")
    if summary.objectives:
        told.append(f" (front of {len(summary.front)})")
    elif summary.best:
        told.append(f" (best {_best(summary.best)})")
    return text.safe("  ".join([*told, f"{trial.count}/{summary.budget}"]))


def status_table(summaries: Sequence[Summary]) -> str:
    """Tell every study in a line, in columns."""
    if not summaries:
        return "no studies yet; `hpo run FILE` makes one"
    rows = [("STUDY", "TRIALS", "BEST", "TIME", "STATES")]
    for summary in map(text.all_safe, summaries):
        stopped = " (stopped)" if summary.stop_reason else " (paused)" if summary.hold else ""
        best = value_text(summary.best.value) if summary.best else "-"
        best += f" (front of {len(summary.front)})" if summary.objectives else ""
        trials = f"{summary.finished}/{summary.budget}"
        rows.append((summary.name, trials, best, _clock(summary), _states(summary).plain + stopped))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return text.page(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    )


def status_text(found: Summary) -> str:
    """Tell a study in plain lines."""
    summary = text.all_safe(found)
    lines = [
        f"{summary.name}  ({_goal(summary)}, {summary.searched_by})",
        f"trials   {summary.finished} of {summary.budget} finished: {_states(summary).plain}",
        *_best_lines(summary),
        f"time     {_clock(summary)}",
    ]
    if summary.infeasible and summary.best:
        lines.append(f"bounds   {_violating(summary)}")
    if why := held(found):
        word, _, why = why.partition(": ")
        lines.append(f"{word.ljust(9)}{why}")
    for failure in summary.failures:
        lines.append(f"failures {_failed(failure)}, the last: {failure.message or 'no reason given'}")
    for trial in summary.running:
        value = value_text(trial.curve[-1]) if trial.curve else "-"
        again = f", attempt {trial.attempt}" if trial.attempt > 1 else ""
        lines.append(
            f"running  trial {trial.number}, epoch {trial.epochs}, {value}, {duration(trial.seconds)}, "
            f"{trial.worker}{again}"
        )
    for parked in summary.parked:
        lines.append(f"parked   trial {parked.number}, goes on after epoch {parked.epoch}")
    return text.page(lines)


def _best_lines(summary: Summary) -> list[str]:
    if summary.best is None:
        return [f"best     {_none_best(summary)}"]
    if not summary.objectives:
        return [f"best     {_best(summary.best)}"]
    return [f"front    {_values(trial.values)} by trial {trial.number}" for trial in summary.front]


def _goal(summary: Summary) -> str:
    """Return what the study is after: the direction of its one objective, or all of them by name."""
    several = (f"{direction} {name}" for name, direction in summary.objectives.items())
    return ", ".join(several) or summary.direction


def _values(values: Mapping[str, float]) -> str:
    """Return the values of several objectives by name."""
    return " ".join(f"{name}={amount_text(value)}" for name, value in values.items())


def history_text(history: TrialHistory) -> str:
    """Tell one trial in full, the tracebacks of its failures last."""
    found = text.all_safe(history)
    value = _values(found.values) or value_text(found.value)
    lines = [
        f"trial    {found.number}, {STATES[found.state]}"
        + (f" ({found.outcome})" if found.outcome not in (None, found.state) else ""),
        f"value    {value} after {found.epochs} epoch{'' if found.epochs == 1 else 's'}",
    ]
    if found.reason:
        lines.append(f"reason   {found.reason}")
    if found.attempt:
        lines.append(f"attempt  {found.attempt}, by {found.worker}{_waited(found.parked)}")
    if found.checkpoint:
        lines.append(f"saved    {found.checkpoint}")
    lines += [f"cost     {name} = {amount_text(cost)}" for name, cost in found.costs.items()]
    for name, violation in found.constraints.items():
        lines.append(f"bound    {name}: {f'violated by {violation:.1%}' if violation > 0 else 'kept'}")
    lines += [f"param    {name} = {_param(value)}" for name, value in found.params.items()]
    lines += [f"measured {name} = {value_text(value)}" for name, value in found.metrics.items()]
    if found.overfits_since is not None:
        lines.append(
            f"overfits since epoch {found.overfits_since}: the validation loss rose while the training loss fell"
        )
    for failed in history.failures:  # their tracebacks have lines of their own
        lines.append(f"failed   attempt {failed.attempt} by {failed.kind}, then {failed.verdict}: {failed.message}")
        lines += [f"           {line}" for line in (failed.traceback or "").splitlines()]
    return text.page(lines)


def _waited(parked: int) -> str:
    """Return why there is more than one attempt, where nothing failed."""
    if not parked:
        return ""
    times = {1: "once", 2: "twice"}.get(parked, f"{parked} times")
    return f"; parked {times} before, which is no failure: it waited for its turn in a stack or for a worker"


def winner_text(winner: TrialResult) -> str:
    """Tell the best trial's value and parameters."""
    winner = text.all_safe(winner)
    longest = max((len(name) for name in winner.params), default=0)
    return text.page(
        [
            f"winner   trial {winner.number} with {value_text(winner.value)}",
            *(f"           {name.ljust(longest)}  {_param(value)}" for name, value in winner.params.items()),
        ]
    )


def front_text(front: Sequence[TrialResult], width: int) -> str:
    """Tell the trials that none beats, the best in the first objective first: a row each, or a column each where a row does
    not fit into so many characters.
    """
    front = [text.all_safe(one) for one in front]
    names = list(front[0].values)
    params = list(dict.fromkeys(name for one in front for name in one.params))
    head = ["trial", *names, *params]
    trials = [
        [
            str(one.number),
            *(amount_text(one.values[name]) for name in names),
            *(_param(one.params.get(name, "-")) for name in params),
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
    """Return what is shown in plain JSON types; a number that is none is None."""
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


def _best(best: Best) -> str:
    return f"{value_text(best.value)} by trial {best.number}"


def _param(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text.short(str(value).replace(" ", ""))
