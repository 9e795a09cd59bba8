"""The sections of a report in their order: words, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpo import text
from hpo.analysis.confirmation import Confirmation
from hpo.analysis.effects import CHANCE, RANGE
from hpo.analysis.health import TIE
from hpo.analysis.verdict import Mean
from hpo.study.format import amount_text, counted, duration, range_text, value_text
from hpo.study.results import TrialResult
from hpo.view import confirmed as confirmations
from hpo.view import words
from hpo.view.report.figures import of_confirmation, of_curves, of_front, of_history, of_parameters
from hpo.view.report.figures.figure import Figure
from hpo.view.report.privacy import Privacy
from hpo.view.report.reading import MOST_CURVES, StudyReport

MOST_NAMES = 12  # of parameters in a sentence


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the cells are texts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that is wrong."""

    name: str
    text: str
    mends: Sequence[str]  # sentences
    code: str = ""  # to be pasted


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    lead: Sequence[str] = ()  # sentences
    table: Table | None = None
    figures: Sequence[Figure] = ()
    columns: int = 1  # figures beside each other on a wide screen
    code: str = ""  # text as it is
    commands: Sequence[str] = ()
    notices: Sequence[Notice] = ()


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number at the head of a study."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One study on the page."""

    name: str
    goal: str
    state: str
    tiles: Sequence[Tile]
    sections: Sequence[Section] = field(default_factory=tuple)


def part(report: StudyReport, privacy: Privacy) -> Part:
    """Return a study as a part of the page. Sections that have nothing to say are left out."""
    found = [
        verdict(report),
        confirmed(report),
        leaders(report),
        health(report),
        *([front(report)] if report.are_several else []),
        history(report),
        curves(report),
        importance(report),
        slices(report),
        contours(report),
        parallel(report),
        pruning(report),
        winner(report),
        failures(report),
        cost(report),
        receipts(report, privacy),
    ]
    return Part(
        name=report.name,
        goal=f"{words.goal(report.summary)}{'' if report.are_several else ' ' + report.metric}, {report.summary.searched_by}",
        state=_state(report),
        tiles=tiles(report),
        sections=[one for one in found if one is not None],
    )


def _state(report: StudyReport) -> str:
    summary = report.summary
    if summary.stop_reason:
        return f"stopped: {summary.stop_reason}"
    unfinished = [
        f"{summary.counts[state]} {state}" for state in ("running", "parked", "foreign") if summary.counts[state]
    ]
    return f"not over: {', '.join(unfinished)}" if unfinished else "over" if summary.is_over else "not over"


def tiles(report: StudyReport) -> list[Tile]:
    """Return the numbers at the head of a study."""
    summary, cost = report.summary, report.cost
    found = []
    if report.winner is not None:
        best = report.winner
        note = f"95 %: {range_text(best.interval)}" if best.interval else f"trial {best.number}"
        found.append(Tile(name=f"best {report.metric}", value=value_text(best.value), note=note))
        if (mean := _mean_of_leader(report)) is not None:
            note = f"95 %: {value_text(mean.low)} to {value_text(mean.high)}"
            found.append(Tile(name="mean of new runs", value=value_text(mean.value), note=note))
    elif report.are_several:
        found.append(Tile(name="Pareto front", value=f"{len(report.columns.leaders):,}", note="trials"))
    states = counted(summary.counts)
    found.append(Tile(name="trials", value=f"{summary.spent:,}", note=", ".join(states.values())))
    if cost.epochs:
        note = f"{report.pruning.share:.0%} saved by the pruner" if report.pruning else ""
        found.append(Tile(name=f"{report.unit}s", value=f"{cost.epochs:,}", note=note))
    trained = f"{duration(cost.training_seconds)} of training" if cost.training_seconds else ""
    found.append(Tile(name="time", value=duration(cost.seconds), note=trained))
    if cost.peak_memory:
        found.append(Tile(name="peak memory", value=f"{cost.peak_memory:,.0f} MiB", note="of the largest process"))
    return found


def _mean_of_leader(report: StudyReport) -> Mean | None:
    """Return the mean of the trial that a confirmation chose; None before it has a verdict."""
    found = report.confirmation
    if found is None or found.verdict is None or not found.verdict.is_decided:
        return None
    return next(one.means[0] for one in found.leaders if one.number == found.verdict.leader)


# --- the result -------------------------------------------------------------------------------------------------------


def verdict(report: StudyReport) -> Section | None:
    """Return what is known of the best trial."""
    if not report.leaders:
        why = words.none_best(report.summary)
        return Section(name="verdict", title="Verdict", lead=[f"There is no result: {why}."])
    if report.confirmation is not None:
        lead, commands = _judged(report.confirmation)
        return Section(name="verdict", title="Verdict", lead=lead, commands=commands)
    if report.confirms is not None:
        lead = [f"These are the runs that confirm study {report.confirms}. Its report has the verdict."]
        return Section(name="verdict", title="Verdict", lead=lead, commands=[text.command("report", report.confirms)])
    lead = ["Not confirmed: these values are of one run each."]
    lead += [f"{line[0].upper()}{line[1:]}." for line in report.warnings]
    is_ours = bool(report.fingerprint)  # Optuna's own studies cannot be trained again
    return Section(
        name="verdict",
        title="Verdict",
        lead=lead,
        commands=[text.command("confirm", report.name)] if is_ours else [],
    )


def _judged(found: Confirmation) -> tuple[list[str], list[str]]:
    """Return the sentences of a confirmation's verdict, and the next commands."""
    export = [text.command("export", found.study, options="--confirmed")]
    if not found.is_complete:
        again = [text.command("confirm", found.study)]
        return [f"The confirmation is not over: {found.settled} of {found.runs} runs have ended."], again
    if found.several:
        left = [one for one in found.leaders if not one.left_out and one.dominance is None]
        lead = [
            f"After the new runs these trials are on the front: {', '.join(str(one.number) for one in left) or 'none'}."
        ]
        for one in found.leaders:
            if one.dominance is not None:
                sure = "error at most 10 %" if one.dominance.is_sure else "by the means, not sure"
                lead.append(f"Trial {one.number} is dominated by trial {one.dominance.by} ({sure}).")
        return lead, []
    judged = found.verdict
    if judged is None:
        return ["There is no verdict: too few leaders can be compared."], []
    if judged.kind == "best":
        return [f"Trial {judged.leader} is the best of the leaders (error at most {judged.error:.0%})."], export
    if judged.kind == "within":
        return [
            f"Trial {judged.leader} is within {judged.delta:g} of the best (error at most {judged.error:.0%})."
        ], export
    more = judged.more or 1
    return [
        f"Not decided. The run-to-run deviation is {value_text(judged.deviation)}, and about {more:,} more runs of each would "
        "decide.",
        f"Another leader may be better than trial {judged.leader} by {value_text(judged.bound)}.",
    ], [text.command("confirm", found.study, options=f"--seeds {found.looks[-1] + more}")]


def confirmed(report: StudyReport) -> Section | None:
    """Return the leaders after their new runs."""
    found = report.confirmation
    if found is None or not any(one.means for one in found.leaders):
        return None
    rows = []
    for place, (name, direction) in enumerate(found.objectives.items()):
        for one in confirmations.by_mean(found, place):
            mean = one.means[place] if one.means else None
            rows.append(
                [
                    *([name] if found.several else []),
                    str(one.number),
                    amount_text(one.seen[place]),
                    "-" if mean is None else amount_text(mean.value),
                    "-" if mean is None or mean.runs < 2 else f"{value_text(mean.low)} to {value_text(mean.high)}",
                    "-" if mean is None else confirmations.shrank_text(one.seen[place], mean.value, direction),
                    "0" if mean is None else str(mean.runs),
                    one.left_out or "-",
                ]
            )
    head = [
        *(["objective"] if found.several else []),
        "trial",
        "search",
        "mean",
        "95 % of the mean",
        "shrank",
        "runs",
        "left out",
    ]
    if all(row[-1] == "-" for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    lead = [f"{confirmations.runs_text(found)[0].upper()}{confirmations.runs_text(found)[1:]}."]
    return Section(
        name="confirmed",
        title="Leaders, trained again",
        lead=lead,
        table=Table(head=head, rows=rows),
        figures=of_confirmation.confirmed(report),
    )


def leaders(report: StudyReport) -> Section | None:
    """Return the best trials as a table."""
    if not report.leaders:
        return None
    names = report.columns.goals.names
    params = list(dict.fromkeys(name for one in report.leaders for name in one.params))
    has_interval = any(one.interval for one in report.leaders)
    head = ["trial", *(names if report.are_several else [report.metric]), *(["95 %"] if has_interval else []), *params]
    rows = [
        [
            str(one.number),
            *([amount_text(one.values[name]) for name in names] if report.are_several else [value_text(one.value)]),
            *([range_text(one.interval) if one.interval else "-"] if has_interval else []),
            *(words.param(one.params[name]) if name in one.params else "-" for name in params),
        ]
        for one in report.leaders
    ]
    what = "Pareto front" if report.are_several else "Best trials of the search"
    more = len(report.columns.leaders) - len(rows)
    lead = [f"{more:,} more trials are on the front."] if report.are_several and more > 0 else []
    return Section(name="leaders", title=what, lead=lead, table=Table(head=head, rows=rows))


def health(report: StudyReport) -> Section | None:
    """Return the findings of the health checks; nothing if all is well."""
    findings = [
        one for one in report.findings if report.confirmation is None or one.name != TIE
    ]  # which the verdict tells
    found = []
    for one in findings:
        lines = one.mend.split("\n")
        code = [line.removeprefix("  ") for line in lines if line.startswith("  ")]
        said = [line for line in lines if line and not line.startswith("  ")]
        found.append(Notice(name=one.name, text=one.text, mends=said, code="\n".join(code)))
    return Section(name="health", title="Health", notices=found) if found else None


def front(report: StudyReport) -> Section | None:
    """Return the figures of the Pareto front."""
    found = of_front.fronts(report)
    return (
        Section(name="front", title="Objectives against each other", figures=found, columns=min(2, len(found)))
        if found
        else None
    )


# --- the search -------------------------------------------------------------------------------------------------------


def history(report: StudyReport) -> Section | None:
    """Return how the best value improved."""
    found = of_history.history(report)
    if not found:
        return None
    lead = [] if not report.are_several else [f"The figures show the first objective, {report.metric}."]
    shown = int(report.columns.is_feasible.sum())
    if shown > of_history.MOST_POINTS:
        lead.append(f"Of {shown:,} complete trials {of_history.MOST_POINTS:,} are drawn. The line is of all.")
    return Section(name="history", title="History", lead=lead, figures=found, columns=2)


def curves(report: StudyReport) -> Section | None:
    """Return the curves of the trials."""
    found = of_curves.curves(report)
    if not found:
        return None
    whole = int((report.columns.epochs > 0).sum())
    lead = (
        [f"{len(report.curves)} of {whole:,} curves are drawn: the best trials, and others at random."]
        if whole > MOST_CURVES
        else []
    )
    return Section(name="curves", title="Curves", lead=lead, figures=found)


def importance(report: StudyReport) -> Section | None:
    """Return which parameters decide whether a trial is among the best."""
    lead, found = [], []
    for place, one in enumerate(report.importances):
        if one.why_none:
            lead.append(f"Nothing is said for {one.objective}: {one.why_none}.")
            continue
        found.append(of_parameters.importances(one, place))
        lead.append(
            f"The {one.best:,} best of {one.trials:,} trials are compared with all of them (PED-ANOVA). "
            "Pruned trials count as not among the best."
        )
        lead.append(f"Whiskers hold the {RANGE[0]} % to {RANGE[1]} % range of bootstrap samples.")
        idle = one.without_effect
        if idle:
            named = ", ".join(idle[:MOST_NAMES]) + (
                f" and {len(idle) - MOST_NAMES} more" if len(idle) > MOST_NAMES else ""
            )
            lead.append(
                f"Within chance, so no effect is shown: {named}. Shuffled values reach as much in {100 - CHANCE} % of cases."
            )
        if len(one.found) > of_parameters.MOST_BARS:
            lead.append(f"The {of_parameters.MOST_BARS} largest of {len(one.found)} are drawn.")
    if not lead:
        return None
    return Section(name="importance", title="Importance of parameters", lead=list(dict.fromkeys(lead)), figures=found)


def slices(report: StudyReport) -> Section | None:
    """Return the value over each parameter."""
    found = of_parameters.slices(report)
    if not found:
        return None
    searched = len(of_parameters.by_importance(report))
    lead = [
        f"{report.metric[0].upper()}{report.metric[1:]} of complete trials over each parameter, the most important first."
    ]
    if searched > len(found):
        lead.append(f"{len(found)} of {searched} parameters are drawn.")
    return Section(name="slices", title="Slices", lead=lead, figures=found, columns=3)


def contours(report: StudyReport) -> Section | None:
    """Return the value over pairs of parameters."""
    found = of_parameters.contours(report)
    lead = [
        f"{report.metric[0].upper()}{report.metric[1:]}, smoothed over the complete trials.",
        "Nothing is drawn where no trial is near.",
    ]
    return (
        Section(name="contours", title="Contours", lead=lead, figures=found, columns=min(3, len(found)))
        if found
        else None
    )


def parallel(report: StudyReport) -> Section | None:
    """Return the best trials over all parameters."""
    found = of_parameters.parallel(report)
    lead = ["Each line is a trial. The stronger its colour, the better it is."]
    return Section(name="parallel", title="Parallel coordinates", lead=lead, figures=found) if found else None


def pruning(report: StudyReport) -> Section | None:
    """Return what the pruner saved and what it may have cost."""
    found = report.pruning
    if found is None:
        return None
    unit = report.unit
    lead = [
        f"{found.pruned:,} trials were pruned. They left out {found.saved:,} {unit}s, {found.share:.0%} of what all trials would "
        "have trained."
    ]
    if found.judged:
        lead.append(
            f"About {found.missed:.1f} of them might have become the best. This estimate lets each pruned trial improve as "
            "complete trials did that were nearest to it at the same point."
        )
        if found.judged < found.pruned:
            lead.append(f"It covers {found.judged:,} of the pruned trials; of the others too little is known.")
    else:
        lead.append(
            "What this may have cost cannot be said: too few complete trials have a value where trials were pruned."
        )
    return Section(name="pruning", title="What the pruner saved", lead=lead)


def winner(report: StudyReport) -> Section | None:
    """Return the best trial's curves."""
    found = of_curves.winner(report)
    if not found or report.winner is None:
        return None
    lead = []
    if not any(one.name == "winner-norms" for one in found):
        lead.append("Norms were not recorded; norms = true in [watch] records them.")
    title = f"The best trial: {report.winner.number}"
    return Section(name="winner", title=title, lead=lead, figures=found, columns=3)


# --- what it took -----------------------------------------------------------------------------------------------------


def failures(report: StudyReport) -> Section | None:
    """Return the failures by kind."""
    found = report.summary.failures
    if not found:
        return None
    rows = [[one.kind, f"{one.count:,}", f"{one.retried:,}", text.safe(one.message or "-", 500)] for one in found]
    head = ["kind", "failures", "tried again", "the last message"]
    return Section(name="failures", title="Failures", table=Table(head=head, rows=rows))


def cost(report: StudyReport) -> Section | None:
    """Return what the search spent."""
    spent = report.cost
    rows = [[f"{report.unit}s of {state} trials", f"{epochs:,}"] for state, epochs in spent.by_state.items()]
    rows.append([f"{report.unit}s of all trials", f"{spent.epochs:,}"])
    if report.pruning:
        rows.append([f"{report.unit}s saved by the pruner", f"{report.pruning.saved:,}"])
    if spent.training_seconds:
        rows.append(["training time, summed over trials", duration(spent.training_seconds)])
    rows.append(["time of the search", duration(spent.seconds)])
    memory = "not recorded; resources = true in [watch] records it"
    if spent.peak_memory:
        memory = f"{spent.peak_memory:,.0f} MiB"
    rows.append(["peak memory of a process", memory])
    return Section(name="cost", title="Cost", table=Table(head=["what", "spent"], rows=rows))


def receipts(report: StudyReport, privacy: Privacy) -> Section | None:
    """Return what the best trial was made from, and the study's settings."""
    rows = []
    if report.fingerprint:
        rows.append(["fingerprint of the study", report.fingerprint])
        rows.append(["openings of the test part", str(report.openings)])
    if report.winner is not None:
        rows.append(["trial", str(report.winner.number)])
        rows += [[name, _shown(value)] for name, value in _flat(privacy.receipt(report.winner.receipt))]
    if not rows:
        rows.append(["made by", "Optuna: it records no receipt"])
    commands = [text.command("export", report.name)] if report.winner is not None else []
    return Section(
        name="receipts",
        title="Receipts",
        table=Table(head=["what", "value"], rows=rows),
        code=report.settings,
        commands=commands,
    )


def _flat(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key} ")
        else:
            yield f"{before}{key}", value


def _shown(value: Any) -> str:
    return text.safe("none" if value is None or value == "" else value, 200)


# --- several studies --------------------------------------------------------------------------------------------------


def comparison(reports: Sequence[StudyReport]) -> Section:
    """Return several studies beside each other."""
    rows = []
    for one in reports:
        best: TrialResult | None = one.winner
        value = value_text(best.value) if best else f"front of {len(one.columns.leaders)}" if one.are_several else "-"
        rows.append(
            [
                one.name,
                f"{one.direction} {one.metric}",
                value,
                range_text(best.interval) if best and best.interval else "-",
                f"{one.summary.finished:,}",
                f"{one.cost.epochs:,}",
                duration(one.cost.seconds),
                f"{one.pruning.share:.0%}" if one.pruning else "-",
            ]
        )
    head = ["study", "goal", "best", "95 %", "finished", "epochs", "time", "saved by pruning"]
    lead = []
    if len({(one.metric, one.direction) for one in reports}) > 1:
        lead.append("The studies have different goals. Only those of one goal share a figure.")
    if any(one.columns.is_imported.any() for one in reports):
        lead.append("What a fork copied into a study has cost it nothing.")
    found = of_history.compared(reports)
    return Section(
        name="compared",
        title="Beside each other",
        lead=lead,
        table=Table(head=head, rows=rows),
        figures=found,
        columns=2,
    )
