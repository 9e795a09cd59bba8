"""The output of `hpo replay`."""

from __future__ import annotations

import dataclasses
import math
from statistics import median
from typing import TYPE_CHECKING, Any

from hpo import text
from hpo.files import without_nan
from hpo.study.format import duration, value_text

if TYPE_CHECKING:
    from hpo.lab.report import Quartiles, Report, Retrained, TableFacts, Winner

TIED = 2.0  # times as many rows at the goal as the goal asks for: ties
SHARES = {0.25: "a quarter", 0.5: "half", 1.0: "all"}  # of the budget, in words


def report_text(report: Report) -> str:
    """Return what replays with many seeds show, a line for each figure."""
    replays = f"{report.seeds} replays" if report.seeds > 1 else "1 replay"
    workers = f"{report.workers} workers" if report.workers > 1 else "1 worker"
    stacks = f" with stacks of {report.slots}" if report.slots > 1 else ""
    diverged = f", {report.diverged:.0f} diverged" if report.diverged else ""
    ends = f"{report.complete:.0f} complete, {report.pruned:.0f} pruned{diverged}"
    regrets = ", ".join(f"{value_text(found.median)} at {SHARES[share]}" for share, found in report.regrets.items())
    lines = [
        f"table    {table_text(report.table)}",
        f"replay   sampler {report.sampler}, pruner {report.pruner}, {workers}{stacks}, {replays} of {report.epochs:,.0f} epochs",
        f"top 1 %  {_reach_text(report)}",
        f"regret   {regrets} of the budget (medians)",
        f"trials   {report.trials:.0f} a replay: {ends}{_unknown_text(report)}",
        f"CPU      {_cpu_text(report)}",
    ]
    if report.mapping is not None:
        far = f"{report.mapping.median:.3f} in the median, below {report.mapping.high:.3f} for nine in ten"
        lines.append(
            f"mapping  distance from a proposal to its row {far}; {report.mapping.strays:.1%} without a row of their branch"
        )
    if report.winner is not None:
        lines.append(f"winner   {winner_text(report.winner, report.pruner)}")
    if report.retrained is not None:
        lines.append(f"again    {_retrained_text(report.retrained, report)}")
    if report.table.at_goal > TIED * max(0.01 * report.table.rows, 1):
        share = report.table.at_goal / report.table.rows
        lines.append(f"note     {share:.0%} of the rows are as good as the top 1 %: ties; record a metric such as loss")
    if report.slots > 1 and not report.table.stack_keys:
        lines.append("note     the table does not know which trials may share a stack; here all of them may")
    return text.page(lines)


def table_text(table: TableFacts) -> str:
    """Return what a table holds."""
    others = {"diverged": table.diverged, "cut off": table.cut, "without a result": table.failed}
    told = "".join(f", {count} {word}" for word, count in others.items() if count)
    return (
        f"{table.name}: {table.rows:,} whole curves of up to {table.longest} epochs{told}; {table.direction} {table.metric}, "
        f"best {value_text(table.best)}, top 1 % from {value_text(table.goal)}"
    )


def _retrained_text(retrained: Retrained, report: Report) -> str:
    """Return what the best trials of the replays came to when they were trained again."""
    value, rank, others = retrained.value, retrained.rank, report.seeds - retrained.replays
    rows = f"the {retrained.rows} trials that were trained again"
    if value is None or rank is None:
        return f"no replay has its best trial among {rows}"
    outside = f"; the best trial of {others} of {report.seeds} replays is none of these" if others else ""
    values = f"{value_text(value.median)} ({value_text(value.low)} to {value_text(value.high)})"
    return f"with another seed the best trial of a replay has {values}, rank {_quartiles_text(rank)} of {rows}{outside}"


def winner_text(winner: Winner, pruner: str) -> str:
    """Return in one sentence whether the pruner would have ended the recorded winner."""
    asked = f"would {pruner} have ended the winner, trial {winner.number} ({value_text(winner.value)})?"
    if not winner.ended:
        return f"{asked} Unknown: it did not end within the budget"
    if not winner.pruned_after:
        return f"{asked} No" + (f", in none of {winner.ended} replays" if winner.ended > 1 else "")
    of = f", in {len(winner.pruned_after)} of {winner.ended} replays" if winner.ended > 1 else ""
    guard = f", {winner.diverged} times by the divergence guard" if winner.diverged else ""
    return f"{asked} Yes{of}, after epoch {median(winner.pruned_after):g} of {winner.epochs}{guard}"


def to_json(report: Report) -> dict[str, Any]:
    """Return the report in plain JSON types. Numbers that are not finite become None."""
    found = dataclasses.asdict(report)
    found["regrets"] = {str(share): one for share, one in found["regrets"].items()}
    found["reached_after"] = list(report.reached_after)
    plain: dict[str, Any] = without_nan(found)
    return plain


def _reach_text(report: Report) -> str:
    missed = f"missed by {report.missed * report.seeds:.0f} of {report.seeds} ({report.missed:.0%})"
    if report.missed == 1:
        return missed
    seconds = report.reach_seconds.median
    simulated = f", {duration(seconds)} simulated" if math.isfinite(seconds) else ""
    return f"{_quartiles_text(report.reach_epochs)} epochs{simulated}; {missed}"


def _quartiles_text(found: Quartiles) -> str:
    return f"{_count_text(found.median)} ({_count_text(found.low)} to {_count_text(found.high)})"


def _count_text(number: float) -> str:
    return f"{number:,.0f}" if math.isfinite(number) else "more"


def _unknown_text(report: Report) -> str:
    return f"; {report.unknown:.0f} would have gone on where their curve was cut off" if report.unknown else ""


def _cpu_text(report: Report) -> str:
    told = f"pruner {report.pruner_seconds:.2f} s a replay"
    if report.mapping is None:
        return told
    return f"sampler {report.sampler_seconds:.2f} s a replay, {1000 * report.suggestion_seconds:.1f} ms a suggestion; {told}"
