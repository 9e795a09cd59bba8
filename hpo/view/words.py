"""Words on a study and a trial that the live picture and the printed pages have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo import text
from hpo.spec import budget
from hpo.study.format import amount_text, counted, duration

if TYPE_CHECKING:
    from hpo.queue.limits import Limit
    from hpo.study.status import FailureCount, RunningTrial, Summary
    from hpo.study.trial_history import FinishedTrial, TrialHistory


def held(summary: Summary) -> str:
    """Return why no new trial is started, "" if trials are started."""
    if summary.hold and not summary.stop_reason:
        return f"{summary.hold}: workers wait; {text.command('resume', summary.name)}"
    if not summary.stop_reason:
        return ""
    if summary.stop_reason.startswith(budget.SIGN):
        return f"stopped: {summary.stop_reason}; {budget.MEND}"
    return f"stopped: {summary.stop_reason}" + (f"; {text.command('resume', summary.name)}" if summary.hold else "")


def limit(one: Limit) -> str:
    """Return a limit and what is used of it."""
    if one.key == "target":
        return f"target {one.wanted:g}" + ("" if one.used is None else f" (best {one.used:.6g})")
    if one.key == "patience":
        return f"{one.used or 0:.0f} of {one.wanted:.0f} trials without a better value"
    if one.key == "gpu_hours":
        return f"{(one.used or 0) / budget.HOUR:.2f} of {one.wanted / budget.HOUR:g} GPU-hours"
    return f"{duration(one.used or 0)} of {duration(one.wanted)} wall clock"


def states(summary: Summary) -> dict[str, str]:
    """Return {state: how many trials are in it, in words}, in the order in which they are shown."""
    found = counted(summary.counts)
    if summary.imported:
        found["imported"] = f"{summary.imported} of these taken from another study"
    return found or {"none": "no trial has begun"}


def by_trial(summary: Summary, number: int) -> str:
    """Return "by trial N". A trial that a fork or an import took is named as one of another study."""
    return f"by trial {number}" + (", taken from another study" if number < summary.imported else "")


def origin(found: Mapping[str, Any]) -> str:
    """Return where a fork or an import found a trial, as `export.taken_from` returns it."""
    if "study" not in found:  # a fork by an earlier version
        return f"trial {found['trial']} of the study that was forked"
    return f"trial {found['trial']} of {found['study']!r} in {found['storage']}, made by {found['made_by']}"


def failures(failure: FailureCount) -> str:
    """Return the number of failures of a kind, and how many of them were retried."""
    return f"{failure.count} × {failure.kind}" + (f" ({failure.retried} tried again)" if failure.retried else "")


def trained(trial: FinishedTrial | TrialHistory) -> str:
    """Return how far a trial got: its epochs, or the reports of an objective of the user's own, whose steps may start at 0."""
    count, unit = (trial.epochs, "epoch") if trial.reports is None else (trial.reports, "report")
    return f"{count} {unit}{'' if count == 1 else 's'}"


def clock(summary: Summary) -> str:
    elapsed = duration(summary.seconds)
    if summary.is_over:
        return f"done in {elapsed}"
    return elapsed if summary.seconds_left is None else f"{elapsed} · about {duration(summary.seconds_left)} left"


def of_budget(finished: int, summary: Summary, joint: str) -> str:
    """Return a number of finished trials beside the budget, which may have been lowered below it."""
    budget = summary.own_budget
    return f"{finished}{joint}{budget}" if finished <= budget else f"{finished}, budget {budget}"


def none_best(summary: Summary) -> str:
    if not summary.infeasible:
        return "no trial is complete yet"
    return f"no result yet: {violating(summary)}"


def violating(summary: Summary) -> str:
    is_one = summary.infeasible == 1
    return f"{summary.infeasible} complete trial{' violates' if is_one else 's violate'} a constraint"


def goal(summary: Summary) -> str:
    """Return the direction of the only objective, or the directions of all objectives with their names."""
    several = (f"{direction} {name}" for name, direction in summary.objectives.items())
    return ", ".join(several) or summary.direction


def named_values(values: Mapping[str, float]) -> str:
    """Return the values of several objectives by name."""
    return " ".join(f"{name}={amount_text(value)}" for name, value in values.items())


def again(trial: RunningTrial) -> str:
    """Return how often a trial has failed before; attempts that only waited for their turn have lost nothing."""
    return f"failed {trial.failed} time{'s' if trial.failed > 1 else ''} before" if trial.failed else ""


def param(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text.short(str(value).replace(" ", ""))
