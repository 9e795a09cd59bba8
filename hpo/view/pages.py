"""The pages that commands print: studies, one study, one trial, winners. They are plain text, so rich is not loaded.

They show what `hpo.study` has read and access no database.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from hpo import text
from hpo.study.format import STATES, amount_text, duration, range_text, value_text, with_interval
from hpo.view import words
from hpo.view.sparkline import sparkline

if TYPE_CHECKING:
    from hpo.analysis.health import Finding
    from hpo.storage.study_rows import Opening
    from hpo.study.results import TrialResult
    from hpo.study.status import ParkedTrial, Summary
    from hpo.study.trial_history import FinishedTrial, TrialHistory

FRONT = "front    "  # the head of the Pareto front's table
CURVE_WIDTH = 40  # characters of a curve on the page of one trial


def finished_line(trial: FinishedTrial, summary: Summary) -> str:
    """Return one line on a finished trial: its end, its parameters, and the progress of the study."""
    trial = text.all_safe(trial)  # of the summary only numbers are shown, and it holds all running trials
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
        rows.append((summary.name, trials, best, words.clock(summary), _states(summary) + stopped))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return text.page(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    )


def status_text(found: Summary) -> str:
    """Return the status of a study in plain lines."""
    summary = text.all_safe(found)
    lines = [
        f"{summary.name}  ({words.goal(summary)}, {summary.searched_by})",
        f"trials   {_finished(summary)}: {_states(summary)}",
        *_best_lines(summary),
        f"time     {words.clock(summary)}",
    ]
    if summary.limits:
        lines.append(f"budget   {' · '.join(map(words.limit, summary.limits))}")
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
    if summary.bucket:
        lines.append(f"bucket   {summary.bucket}")
    for parked in summary.parked:
        lines.append(f"parked   trial {parked.number}, {_then(parked)}")
    return text.page(lines)


def _states(summary: Summary) -> str:
    return " · ".join(words.states(summary).values())


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
        return [f"best     {value} {words.by_trial(summary, summary.best.number)}"]
    return [
        f"front    {words.named_values(trial.values)} {words.by_trial(summary, trial.number)}"
        for trial in summary.front
    ]


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
        lines += [f"opened   {_opening_text(one)}" for one in found.openings if one.opened_by]
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


def _opening_text(opening: Opening) -> str:
    """Return who opened the test split, when, for how many trainings and after how many trials."""
    when = datetime.fromtimestamp(opening.opened_at).strftime("%Y-%m-%d %H:%M")
    models = "1 model" if opening.trainings == 1 else f"{opening.trainings} models"
    chosen = f", the trial chosen from {opening.trials_tried:,}" if opening.trials_tried else ""
    return f"{when} by {opening.opened_by}: {models}{chosen}"


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


def to_json(shown: Summary | TrialHistory, findings: Sequence[Finding] | None = None) -> dict[str, Any]:
    """Return a summary or history in plain JSON types, with the findings of health checks if they were made.

    Numbers that are not finite become None.
    """
    health = {} if findings is None else {"health": [dataclasses.asdict(one) for one in findings]}
    plain: dict[str, Any] = _plain(dataclasses.asdict(shown) | health)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
