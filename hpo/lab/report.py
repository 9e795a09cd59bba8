"""Replays with many seeds, and what they show together."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median

import numpy as np
import optuna
from optuna.trial import TrialState

from hpo.lab import plan as plans
from hpo.lab import replay
from hpo.lab.plan import Plan
from hpo.lab.replay import Course, TrialEnd
from hpo.lab.table import Ending, Table
from hpo.strategy.quiet import quiet_warnings

TOP = 0.01  # share of the COMPLETE rows that are the goal
BUDGET_SHARES = (0.25, 0.5, 1.0)  # at which the regret is taken


@dataclass(frozen=True, kw_only=True)
class Quartiles:
    """The median of replays between their quartiles. Each is a replay's own number, and infinite if that missed the goal."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Quartiles:
        low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75], method="inverted_cdf").tolist()
        return cls(low=low, median=middle, high=high)


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """What a table holds."""

    name: str
    metric: str
    direction: str
    rows: int  # that are whole; a sampler is replayed on these
    longest: int  # epochs of the longest row
    diverged: int
    cut: int
    failed: int
    best: float  # of all reports
    goal: float
    at_goal: int  # COMPLETE rows at the goal or better
    stack_keys: int  # different ones of the whole rows; 0 if none is known

    @classmethod
    def of(cls, table: Table) -> TableFacts:
        goal = table.goal(TOP)
        values = [table.sign * (table.rows[place].value or 0.0) for place in table.complete]
        return cls(
            name=table.name,
            metric=table.spec.metric if table.spec.is_declared else "value",
            direction=str(table.spec.direction),
            rows=len(table.whole),
            longest=table.longest,
            diverged=table.count(Ending.DIVERGED),
            cut=table.count(Ending.CUT),
            failed=table.count(Ending.FAILED),
            best=table.best,
            goal=goal,
            at_goal=sum(value >= table.sign * goal for value in values),
            stack_keys=len({table.rows[place].stack_key for place in table.whole} - {None}),
        )


@dataclass(frozen=True, kw_only=True)
class Winner:
    """What became of the table's best trial in replays of the recorded order."""

    number: int
    value: float
    epochs: int  # of its curve
    ended: int  # replays in which it ended
    pruned_after: tuple[int, ...]  # its epochs in each replay that pruned it
    diverged: int  # of these, the replays in which the divergence guard did it


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """How far the rows lie from the proposals that they stand for."""

    median: float
    high: float  # nine proposals in ten are nearer
    strays: float  # share of the proposals whose branch had no unused row


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """What the best complete trial of each replay came to when it was trained again with another seed."""

    rows: int  # of the table that were trained again
    replays: int  # whose best trial is one of these; the others count in neither quartiles
    value: Quartiles | None  # infinitely bad if it diverged; None without such a replay
    rank: Quartiles | None  # among the rows that were trained again, from 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """What replays with many seeds show together."""

    table: TableFacts
    sampler: str
    pruner: str
    workers: int
    slots: int  # trials that each of them trains together
    seeds: int
    epochs: float  # of a replay, the median
    reached_after: tuple[float, ...]  # epochs to the goal by seed; infinite if a replay missed it
    reach_epochs: Quartiles
    reach_seconds: Quartiles  # simulated
    missed: float  # share of the replays that never reached the goal
    regrets: dict[float, Quartiles]  # by share of the budget; infinite before the first report
    trials: float  # that ended in a replay, the mean
    complete: float  # of these, the mean
    pruned: float  # likewise; by the pruner
    diverged: float  # likewise; by themselves, or by the divergence guard
    unknown: float  # likewise; kept beyond the end of a curve that was cut off
    sampler_seconds: float  # CPU time of a replay, the median; 0 in the recorded order
    suggestion_seconds: float  # CPU time of a suggestion, the median over the replays
    pruner_seconds: float  # CPU time of a replay, the median
    mapping: Mapping | None  # None in the recorded order
    winner: Winner | None  # only in the recorded order
    retrained: Retrained | None  # None if no row was trained again


def replay_all(plan: Plan, seeds: int, processes: int) -> Report:
    """Replay with the seeds 0, 1, ... in several processes, and summarize.

    The recorded order with one worker is the same for each seed, so it is replayed once. Raises StudyError if too many curves
    were cut off where they were asked for.
    """
    wanted = range(1 if plan.keeps_order and plan.workers == 1 else seeds)
    report = summarize(plan, replay_each(plan, wanted, processes))
    if report.unknown > plan.most_cut * report.trials:
        raise plans.too_many_cut(f"{report.unknown:.0f} of {report.trials:.0f} trials", plan.most_cut)
    return report


def replay_each(
    plan: Plan, seeds: Sequence[int], processes: int, run: Callable[[Plan, int], Course] = replay.run
) -> list[Course]:
    """Replay once with each seed, in several processes."""
    once = partial(run, plan)
    if processes == 1 or len(seeds) == 1:
        return list(map(once, seeds))
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(min(processes, len(seeds)), mp_context=context, initializer=_quiet) as pool:
        return list(pool.map(once, seeds))


def _quiet() -> None:
    quiet_warnings()
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def summarize(plan: Plan, courses: Sequence[Course]) -> Report:
    """Return what the courses of a plan's replays show together."""
    table = plan.table
    goal = table.goal(TOP)
    reached = [_reached(course, goal, table.sign) for course in courses]
    epochs = tuple(epochs for epochs, _ in reached)
    return Report(
        table=TableFacts.of(table),
        sampler=plan.sampler,
        pruner=str(plan.spec.pruner["name"]),
        workers=plan.workers,
        slots=plan.slots,
        seeds=len(courses),
        epochs=median(course.epochs for course in courses),
        reached_after=epochs,
        reach_epochs=Quartiles.of(epochs),
        reach_seconds=Quartiles.of([seconds for _, seconds in reached]),
        missed=sum(map(math.isinf, epochs)) / len(courses),
        regrets={
            share: Quartiles.of([_regret(course, share * (plan.epochs or course.epochs), table) for course in courses])
            for share in BUDGET_SHARES
        },
        trials=fmean(len(course.ends) for course in courses),
        complete=_mean_count(courses, lambda end: end.state == TrialState.COMPLETE),
        pruned=_mean_count(courses, lambda end: end.state == TrialState.PRUNED and not end.is_diverged),
        diverged=_mean_count(courses, lambda end: end.is_diverged),
        unknown=_mean_count(courses, lambda end: end.is_unknown),
        sampler_seconds=median(course.sampler_seconds for course in courses),
        suggestion_seconds=median(course.sampler_seconds / max(len(course.distances), 1) for course in courses),
        pruner_seconds=median(course.pruner_seconds for course in courses),
        mapping=None if plan.keeps_order else _mapping(courses),
        winner=_winner(table, courses) if plan.keeps_order else None,
        retrained=_retrained(table, courses) if table.again_order else None,
    )


def _mean_count(courses: Sequence[Course], counts: Callable[[TrialEnd], bool]) -> float:
    return fmean(sum(map(counts, course.ends)) for course in courses)


def _reached(course: Course, goal: float, sign: float) -> tuple[float, float]:
    """Return the epochs and the seconds after which a replay first saw a value as good as the goal; infinite if never."""
    found = next((moment for moment in course.bests if sign * moment.value >= sign * goal), None)
    return (math.inf, math.inf) if found is None else (found.epochs, found.seconds)


def _regret(course: Course, epochs: float, table: Table) -> float:
    """Return by how much the best value seen within so many epochs misses the table's best; infinite before any value."""
    seen = [moment.value for moment in course.bests if moment.epochs <= epochs]
    return abs(table.best - seen[-1]) if seen else math.inf  # none is better than the table's best


def _mapping(courses: Sequence[Course]) -> Mapping:
    distances = [distance for course in courses for distance in course.distances]
    middle, high = np.quantile(distances, [0.5, 0.9]).tolist()
    return Mapping(median=middle, high=high, strays=sum(course.strays for course in courses) / len(distances))


def _retrained(table: Table, courses: Sequence[Course]) -> Retrained:
    rank_of = {table.rows[place].number: rank for rank, place in enumerate(table.again_order, start=1)}
    ranks = [rank_of[number] for number in map(partial(_best_of, table), courses) if number in rank_of]
    again = [table.rows[table.again_order[rank - 1]].again for rank in ranks]
    values = [-table.sign * math.inf if one is None or one.value is None else one.value for one in again]
    return Retrained(
        rows=len(rank_of),
        replays=len(ranks),
        value=Quartiles.of(values) if ranks else None,
        rank=Quartiles.of(ranks) if ranks else None,
    )


def _best_of(table: Table, course: Course) -> int | None:
    """Return the number of the best complete trial of a replay, None without one."""
    complete = {end.number for end in course.ends if end.state == TrialState.COMPLETE}
    return next((table.rows[place].number for place in table.complete if table.rows[place].number in complete), None)


def _winner(table: Table, courses: Sequence[Course]) -> Winner:
    row = table.rows[table.complete[0]]
    assert row.value is not None
    ends = [end for course in courses for end in course.ends if end.number == row.number]
    pruned = [end for end in ends if end.state == TrialState.PRUNED]
    return Winner(
        number=row.number,
        value=row.value,
        epochs=len(row.curve),
        ended=len(ends),
        pruned_after=tuple(end.epochs for end in pruned),
        diverged=sum(end.is_diverged for end in pruned),
    )
