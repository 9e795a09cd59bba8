"""Parameters without a visible effect: two views that must agree, since a false alarm would make a good parameter a constant.

The first is the importance of PED-ANOVA: a parameter's values in the best trials are distributed as those in sets of trials
drawn at random. The second is an additive model of the trials' ranks, a parabola for each number and a level for each choice:
without this parameter it explains as much as with shuffled values of it. The first finds effects of any form. The second finds a
weak effect beside a strong one: in 300 simulated studies it left no false alarm of the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hpo.analysis.columns import Column, Floats, Positions
from hpo.analysis.importance import cells, divergences

BEST = (0.1, 0.25, 0.5)  # shares of the trials that are taken for the best ones
SHUFFLED = 100  # sets of trials drawn at random, or shuffled columns, against which a parameter is held
UNNOTICED = (
    0.6  # place among these, below which nothing is seen of an effect; 0.5 is expected of a parameter without one
)
NOTICED = 0.99  # place of another parameter, without which the trials are too few to say anything
FEWEST = 50  # trials that have the parameter
PER_PARAMETER = 10  # trials for each searched parameter
MOST = 2000  # trials that are compared; the others are left out at random


def parameters(searched: Sequence[Column], at: Positions) -> list[str]:
    """Return the parameters of which no effect is visible; none if no other one has a visible effect.

    Args:
        searched: the parameters.
        at: the trials, the best first.
    """
    if len(at) > MOST:
        at = at[np.sort(np.random.default_rng(0).choice(len(at), MOST, replace=False))]
    if len(at) < PER_PARAMETER * len(searched):
        return []
    known = {one.name: one for one in searched if (~np.isnan(one.values[at])).sum() >= FEWEST}
    of_best = {name: _by_importance(one, at) for name, one in known.items()}
    of_model = _by_model({name: _terms(one, at) for name, one in known.items()}, np.arange(len(at), dtype=float))
    if not any(max(places) >= NOTICED for places in of_best.values()):
        return []
    return [
        name
        for name, one in known.items()
        if max(sum(of_best[name]) / len(BEST), of_model[name]) < UNNOTICED and not _has_branches(one, searched, at)
    ]


def _has_branches(choice: Column, searched: Sequence[Column], at: Positions) -> bool:
    """Return whether a parameter exists only under some values of this choice. Of such a choice no constant is proposed."""
    if choice.choices is None:
        return False
    taken = choice.values[at]
    for other in searched:
        has = ~np.isnan(other.values[at])
        if not has.all() and not set(taken[has].tolist()) & set(taken[~has].tolist()):
            return True
    return False


def _by_importance(parameter: Column, at: Positions) -> list[float]:
    """Return for each share of best trials the place of the parameter's importance among those of random sets, 0 to 1."""
    values = parameter.values[at]
    values = values[~np.isnan(values)]  # trials of another branch say nothing of it
    source = np.random.default_rng(0)
    taken, count = cells(parameter.distribution, values)
    places = []
    for share in BEST:
        best = np.arange(len(values)) < math.ceil(share * len(values))
        sets = [best, *(source.permutation(best) for _ in range(SHUFFLED))]
        found = divergences(taken, count, sets, is_choice=parameter.choices is not None)
        places.append(float(np.mean(found[1:] < found[0]) + np.mean(found[1:] == found[0]) / 2))
    return places


def _by_model(terms: Mapping[str, Floats], ranks: Floats) -> dict[str, float]:
    """Return the place of what each parameter adds to the model of all others among what shuffled values add, 0 to 1.

    Args:
        terms: the columns of each parameter in the model [N, T].
        ranks: what the model explains [N].
    """
    source = np.random.default_rng(0)
    places = {}
    for name, own in terms.items():
        others = [column for other, column in terms.items() if other != name]
        base, _ = np.linalg.qr(np.column_stack([np.ones(len(ranks)), *others]))
        left = ranks - base @ (base.T @ ranks)
        added = _explained(own, base, left)
        shuffled = [_explained(source.permutation(own), base, left) for _ in range(SHUFFLED)]
        places[name] = float(np.mean(np.array(shuffled) < added))
    return places


def _explained(own: Floats, base: Floats, left: Floats) -> float:
    """Return how much of what the base leaves these columns explain, as a sum of squares."""
    directions, _ = np.linalg.qr(own - base @ (base.T @ own))
    return float(((directions.T @ left) ** 2).sum())


def _terms(parameter: Column, at: Positions) -> Floats:
    """Return a parameter's columns of the model: a parabola, or a level for each choice but the first. 0 without a value.

    Which branch a trial took is told by the choice that the branch belongs to.
    """
    values = parameter.values[at]
    if parameter.choices is not None:
        columns = [values == place for place in range(1, len(parameter.choices))]
    else:
        place = np.where(np.isnan(values), 0.0, parameter.places[at] - 0.5)
        columns = [place, place**2]
    return np.column_stack(columns).astype(float)
