"""The pages of a confirmation: the verdict, and each leader's mean, interval and shrinkage."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hpo import text
from hpo.analysis import confirmation
from hpo.analysis.verdict import Mean, Verdict
from hpo.study.format import amount_text, value_text

if TYPE_CHECKING:
    from hpo.analysis.confirmation import Confirmation, Confirmed
    from hpo.analysis.noise import Closeness
    from hpo.study.status import Best
    from hpo.study.study import Study

COLUMNS = "{:>6}  {:>9}  {:>9}  {:>21}  {:>9}  {:>4}"


def page(found: Confirmation, again: str = "") -> str:
    """Return the page of a confirmation.

    Args:
        found: the confirmation.
        again: the `--storage` option for the next commands.
    """
    lines = [f"study {found.study}: {len(found.leaders)} leaders, {runs_text(found)}"]
    for place, (name, direction) in enumerate(found.objectives.items()):
        lines += [
            "",
            f"{name}, {direction}d",
            COLUMNS.format("trial", "search", "mean", "95 % interval", "shrank", "runs"),
        ]
        lines += [_row(one, place, direction) for one in by_mean(found, place)]
    lines += ["", *(f"trial {one.number} is not compared: {one.left_out}" for one in found.leaders if one.left_out)]
    lines += [*_verdict_lines(found, again), *newer_lines(found, again)]
    return text.page(lines)


def newer_lines(found: Confirmation, again: str = "") -> list[str]:
    """Return lines on trials that the search has added since the leaders were chosen, none without a good one."""
    if not found.newer:
        return []
    were = "trial was" if found.newer == 1 else "trials were"
    return [
        f"newer    {found.newer:,} later {were} better in the search than the last leader",
        f"         to choose leaders again: {text.command('delete', found.name, options=again)}",
    ]


def runs_text(found: Confirmation) -> str:
    """Return how many runs each leader has, and what they have in common."""
    runs = found.looks[-1]
    folds = f", over {min(runs, found.folds)} of {found.folds} folds" if found.folds else ""
    open_ones = "" if found.is_complete else f", {found.settled} of {found.runs} have ended"
    return f"{runs} runs of each with common fresh seeds{folds}{open_ones}"


def by_mean(found: Confirmation, place: int) -> list[Confirmed]:
    """Return the leaders, the best mean first; with several objectives in their own order."""
    sign = -1 if [*found.objectives.values()][place] == "maximize" else 1
    if found.several:
        return list(found.leaders)
    return sorted(
        found.leaders, key=lambda one: (bool(one.left_out), sign * one.means[0].value if one.means else 0.0, one.number)
    )


def _row(one: Confirmed, place: int, direction: str) -> str:
    seen = one.seen[place]
    if not one.means:
        return COLUMNS.format(one.number, amount_text(seen), "-", "-", "-", 0)
    mean = one.means[place]
    shrank = shrank_text(seen, mean.value, direction)
    return COLUMNS.format(one.number, amount_text(seen), amount_text(mean.value), _range(mean), shrank, mean.runs)


def _range(mean: Mean) -> str:
    if mean.runs > 1 and not mean.deviation:
        return "all equal"
    return "-" if mean.runs < 2 else f"{value_text(mean.low)} to {value_text(mean.high)}"


def shrank_text(seen: float, mean: float, direction: str) -> str:
    """Return by how much the mean of the new runs is worse than the value of the search, in the digits of that value."""
    change = (seen - mean) * (1 if direction == "maximize" else -1)
    if not change:
        return "0"
    return f"{change:+.4f}" if value_text(seen).rpartition(".")[2].isdecimal() else f"{change:+.3g}"


def _verdict_lines(found: Confirmation, again: str) -> list[str]:
    lines = []
    if found.is_exact:
        lines.append(
            "all runs of a leader gave the same value: "
            + (
                "nothing in this training depends on the seed"
                if found.seeded
                else "your code sets its own seed, or uses none"
            )
        )
    if found.several:
        return [*lines, *_front_lines(found)]
    if found.verdict is None:
        why = "too few leaders can be compared" if found.is_complete else "the runs have not all ended"
        return [*lines, f"verdict  none: {why}"]
    return [*lines, *verdict_lines(found.verdict, found, again)]


def verdict_lines(judged: Verdict, found: Confirmation, again: str = "") -> list[str]:
    """Return the verdict and the next command."""
    risk = f"error at most {judged.error:.0%}" + (f", look {judged.look}" if judged.look > 1 else "")
    export = text.command("export", found.study, options=f"{again} --confirmed".strip())
    if judged.kind == "best":
        said = f"trial {judged.leader} is best ({risk})"
    elif judged.kind == "within":
        said = f"trial {judged.leader} is within {judged.delta:g} of the best ({risk})"
    else:
        runs = found.looks[-1] + (judged.more or 1)
        export = text.command("confirm", found.study, options=f"{again} --seeds {runs}".strip())
        wider = text.command("confirm", found.study, options=f"{again} --delta {_rounded_up(judged.bound):g}".strip())
        export = f"{export}\n         or accept a larger difference: {wider}"
        said = (
            f"not decided: run-to-run deviation {value_text(judged.deviation)}, about {judged.more:,} more runs of each\n"
            f"         would decide; another leader may be better than trial {judged.leader} by {value_text(judged.bound)}"
        )
    return [*f"verdict  {said}".split("\n"), *f"next     {export}".split("\n")]


def _rounded_up(value: float) -> float:
    """Return a value above this one with two digits."""
    if not value:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return (math.floor(value / unit) + 1) * unit


def _front_lines(found: Confirmation) -> list[str]:
    if not found.is_complete:
        return ["front    the runs have not all ended"]
    left = [one for one in found.leaders if not one.left_out and one.dominance is None]
    lines = [f"front    after the new runs: trials {', '.join(str(one.number) for one in left) or 'none'}"]
    for one in found.leaders:
        if one.dominance is not None:
            sure = "error at most 10%" if one.dominance.is_sure else "by the means, not sure"
            lines.append(f"         trial {one.number} is dominated by trial {one.dominance.by} ({sure})")
    return lines


def to_json(found: Confirmation) -> dict[str, Any]:
    """Return a confirmation as JSON values."""
    return {**asdict(found), "is_complete": found.is_complete}


def choice_lines(study: Study, best: Best | None, again: str = "") -> list[str]:
    """Return lines on what else than the best value decides between the leading trials: a confirmation, or the lack of one.

    Args:
        study: the study.
        best: its best trial.
        again: the `--storage` option for the next commands.
    """
    found = verdict_line(study, again)
    return found or closeness_lines(confirmation.closeness(study, best), study.name, again)


def verdict_line(study: Study, again: str = "") -> list[str]:
    """Return lines on the verdict of a study's confirmation, none without one that is decided."""
    confirmed = confirmation.decided(study)
    if confirmed is None or confirmed.verdict is None:
        return []
    found = confirmed.verdict
    export = text.command("export", study.name, options=f"{again} --confirmed".strip())
    kind = "is best" if found.kind == "best" else f"is within {found.delta:g} of the best"
    return [f"confirmed trial {found.leader} {kind}: {export}", *newer_lines(confirmed, again)]


def closeness_lines(close: Closeness | None, study: str, again: str = "") -> list[str]:
    """Return lines that warn of leaders that tie or lie within the noise, and the command that decides between them."""
    if close is None or not close.is_close:
        return []
    said = []
    if close.tied > 1:
        said.append(f"{close.tied:,} trials tie at the best value")
    if close.noise is not None and close.within > close.tied:
        said.append(f"{close.within:,} lie within {value_text(close.noise.size)} of it, {close.noise.source}")
    return [
        *(f"{'close' if not place else '':<9}{one}" for place, one in enumerate(said)),
        f"         which is best: {text.command('confirm', study, options=again)}",
    ]
