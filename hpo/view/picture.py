"""The live picture of a run, made of rich's tables: how the study stands, its best trials, and what trains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpo import text
from hpo.study.details import BestTrial, Details, RunningDetails
from hpo.study.format import duration, value_text, with_interval
from hpo.view import words
from hpo.view.sparkline import LEVELS, sparkline

if TYPE_CHECKING:
    from hpo.study.status import Summary

#: Of all values shown, on the bad side. These are drawn as the worst, so that one outlier flattens nothing.
WORST_SHARE = 0.1
CURVE_WIDTH = 24  # characters, a third of the terminal at most
FEWEST_RUNNING = 3  # running trials that are shown however low the terminal is
COLOURS = {
    "complete": "green",
    "pruned": "yellow",
    "fail": "red",
    "running": "cyan",
    "parked": "magenta",
    "foreign": "blue",
    "waiting": "dim",
}


@dataclass(frozen=True, kw_only=True)
class Around:
    """What a run shows beside the study's summary."""

    details: Details = field(default_factory=Details)
    doing: Mapping[str, int] = field(default_factory=dict)  # what workers do that train nothing yet -> how many of them
    machine: str = ""  # devices, memory and speed, in words


def render(found: Summary, width: int, height: int = 50, around: Around | None = None) -> RenderableType:
    """Return the live picture of a study, as wide and at most as high as the terminal."""
    summary, around = text.all_safe(found), text.all_safe(around or Around())
    blocks: list[Any] = [_header(summary, width), _bar(summary, width), _states(summary)]
    if summary.counts["parked"]:
        blocks[-1].append(" (parked ones wait for a worker or a stack)", "dim")
    if around.machine:
        blocks.append(_line(around.machine, "dim"))
    if summary.limits:
        blocks.append(_line(" · ".join(map(words.limit, summary.limits)), "dim"))
    if why := text.safe(words.held(found)):
        blocks.append(_line(why, "yellow"))
    for failure in summary.failures:
        blocks.append(Text.assemble((words.failures(failure), "red"), (f"  {failure.message}", "dim"), no_wrap=True))
    for what, count in around.doing.items():
        blocks.append(_line(f"{count} worker{'s' if count > 1 else ''}: {what}", "cyan"))
    blocks.append(_best_line(summary))
    best = around.details.best[: max(1, min(5, height - 19))]
    if len(best) > 1:
        blocks += [Text(""), _best_table(summary, best, width)]
    if summary.running:
        rows = height - len(blocks) - len(best) - 4  # a blank line, the heading, what is not shown, the cursor
        blocks += [Text(""), *_running(summary, around.details, width, max(FEWEST_RUNNING, rows))]
    for block in blocks:
        if isinstance(block, Text):
            block.no_wrap, block.overflow = True, "ellipsis"
    return Group(*blocks)


def _line(words: str, style: str) -> Text:
    return Text(words, style=style)


def _header(summary: Summary, width: int) -> Text:
    goal = f"{words.goal(summary)} {summary.metric or ''}".strip()
    left = Text.assemble((summary.name, "bold"), (f"  {goal} · {summary.sampler} · {summary.pruner}", "dim"))
    right = Text(words.clock(summary), style="dim")
    left.truncate(max(10, width - right.cell_len - 2), overflow="ellipsis")
    return Text.assemble(left, " " * max(2, width - left.cell_len - right.cell_len), right)


def _bar(summary: Summary, width: int) -> Text:
    label = f" {words.of_budget(summary.own_finished, summary, ' of ')}"
    cells = max(10, width - len(label))
    budget = max(1, summary.own_budget)
    done = min(cells, int(cells * summary.own_finished / budget))
    spent = max(summary.own_finished, summary.spent - summary.imported)
    begun = min(cells, math.ceil(cells * spent / budget)) - done
    return Text.assemble(
        ("━" * done, "green"), ("┅" * begun, "cyan"), ("─" * (cells - done - begun), "dim"), (label, "bold")
    )


def _states(summary: Summary) -> Text:
    """Return the trials by state, in a line."""
    found = [Text(said, style=COLOURS.get(state, "dim")) for state, said in words.states(summary).items()]
    return Text(" · ", style="dim").join(found)


def _best_line(summary: Summary) -> Text:
    if summary.best is None:
        return _line(words.none_best(summary), "dim")
    if summary.objectives:
        line = Text("front")
        for trial in summary.front:
            line.append(f"  {trial.number}: ").append(words.named_values(trial.values), "bold green")
        return line
    value = with_interval(summary.best.value, summary.best.interval)
    return Text.assemble("best ", (value, "bold green"), f" {words.by_trial(summary, summary.best.number)}")


def _best_table(summary: Summary, best: Sequence[BestTrial], width: int) -> Table:
    table = _table(width, "best", summary.metric or "value", "parameters")
    for trial in best:
        table.add_row(f"{trial.number}", Text(value_text(trial.value), style="green"), _params(trial.params))
    return table


def _running(summary: Summary, details: Details, width: int, rows: int) -> list[RenderableType]:
    shown = summary.running[:rows]
    more = {one.number: one for one in details.running}
    of = [more.get(trial.number, RunningDetails(number=trial.number, params={})) for trial in shown]
    curves = [one.raw or trial.curve for trial, one in zip(shown, of, strict=True)]
    low, high = _scale(itertools.chain(*curves), summary.direction)
    room = min(CURVE_WIDTH, max(8, width // 4))
    scale = f"{LEVELS[0]} {value_text(low)}  {LEVELS[-1]} {value_text(high)}" if low < high else "curve"
    table = _table(
        width, "trial", "epoch", "best" if summary.value_rule == "best" else "value", scale, "time", "parameters"
    )
    for trial, one, curve in zip(shown, of, curves, strict=True):
        table.add_row(
            f"{trial.number}",
            f"{trial.epochs}/{one.epochs}" if one.epochs else f"{trial.epochs}",
            value_text(trial.curve[-1]) if trial.curve else "",
            Text(sparkline(curve, room, (low, high)), style="green"),
            duration(trial.seconds),
            Text.assemble((f"{words.again(trial)}  ".lstrip(), "red"), _params(one.params)),
        )
    if len(summary.running) == len(shown):
        return [table]
    return [table, Text(f"and {len(summary.running) - len(shown)} more running", style="dim")]


def _table(width: int, *headings: str) -> Table:
    """Return an empty table, whose last column takes what is left of the width."""
    table = Table(box=None, width=width, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in headings[:-1]:
        justify: Any = "left" if heading[:1] in (*LEVELS, "c") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    table.add_column(headings[-1], ratio=1, no_wrap=True, overflow="ellipsis")
    return table


def _params(params: Mapping[str, Any]) -> Text:
    """Return parameters by the last part of their names, which suffices unless two end alike."""
    last = [name.removesuffix(".name").rpartition(".")[2] for name in params]
    names = [name if last.count(short) > 1 else short for name, short in zip(params, last, strict=True)]
    given = (f"{name}={words.param(value)}" for name, value in zip(names, params.values(), strict=True))
    return Text("  ".join(given), style="dim")


def _scale(values: Iterable[float], direction: str) -> tuple[float, float]:
    """Return the lowest and the highest value that sparklines tell apart, without the worst tenth."""
    known = sorted(value for value in values if math.isfinite(value))
    if not known:
        return 0.0, 0.0
    worst = int(WORST_SHARE * len(known))
    return (known[0], known[-1 - worst]) if direction == "minimize" else (known[worst], known[-1])
