"""Lets a sampler propose the parameters of a trial, in the order in which a study asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from hpo.lab.pool import Proposal, unit
from hpo.lab.table import Row, Table
from hpo.spec import space


class Asking:
    """The parameters that a study's trials ask for.

    A declared space is walked as in a worker. The space of a user's own objective is known from its trials only. As long as
    they all ask for the same parameter next, it is asked for. Where they differ, the trials decide that are nearest so far.
    """

    def __init__(self, table: Table) -> None:
        self._tree = table.spec.tree
        self._rows = [table.rows[place] for place in table.whole]

    def ask(self, trial: optuna.Trial, frozen: FrozenTrial) -> Proposal:
        """Let the study's sampler suggest the parameters of a trial. Return them.

        Args:
            trial: the trial.
            frozen: the trial as Optuna knows it, to which each suggestion is added.
        """
        if self._tree:
            space.suggest(self._tree, trial)
        else:
            self._ask_as_recorded(trial, frozen)
        return _proposal(frozen)

    def _ask_as_recorded(self, trial: optuna.Trial, frozen: FrozenTrial) -> None:
        rows: Sequence[Row] = self._rows
        while True:
            asked = len(frozen.params)
            following = [_name_at(row, asked) for row in rows]
            if len(set(following)) > 1:
                proposal = _proposal(frozen)
                distances = [_distance(row, proposal) for row in rows]
                name = following[distances.index(min(distances))]
            else:
                name = following[0]
            if name is None:
                return
            rows = [row for row, other in zip(rows, following, strict=True) if other == name]
            _suggest(trial, name, rows[0])


def _name_at(row: Row, place: int) -> str | None:
    names = list(row.space)
    return names[place] if place < len(names) else None


def _distance(row: Row, proposal: Proposal) -> float:
    """Return a row's squared distance in the parameters asked for so far. Another choice counts as much as all numbers."""
    total = 0.0
    for (name, distribution), internal in zip(row.space.items(), row.params, strict=True):
        if name in proposal:
            difference = float(unit(distribution, internal) - unit(distribution, proposal[name][1]))
            is_choice = isinstance(distribution, CategoricalDistribution)
            total += float(difference != 0) * (1 + len(row.space)) if is_choice else difference**2
    return total


def _suggest(trial: optuna.Trial, name: str, row: Row) -> None:
    distribution = row.space[name]
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _proposal(frozen: FrozenTrial) -> Proposal:
    return {
        name: (distribution, distribution.to_internal_repr(frozen.params[name]))
        for name, distribution in frozen.distributions.items()
    }
