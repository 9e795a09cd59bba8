"""Health checks of a study: what is wrong with a search or its result, by how much, and what to do.

A check returns nothing unless it is sure. A false alarm costs more trust than a missed one, so each threshold leaves room for
chance, and a check says nothing of too few trials. `CHECKS` lists all of them in the order in which they are shown. Those of
`QUICK` need no more than `hpo status` reads; the others read all trials.

With several objectives only failures and the number of trials are checked: the trials of a Pareto front reach the ends of
ranges, and have no order.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from hpo.analysis import noise
from hpo.analysis.evidence import FEWEST, Evidence, Leader
from hpo.analysis.widening import is_natural, widened
from hpo.spec.failures import Kind
from hpo.spec.space import Range
from hpo.storage.tables import STOPPED
from hpo.study import interval
from hpo.study.format import value_text
from hpo.text import command

if TYPE_CHECKING:
    from hpo.analysis.columns import Columns, Floats, Positions

TIE = "leaders tie"  # the name of a finding that other pages tell in their own words
CHANCE = 0.01  # the largest probability that a count of trials is chance, over all parameters of a check together

# --- failures ---
FAILING = 0.1  # share of failed attempts; a few failures among many trials are usual, and are counted anyway
FEW_FAILURES = 2  # so many say nothing

# --- too few trials ---
PER_DIMENSION = (
    10  # trials for each parameter (Loeppky, Sacks, Welch: Choosing the sample size of a computer experiment, 2009)
)
#: So many random trials have one among the best 5 % of the space with 95 %, however many parameters there are (Bergstra and
#: Bengio, Random search for hyper-parameter optimization, 2012): log(0.05) / log(0.95).
SUFFICIENT = 59

# --- best tenth near an end of a range ---
NEAR = 0.1  # of the range, by its logarithm if it is searched so
MOSTLY = 0.6  # share of the best tenth that is near
#: Of those that are near, the share in the last quarter. An optimum beside the end, within the range, has fewer there: with an
#: optimum at 0.9 of the range TPE had a finding in 0 of 24 simulated studies, with one at 1.3 of it in 23 of 24.
AT_THE_END = 0.25

# --- curves still rising ---
LAST = 0.1  # share of the epochs
PACE = 0.5  # of the mean pace over all epochs; a curve that levels off exponentially within its epochs is below 0.1

# --- rungs mislead the pruner ---
#: Below this rank correlation a pruner that keeps a third loses the best of 50 trials at one rung with more than a fifth
#: probability: of two normal variables with this correlation, the second is at 2.2 * 0.5 with a deviation of 0.87.
LEAST_CORRELATION = 0.5
PAIRS = 10  # trials with both values
ONE_SIDED = 1.645  # deviations of the normal distribution that 95 % lie below

# --- one value of a choice dominates ---
DOMINANT = 0.9  # share of the best tenth

# --- seeds noisier than differences ---
REPEATS = 5  # degrees of freedom of the deviation between trials of equal parameters


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    name: str
    text: str  # what it is, with the number, in sentences
    mend: str  # what to do; a line that begins with two spaces is to be pasted


def examine(evidence: Evidence) -> list[Finding]:
    """Return what is wrong, in the order of `CHECKS`. Dear checks are made if the evidence has columns."""
    checks = QUICK if evidence.columns is None else CHECKS
    return [finding for check in checks if (finding := check(evidence)) is not None]


# --- from the summary -------------------------------------------------------------------------------------------------

MENDS: Mapping[str, str] = {
    Kind.OUT_OF_MEMORY: "Lower the largest batch size or model, or the number of slots of a stack.",
    Kind.CUDA_ERROR: "Try one trial with CUDA_LAUNCH_BLOCKING=1; its traceback names the operation.",
    Kind.DIVERGED: "Lower the upper end of the learning rate, or add a warm-up.",
    Kind.EXCEPTION: "Mend the code; {status} --trial N shows a traceback.",
    Kind.DATA_ERROR: "Check the files that the message names.",
    Kind.TIME_LIMIT: "Raise budget.trial_timeout, or search smaller models.",
    Kind.LOST_WORKER: "See what ended the workers, such as the machine's memory; hpo doctor tells more.",
    "foreign": "The program that made them says why.",
}


def failing(evidence: Evidence) -> Finding | None:
    """A tenth of all attempts failed."""
    found = [one for one in evidence.summary.failures if one.kind != STOPPED]
    failed = sum(one.count for one in found)
    attempts = evidence.summary.finished + sum(one.retried for one in found)
    if failed <= FEW_FAILURES or failed < FAILING * attempts:
        return None
    most = found[0]
    kinds = ", ".join(f"{one.count} × {one.kind}" for one in found)
    last = f" The last: {most.message}." if most.message else ""
    return Finding(
        name="failures",
        text=f"{failed} of {attempts} attempts failed ({failed / attempts:.0%}): {kinds}.{last}",
        mend=MENDS.get(most.kind, MENDS[Kind.EXCEPTION]).format(status=command("status", evidence.name)),
    )


def too_few_trials(evidence: Evidence) -> Finding | None:
    """Fewer trials than a search of so many parameters needs."""
    summary = evidence.summary
    if summary.is_grid or not evidence.dimensions:
        return None
    trials = evidence.finished if summary.is_over else max(summary.budget, evidence.finished)
    needed = min(math.ceil(PER_DIMENSION * evidence.dimensions), SUFFICIENT)
    if trials >= needed:
        return None
    few = "1 trial is few" if trials == 1 else f"{trials} trials are few"
    many = f"{evidence.dimensions:.3g} parameter{'s' if evidence.dimensions != 1 else ''}"
    return Finding(
        name="too few trials",
        text=f"{few} for {many}: about {needed} are needed.",
        mend=f"Run it again with --trials {needed}, or search fewer parameters.",
    )


# --- from the values of the best --------------------------------------------------------------------------------------


def tied(evidence: Evidence) -> Finding | None:
    """Trials of other parameters are as good as the best, or differ from it by less than the noise."""
    found = _close(evidence)
    if not found or evidence.is_confirmed:
        return None
    best, others = evidence.leaders[0], len(found) - 1
    many = "or more " if len(found) == len(evidence.leaders) > 50 else ""
    less = f" or differ from it by at most {evidence.noise.source}," if evidence.noise else ""
    are = "trial has" if others == 1 else "trials have"
    confirm = command("confirm", evidence.name)
    again = (
        f"{confirm} trains the leaders again with other seeds and says which is best." if evidence.can_confirm else ""
    )
    return Finding(
        name=TIE,
        text=f"{others} {many}other {are} the best value, {value_text(best.value)},{less} so which one leads is chance.",
        mend=again or "Train the leaders again with other seeds.",
    )


def _close(evidence: Evidence) -> list[Leader]:
    """Return the best trial and those that the noise hides from it; none if no other one has other parameters."""
    if not evidence.leaders:
        return []
    reach = evidence.noise.size * (1 + noise.ROUNDING) if evidence.noise else 0.0
    best = evidence.leaders[0]
    found = [one for one in evidence.leaders if abs(one.value - best.value) <= reach]
    others = [one for one in found if not best.params or one.params != best.params]
    return [best, *(one for one in others if one is not best)] if len(others) > (not best.params) else []


def small_test_part(evidence: Evidence) -> Finding | None:
    """The test part cannot tell the best from the last of the best tenth, which differ by more than the noise.

    Both are tested on the same examples, so their errors have much in common. Therefore the difference is held against half of
    one value's interval, not against that of a difference of two.
    """
    images, metric = evidence.test_images, evidence.summary.metric
    if not images or metric is None or not evidence.best or _close(evidence):
        return None
    found = interval.of_metric(metric, evidence.best[0].value, images)
    if found is None or evidence.spread >= (reach := (found.high - found.low) / 2):
        return None
    return Finding(
        name="small test part",
        text=f"the best {len(evidence.best)} trials differ by {value_text(evidence.spread)} at most; "
        f"{images:,} test examples tell a value to ± {value_text(reach)} only.",
        mend="Do not choose among them by the test. More test examples make it finer.",
    )


# --- from the parameters of the best ----------------------------------------------------------------------------------


def near_bound(evidence: Evidence) -> Finding | None:
    """Most of the best tenth lie at one end of a range."""
    ranges = {name: found for name, found in evidence.space.items() if isinstance(found, Range)}
    told, mends = [], []
    for name, parameter in ranges.items():
        values = [one.params[name] for one in evidence.best if name in one.params]
        for is_high in (False, True):
            near = _near(parameter, values, is_high=is_high, tries=2 * len(ranges))
            if near:
                end = parameter.high if is_high else parameter.low
                side = "upper" if is_high else "lower"
                told.append(f"{name} at its {side} end {end:.4g} in {near} of the best {len(values)} trials")
                mends += _mend_of_bound(name, parameter, is_high=is_high, is_declared=name in evidence.declared)
    if not told:
        return None
    return Finding(name="near a bound", text=f"{'; '.join(told)}.", mend="\n".join(mends))


def _near(parameter: Range, values: Sequence[float], *, is_high: bool, tries: int) -> int:
    """Return how many of the values are near an end, 0 unless that says something."""
    places = [_place(parameter, value) for value in values]
    distances = [1 - place if is_high else place for place in places if not math.isnan(place)]
    if len(distances) < FEWEST:
        return 0
    chance = max(NEAR, _share_of_one(parameter, is_high=is_high))
    near = [distance for distance in distances if distance <= NEAR]
    at_the_end = sum(distance <= NEAR / 4 for distance in near)
    is_sure = tries * _tail(len(near), len(distances), chance) < CHANCE
    return len(near) if is_sure and len(near) >= MOSTLY * len(distances) and at_the_end >= AT_THE_END * len(near) else 0


def _place(parameter: Range, value: float) -> float:
    """Return where a value lies in its range, from 0 to 1."""
    low, high = float(parameter.low), float(parameter.high)
    if low == high:
        return math.nan
    if parameter.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _share_of_one(parameter: Range, *, is_high: bool) -> float:
    """Return the share of a range that its last value takes, 0 for a range without steps."""
    step = parameter.step or (1 if parameter.integer else 0)
    if not step:
        return 0.0
    if not parameter.log:
        return 1 / (round((parameter.high - parameter.low) / step) + 1)
    low, high = math.log(parameter.low - 0.5), math.log(parameter.high + 0.5)
    return (high - math.log(parameter.high - 0.5) if is_high else math.log(parameter.low + 0.5) - low) / (high - low)


def _mend_of_bound(name: str, parameter: Range, *, is_high: bool, is_declared: bool) -> list[str]:
    section, _, key = name.rpartition(".")
    if is_natural(parameter, is_high=is_high):
        end = parameter.high if is_high else parameter.low
        return [f"{end:.4g} may be the natural end of {name}. Is {name} = {end:.4g} as a constant as good?"]
    wider = widened(parameter, is_high=is_high)
    if not is_declared:
        return [f"Search a wider range of {name} in your code, such as {wider.low:.4g} to {wider.high:.4g}."]
    head = [f"  [{section}]"] if section else []
    return ["Search a wider range; hpo fork takes the trials along:", *head, f"  {key} = {wider}"]


def still_rising(evidence: Evidence) -> Finding | None:
    """The curves of the best trials improve in their last tenth as they did before."""
    curves = [[evidence.sign * value for value in one.curve] for one in evidence.best]
    gains = [found for curve in curves if (found := _gain(curve)) is not None]
    if len(gains) < FEWEST:
        return None
    least = evidence.noise.size if evidence.noise else 0.0
    rising = [last for last, pace in gains if pace > PACE and last > least]
    if len(rising) < max(FEWEST, MOSTLY * len(gains)):
        return None
    return Finding(
        name="curves still rising",
        text=f"{len(rising)} of the best {len(gains)} trials still improve at their end: by "
        f"{value_text(median(rising))} in the last tenth of their epochs.",
        mend="Train for more epochs.",
    )


def _gain(curve: Sequence[float]) -> tuple[float, float] | None:
    """Return by how much a curve improves in its last tenth, and the pace of that beside the mean pace; None for a short curve.

    A curve's best value so far counts. Its jitter, from epoch to epoch, must be smaller than the improvement.
    """
    if len(curve) < 3 or not all(map(math.isfinite, curve)):
        return None
    last = max(1, round(LAST * len(curve)))
    total, gain = max(curve) - curve[0], max(curve) - max(curve[:-last])
    steps = [after - before for before, after in itertools.pairwise(curve)]
    tail = steps[-max(5, 2 * last) :]
    jitter = median(abs(step - median(tail)) for step in tail)
    pace = (gain / last) / (total / (len(curve) - 1)) if total > 0 else 0.0
    return gain, pace if gain > jitter else 0.0


# --- from all trials --------------------------------------------------------------------------------------------------


def noisy_seeds(evidence: Evidence) -> Finding | None:
    """Trials of equal parameters differ by more than the best tenth does."""
    columns = evidence.columns
    if columns is None or not evidence.best or _close(evidence):
        return None
    groups: defaultdict[Any, list[float]] = defaultdict(list)
    for at in _feasible(columns).tolist():
        row = columns.rows[at]
        groups[(*row.space, *row.params)].append(float(columns.finished.values[at]))
    repeated = [values for values in groups.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in repeated)
    if freedom < REPEATS:
        return None
    means = [sum(values) / len(values) for values in repeated]
    squares = sum((value - mean) ** 2 for values, mean in zip(repeated, means, strict=True) for value in values)
    deviation = math.sqrt(squares / freedom)
    if deviation <= evidence.spread:
        return None
    return Finding(
        name="seeds noisier than differences",
        text=f"trials of equal parameters differ by {value_text(deviation)} (standard deviation of "
        f"{freedom + len(repeated)} trials); the best {len(evidence.best)} differ by {value_text(evidence.spread)}.",
        mend="Compare means over several seeds, not single trials.",
    )


def misleading_rungs(evidence: Evidence) -> Finding | None:
    """Where the pruner compares trials, their order says too little of their order at the end."""
    columns, ladder = evidence.columns, evidence.ladder
    if columns is None or ladder is None or evidence.summary.objectives:
        return None
    import numpy as np

    from hpo.strategy.rungs import Curves

    curves = Curves.of(columns.finished, (), ladder)
    longest = int(curves.last_steps.max(initial=0))
    found: dict[int, tuple[float, int]] = {}
    for rung in ladder.up_to(longest - 1):
        step = int(ladder.steps(rung, np.array([math.nan]))[0])
        reached, values = curves.at_rung(rung)
        reached &= (curves.last_steps >= step) & np.isfinite(values)  # those that stopped before have no value there
        ended = reached & curves.is_complete & np.isfinite(curves.finals) & (curves.last_steps > step)
        if ended.sum() >= PAIRS:
            found[step] = correlation(values, curves.finals, reached, ended), int(ended.sum())
    low = {step: one for step, one in found.items() if _upper(*one) < LEAST_CORRELATION}
    if not low:
        return None
    step, (rho, pairs) = next(iter(low.items()))
    later = next((other for other, one in found.items() if other > step and one[0] >= LEAST_CORRELATION), None)
    first = f"no earlier than step {later}" if later else "later, or not at all"
    return Finding(
        name="rungs mislead the pruner",
        text=f"the order of trials at step {step} says little of their order at the end: rank correlation {rho:.2f}, "
        f"from {pairs} trials.",
        mend=f"Prune {first}: raise n_warmup_steps or min_resource of [pruner].",
    )


def correlation(then: Floats, finals: Floats, reached: Any, ended: Any) -> float:
    """Return the correlation of ranks between values at a rung and at the end, from the trials that have both.

    A pruner lets the better ones end, and among these a correlation is lower than among all. The ranks at the rung are known of
    all that reached it, so that is corrected as for any selection by a known variable (Thorndike's case 2; Sackett and Yang,
    2000). The correction is for normal variables, so ranks are taken as normal scores. No value is made up.
    """
    import numpy as np

    early = np.full(len(then), math.nan)
    early[reached] = _scores(then[reached])
    seen_early, seen_late = early[ended], _scores(finals[ended])
    if seen_early.std() == 0 or seen_late.std() == 0:
        return math.nan
    seen = float(np.corrcoef(seen_early, seen_late)[0, 1])
    wider = float(early[reached].std() / seen_early.std())
    return seen * wider / math.sqrt(1 + seen**2 * (wider**2 - 1))


def _scores(values: Floats) -> Floats:
    """Return the rank of each value as a normal score; equal values share their mean rank."""
    import numpy as np
    from scipy.special import ndtri

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2)[place]  # from 0.5 to N - 0.5
    scores: Floats = ndtri(ranks / len(values))
    return scores


def _upper(rho: float, pairs: int) -> float:
    """Return the upper end of a one-sided 95 % interval by Fisher's transformation, infinite for NaN."""
    if math.isnan(rho):
        return math.inf
    return math.tanh(math.atanh(max(min(rho, 1 - 1e-9), -1 + 1e-9)) + ONE_SIDED / math.sqrt(pairs - 3))


def dominant_choice(evidence: Evidence) -> Finding | None:
    """One value of a choice has nearly all of the best tenth, and more of it than its share of all trials explains."""
    if evidence.columns is None or not evidence.best:
        return None
    choices = [one for one in evidence.columns.parameters if one.choices is not None and not one.is_fixed]
    values = sum(len(one.choices or ()) for one in choices)
    best = _positions(evidence.columns, evidence.best)
    told, mends = [], []
    for parameter in choices:
        of_best = [place for place in parameter.values[best].tolist() if not math.isnan(place)]
        of_all = [place for place in parameter.values[_compared(evidence.columns)].tolist() if not math.isnan(place)]
        if len(of_best) < FEWEST:
            continue
        [(place, count)] = Counter(of_best).most_common(1)
        taken = Counter(of_all)[place]
        surprise = values * _drawn(count, len(of_all), taken, len(of_best))
        if count >= DOMINANT * len(of_best) and surprise < CHANCE:
            assert parameter.choices is not None
            value = parameter.choices[int(place)]
            told.append(
                f"{parameter.name} is {value} in {count} of the best {len(of_best)} trials, and in {taken} of all {len(of_all)}"
            )
            mends.append(f"{parameter.name} = {value}")
    if not told:
        return None
    return Finding(
        name="one choice dominates",
        text=f"{'; '.join(told)}.",
        mend=f"Further trials are better spent with {' and '.join(mends)} as a constant.",
    )


def idle_parameter(evidence: Evidence) -> Finding | None:
    """A parameter of which no effect is visible, while one of another is."""
    columns = evidence.columns
    if columns is None or not evidence.best:
        return None
    from hpo.analysis import idle

    if columns.is_feasible.sum() < idle.FEWEST:  # the order of pruned trials is too coarse
        return None
    at = _without_repeats(columns, _ordered(columns))
    names = idle.parameters([one for one in columns.parameters if not one.is_fixed], at)
    if not names:
        return None
    have, constants = ("have", "constants") if len(names) > 1 else ("has", "a constant")
    return Finding(
        name="parameter without effect",
        text=f"{', '.join(names)} {have} no visible effect in {len(at)} trials: shuffled values say as much.",
        mend=f"Write {constants} instead: fewer parameters need fewer trials.",
    )


# --- trials among columns, and chance ---------------------------------------------------------------------------------


def _feasible(columns: Columns) -> Positions:
    import numpy as np

    return np.flatnonzero(columns.is_feasible)


def _compared(columns: Columns) -> Positions:
    """Return the trials that ended without a failure."""
    import numpy as np

    return np.flatnonzero(columns.is_complete | columns.is_pruned)


def _ordered(columns: Columns) -> Positions:
    """Return the trials that ended without a failure, best first: feasible ones by value, then the others.

    Pruned ones are ordered by their length, then by their last value.
    """
    import numpy as np

    from hpo.analysis.columns import RATES

    at = _compared(columns)
    is_good = columns.is_feasible[at]
    sign = RATES[columns.goals.directions[columns.goals.first]]
    losses = np.where(is_good, columns.losses()[at], sign * columns.finished.last_values[at])
    return at[np.lexsort((columns.numbers[at], losses, np.where(is_good, 0, -columns.epochs[at]), ~is_good))]


def _without_repeats(columns: Columns, at: Positions) -> Positions:
    """Return the trials without those that repeat the parameters of an earlier one, in the same order."""
    import numpy as np

    first: dict[Any, int] = {}
    for place in sorted(at.tolist(), key=lambda place: int(columns.numbers[place])):
        row = columns.rows[place]
        first.setdefault((*row.space, *row.params), place)
    return at[np.isin(at, list(first.values()))]


def _positions(columns: Columns, leaders: Sequence[Leader]) -> Positions:
    import numpy as np

    return np.flatnonzero(np.isin(columns.numbers, [one.number for one in leaders]))


def _tail(count: int, trials: int, chance: float) -> float:
    """Return the probability of at least `count` successes in so many trials."""
    return sum(math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(count, trials + 1))


def _drawn(count: int, whole: int, taken: int, sample: int) -> float:
    """Return the probability that of `sample` out of `whole` at least `count` are among `taken` ones."""
    ways = (
        math.comb(taken, k) * math.comb(whole - taken, sample - k)
        for k in range(count, min(taken, sample) + 1)
        if sample - k <= whole - taken
    )
    return sum(ways) / math.comb(whole, sample)


Check = Callable[[Evidence], Finding | None]
#: The checks that need no more than `hpo status` reads.
QUICK: tuple[Check, ...] = (failing, tied, small_test_part, near_bound, still_rising, too_few_trials)
#: All checks, in the order in which their findings are shown.
CHECKS: tuple[Check, ...] = (
    *QUICK,
    noisy_seeds,
    misleading_rungs,
    dominant_choice,
    idle_parameter,
)
