"""Which of several configurations is best, by repeated runs of each: pure functions of the runs' values.

The runs are paired: run r of every configuration has the same seed and the same fold. A configuration A is chosen by its mean.
Each other one gets a paired one-sided t-test against "this one is better than A by at least delta". The levels share the
allowed error among the configurations that A may be (Bonferroni) and among the looks at the data.

Why this keeps the promise: "A is best" is wrong only if some B is as good as A, and then the test of the pair (A, B) has erred.
Each A errs with probability level / k, so all k together err with the level of the look. The test of "within delta" of a pair
passes whenever that of "best" does, and the levels of the looks add up to less than the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

from hpo.errors import SpecError
from hpo.spec.curve import Direction

ERROR = 0.10  # of a verdict, over all looks together
SPENT = 0.75  # share of the error left that each look may spend; what a later look gets is less, and it has more runs
SURE = 0.95  # of an interval of a mean
ROUNDING = 1e-9  # of a value; shares of equal counts may differ in their last bits
EXACT = 5  # repeats that are all equal and show that nothing is random
MOST_RUNS = 10_000  # of one configuration, in an estimate of how many would decide
Kind = Literal["best", "within", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of a configuration's runs, with its 95 % interval by Student's t."""

    value: float
    low: float
    high: float
    deviation: float  # of single runs
    runs: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the runs say of the configuration with the best mean."""

    kind: Kind
    leader: int  # the configuration with the best mean
    delta: float
    error: float  # the largest probability that the statement is wrong, over all looks
    look: int  # 1 for the first
    bound: float  # no other configuration is better than the leader by more than this
    deviation: float  # from run to run, pooled over all configurations
    more: int | None  # further runs of each configuration that would about decide; None if it is decided

    @property
    def is_decided(self) -> bool:
        return self.kind != "undecided"


def judge(
    runs: Mapping[int, Sequence[float]],
    *,
    delta: float,
    direction: Direction,
    look: int = 1,
    error: float = ERROR,
) -> Verdict:
    """Return the verdict on configurations from their runs, of which run r is paired with run r of every other one.

    Two runs may give the same difference by chance if values move in steps, as shares of examples do. So no difference counts as
    steadier than rounding to these steps allows.

    Args:
        runs: the values of each configuration's runs, at least 2 of at least 2 configurations.
        delta: the difference that does not matter.
        direction: whether higher or lower values are better.
        look: how often the runs were looked at, this time included.
        error: the largest probability of a wrong statement, over all looks together.

    Raises SpecError for a delta that is not above 0, and for too few runs or configurations.
    """
    _refuse(runs, delta)
    sign = 1 if direction == "maximize" else -1
    better = {one: [sign * value for value in values] for one, values in runs.items()}
    leader = max(better, key=lambda one: (fmean(better[one]), -one))  # the lower number among equals
    least = _least_deviation(better.values())
    pairs = [_Pair.of(better[leader], values, least) for one, values in better.items() if one != leader]
    level = level_of(look, error) / len(better)
    kind: Kind = "undecided"
    if all(pair.bound(level) < 0 for pair in pairs):
        kind = "best"
    elif all(pair.bound(level) < delta for pair in pairs):
        kind = "within"
    return Verdict(
        kind=kind,
        leader=leader,
        delta=delta,
        error=error,
        look=look,
        bound=max(0.0, *(pair.bound(level) for pair in pairs)),
        deviation=pooled_deviation(runs.values()),
        more=None if kind != "undecided" else _more(pairs, delta, level_of(look + 1, error) / len(better)),
    )


@dataclass(frozen=True, kw_only=True)
class Dominance:
    """A configuration whose means are all at least as good as another one's, and one of them better."""

    by: int
    is_sure: bool  # by paired tests of every objective, with the error of a verdict


def dominances(
    runs: Mapping[int, Sequence[Sequence[float]]], directions: Sequence[str], *, look: int = 1, error: float = ERROR
) -> dict[int, Dominance]:
    """Return which configurations another one dominates after their runs, and by which.

    An objective whose runs are all equal for each configuration, such as a size, is compared exactly. Dominance is sure if every
    other objective passes its test, at a level that is shared among all ordered pairs; that all must pass costs nothing
    (intersection-union test).

    Args:
        runs: for each configuration its runs, each with a value for each objective.
        directions: whether each objective is maximized or minimized.
        look: how often the runs were looked at, this time included.
        error: the largest probability of a wrong statement that is sure.
    """
    signs = [1 if direction == "maximize" else -1 for direction in directions]
    better = {
        one: [[sign * v for sign, v in zip(signs, run, strict=True)] for run in several]
        for one, several in runs.items()
    }
    least = [
        _least_deviation([*zip(*several, strict=True)][place] for several in better.values())
        for place in range(len(signs))
    ]
    level = level_of(look, error) / (len(runs) * (len(runs) - 1))
    found: dict[int, Dominance] = {}
    for one, ours in better.items():
        for other, theirs in better.items():
            values = zip(zip(*ours, strict=True), zip(*theirs, strict=True), least, strict=True)
            pairs = [_Pair.of(a, b, lowest) for a, b, lowest in values]
            leads = [pair.lead for pair in pairs]
            if other == one or min(leads) < 0 or max(leads) <= 0:
                continue
            noisy = [pair for pair in pairs if pair.deviation]
            is_sure = all(pair.lead - (pair.bound(level) - pair.lead) > 0 for pair in noisy)
            if one not in found or (is_sure and not found[one].is_sure):
                found[one] = Dominance(by=other, is_sure=is_sure)
    return found


def level_of(look: int, error: float = ERROR) -> float:
    """Return the probability of error that one look may spend. The levels of all looks add up to less than `error`."""
    return error * SPENT * (1 - SPENT) ** (look - 1)


def mean(values: Sequence[float], bounds: tuple[float, float] = (-math.inf, math.inf)) -> Mean:
    """Return the mean of values with its interval. A single value has the widest one.

    The interval is cut at the bounds. It holds the true mean as often as before, since that lies within them (Mandelkern 2002,
    "Setting confidence intervals for bounded parameters").

    Args:
        values: the runs' values.
        bounds: the lowest and the highest possible value.
    """
    runs, middle = len(values), fmean(values)
    spread, reach = math.nan, math.inf
    if runs > 1:
        spread = _deviation(values)
        reach = _quantile((1 - SURE) / 2, runs - 1) * spread / math.sqrt(runs)
    low, high = max(bounds[0], middle - reach), min(bounds[1], middle + reach)
    return Mean(value=middle, low=low, high=high, deviation=spread, runs=runs)


def pooled_deviation(repeats: Iterable[Sequence[float]]) -> float:
    """Return the standard deviation of single runs, pooled over configurations; nan if none was repeated."""
    several = [values for values in repeats if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum(_deviation(values) ** 2 * (len(values) - 1) for values in several)
    return math.sqrt(squares / freedom) if freedom else math.nan


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """How much better another configuration is than the leader: mean and deviation of the paired differences."""

    lead: float
    deviation: float
    runs: int

    @classmethod
    def of(cls, leader: Sequence[float], other: Sequence[float], least: float) -> _Pair:
        differences = [theirs - ours for ours, theirs in zip(leader, other, strict=True)]
        return cls(lead=fmean(differences), deviation=max(least, _deviation(differences)), runs=len(differences))

    def bound(self, level: float, runs: int | None = None) -> float:
        """Return what the other's advantage exceeds with this probability at most; for more runs as these runs suggest."""
        count = runs or self.runs
        return self.lead + _quantile(level, count - 1) * self.deviation / math.sqrt(count)


def _quantile(level: float, freedom: int) -> float:
    """Return the value that Student's t exceeds with this probability."""
    from scipy import special  # here: a command that shows no verdict does not load it

    return -float(special.stdtrit(freedom, level))


def _deviation(values: Sequence[float]) -> float:
    return 0.0 if min(values) == max(values) else stdev(values)  # without a rounding error


def _least_deviation(runs: Iterable[Sequence[float]]) -> float:
    """Return the deviation that rounding alone gives to a difference of two values; 0 for exact values.

    The step of the rounding is at most the smallest difference between two values. Values are exact if all runs of each
    configuration are equal, unless there are so few repeats that this may be chance.
    """
    several = [*runs]
    repeats = sum(len(values) - 1 for values in several)
    if repeats >= EXACT and all(min(values) == max(values) for values in several):
        return 0.0
    found = sorted(value for values in several for value in values)
    least = ROUNDING * max(abs(found[0]), abs(found[-1]))
    return min((b - a for a, b in pairwise(found) if b - a > least), default=0.0) / math.sqrt(6)


def _more(pairs: Sequence[_Pair], delta: float, level: float) -> int:
    """Return how many further runs of each configuration bring every bound below delta, if means and deviations stay."""
    now, low, high = pairs[0].runs, pairs[0].runs, MOST_RUNS

    def decides(runs: int) -> bool:
        return all(pair.bound(level, runs) < delta for pair in pairs)

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle + 1, high)
    return max(1, low - now)


def _refuse(runs: Mapping[int, Sequence[float]], delta: float) -> None:
    if not (math.isfinite(delta) and delta > 0):
        raise SpecError(f"delta = {delta}: must be a finite number above 0, the difference that does not matter to you")
    if len(runs) < 2:
        raise SpecError(f"{len(runs)} configuration: there is nothing to compare it with; give at least 2")
    counts = {len(values) for values in runs.values()}
    if len(counts) > 1 or min(counts) < 2:
        raise SpecError(f"runs of the configurations: {sorted(counts)}; each must have the same number, at least 2")
