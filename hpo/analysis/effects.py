"""Which parameters of a study decide whether a trial is among the best: importances with ranges and a level of chance.

Pruned trials count too, as trials that are not among the best. Without them a parameter whose bad values were all pruned would
seem to have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpo.analysis import importance
from hpo.analysis.columns import Column, Columns, Floats, Positions

BEST_SHARE = 0.1  # of the trials; the best that are compared with all
BEST_COUNT = 15  # at least so many are the best, if they are not more than a quarter
FEWEST = 20  # trials, below which nothing is said
SAMPLES = 200  # bootstrap samples
RANGE = (10, 90)  # percentiles of the bootstrap samples that a range shows
CHANCE = 95  # percentile of the importance that a parameter has when the trials' values are shuffled


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The importance of one parameter, as a share of the sum over all parameters."""

    name: str
    share: float
    low: float  # the RANGE of bootstrap samples, moved by as much as their median is off `share`
    high: float
    chance: float  # the share that a parameter without effect may have

    @property
    def has_effect(self) -> bool:
        """Whether it is above the level of chance."""
        return self.share > self.chance


@dataclass(frozen=True, kw_only=True)
class Importances:
    """The importances for one objective, the largest first; or why there are none."""

    objective: str
    found: Sequence[Importance] = ()
    trials: int = 0  # that were compared
    best: int = 0  # of them that are among the best
    why_none: str = ""

    @property
    def without_effect(self) -> list[str]:
        """The parameters whose importance is within chance."""
        return [one.name for one in self.found if not one.has_effect]


def of_study(columns: Columns, *, samples: int = SAMPLES, seed: int = 0) -> list[Importances]:
    """Return the importances for each objective."""
    return [_of_objective(columns, place, samples, seed) for place in range(len(columns.goals.names))]


def _of_objective(columns: Columns, objective: int, samples: int, seed: int) -> Importances:
    name = columns.goals.names[objective]
    source = np.random.default_rng(seed)
    losses = columns.losses(objective)
    is_complete = columns.is_complete & np.isfinite(losses)
    at = np.flatnonzero(is_complete | columns.is_pruned)
    complete = int(is_complete[at].sum())
    best = math.ceil(min(max(BEST_SHARE * len(at), min(BEST_COUNT, len(at) / 4)), complete / 2))
    searched = [one for one in columns.parameters if not one.is_fixed]
    if len(at) < FEWEST or not searched:
        few = f"{len(at)} complete and pruned trials are too few; {FEWEST} are needed"
        return Importances(objective=name, why_none=few if searched else "no parameter is searched")
    if best == 0 or len(np.unique(losses[at][is_complete[at]])) == 1:
        return Importances(objective=name, why_none="no complete trial is better than another")
    ranked = np.where(is_complete, losses, np.inf)[at]
    ranked[np.isinf(ranked)] = np.max(ranked, where=np.isfinite(ranked), initial=0.0) + 1.0  # pruned: behind all others
    picked = [_best_of(ranked, best)]
    for _ in range(samples):
        drawn = source.integers(len(at), size=len(at))
        picked.append(drawn[_best_of(ranked[drawn], best)])
    picked += [_best_of(source.permutation(ranked), best) for _ in range(samples)]
    found = np.column_stack([_of_parameter(one, at, picked) for one in searched])
    names = [one.name for one in searched]
    found, drawn, shuffled = found[0], found[1 : samples + 1], found[samples + 1 :]
    return Importances(objective=name, found=_summed_up(names, found, drawn, shuffled), trials=len(at), best=best)


def _summed_up(names: Sequence[str], found: Floats, drawn: Floats, shuffled: Floats) -> list[Importance]:
    whole = found.sum() or 1.0
    share, chance = found / whole, np.percentile(shuffled / whole, CHANCE, axis=0)
    shares = drawn / np.maximum(drawn.sum(axis=1, keepdims=True), 1e-300)
    low, high = (
        np.percentile(shares, RANGE, axis=0) + share - np.median(shares, axis=0)
    )  # resampling adds to divergences
    low, high = np.clip(low, 0.0, share), np.maximum(high, share)
    order = np.argsort(-share, kind="stable")
    return [
        Importance(
            name=names[which],
            share=float(share[which]),
            low=float(low[which]),
            high=float(high[which]),
            chance=float(chance[which]),
        )
        for which in order
    ]


def _best_of(losses: Floats, count: int) -> Positions:
    """Return the positions of the best values; of all that equal the last of them too, as Optuna has it."""
    found: Positions = np.flatnonzero(losses <= np.partition(losses, count - 1)[count - 1])
    return found


def _of_parameter(parameter: Column, at: Positions, picked: Sequence[Positions]) -> Floats:
    """Return the importance of a parameter for each set of best trials. Only trials that have the parameter tell of it.

    Args:
        parameter: the parameter.
        at: the positions of the trials that are compared [N].
        picked: for each set the places in `at` of its trials; a trial may be in a set more than once.
    """
    values = parameter.values[at]
    has = ~np.isnan(values)
    place = np.cumsum(has) - 1  # among the trials that have it
    sets = [place[best[has[best]]] for best in picked]
    shares = np.array([len(told) / len(best) for told, best in zip(sets, picked, strict=True)])
    cells, count = importance.cells(parameter.distribution, values[has])
    told = [one for one in sets if len(one)]
    found = np.zeros(len(sets))
    if told:
        found[shares > 0] = importance.divergences(cells, count, told, is_choice=parameter.choices is not None)
    effects: Floats = found * shares**2 / has.mean()
    return effects
