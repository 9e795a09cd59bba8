"""The leading trials of a study: those that `hpo confirm` trains again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.errors import StudyError
from hpo.spec import metrics, space
from hpo.spec.curve import Direction, ValueRule
from hpo.spec.space import Parameter
from hpo.storage import sql
from hpo.study.query import ranking, recorded, trial_columns
from hpo.study.study import Study
from hpo.text import command

TOP = 5  # leaders, if the caller names no number
MOST_OF_FRONT = 20  # likewise, of a Pareto front
OURS = "hpo:"  # prefix of our user attributes
SPARE = 4  # trials looked at for each leader, beside all that tie with them: some may have the same parameters


@dataclass(frozen=True, kw_only=True)
class Leader:
    """A complete trial to be trained again."""

    number: int
    params: Mapping[str, Any]  # as a study file writes them
    values: tuple[float, ...]  # by objective, as the search saw them
    attributes: Mapping[str, Any]  # that it was queued with; a user's own objective may read them
    loss: float | None = None  # validation loss by the study's rule; breaks ties of another metric


def choose(study: Study, top: int | None) -> list[Leader]:
    """Return the leading trials, the best first. Ties of the value are broken by the validation loss, then by the number.

    With several objectives these are trials on the Pareto front, spread evenly over the order of the first objective.

    Args:
        study: the study.
        top: how many; by default at most 5, or at most 20 of a front.

    Raises StudyError if there are fewer trials with different parameters.
    """
    several = study.goals.are_several
    with study.storage.engine.connect() as connection:
        found = _ranked(connection, study)
        wanted = top or (MOST_OF_FRONT if several else TOP)
        near = found if several else _near(found, wanted)
        leaders = _different(read(connection, study, near))
    if not found:
        raise StudyError(
            f"study {study.name!r} has no complete trial that violates nothing, so there is nothing to confirm; "
            f"`{command('status', study.name)}` shows how far it is"
        )
    if len(leaders) < 2 or (top is not None and len(leaders) < top):
        what = "on its front" if several else "complete"
        raise StudyError(
            f"study {study.name!r} has {len(leaders)} trials with different parameters {what}, and "
            f"{f'--top {top} asks for more' if top else 'a comparison needs 2'}; let `hpo run` finish more, or lower --top"
        )
    if several:
        return _spread(leaders, wanted)
    assert study.spec.direction is not None
    return in_order(leaders, study.spec.direction)[:wanted]


def in_order(leaders: Sequence[Leader], direction: Direction) -> list[Leader]:
    """Return the leaders, the best first. Ties are broken by the validation loss, then by the number."""
    sign = -1 if direction == "maximize" else 1
    return sorted(leaders, key=lambda one: (sign * one.values[0], _or_worst(one.loss), one.number))


def newer(connection: sql.Connection, study: Study, last: int | None, least: Leader) -> int:
    """Return how many leading trials with a number above `last` were better than a leader; 0 with several objectives."""
    if last is None or study.goals.are_several or (trial_columns.last_number(connection, study) or 0) <= last:
        return 0
    sign = 1 if study.spec.direction == "maximize" else -1
    rows = _ranked(connection, study)
    return sum(row.number > last and sign * (trial_columns.value_of(row) - least.values[0]) > 0 for row in rows)


def _ranked(connection: sql.Connection, study: Study) -> list[Any]:
    """Return the rows of all complete trials that violate nothing, the best first; with several objectives those of the front."""
    if not ranking.is_plain(study):
        return ranking.best_trials(connection, study)
    return [row for row in ranking.ranked(connection, study, None) if math.isfinite(trial_columns.value_of(row))]


def _near(found: Sequence[Any], wanted: int) -> list[Any]:
    """Return the rows of the leaders and of all trials that tie with the last of them, with some to spare."""
    if not found:
        return []
    last = trial_columns.value_of(found[min(len(found), SPARE * wanted) - 1])
    return [*found[: SPARE * wanted], *(row for row in found[SPARE * wanted :] if trial_columns.value_of(row) == last)]


def read(connection: sql.Connection, study: Study, rows: Sequence[Any]) -> list[Leader]:
    """Return rows of `ranking.results` as leaders, in their order, without those that lack a parameter of the space."""
    ids = [row.trial_id for row in rows]
    params, judged = recorded.params(connection, study, ids), ranking.judged(connection, study, rows)
    losses = _losses(connection, study, ids)
    return [
        Leader(
            number=row.number,
            params=params[row.trial_id],
            values=judged[row.trial_id].values or (trial_columns.value_of(row),),
            attributes=_own_attributes(connection, study, row.trial_id),
            loss=losses.get(row.trial_id),
        )
        for row in rows
        if _is_whole(study, params[row.trial_id])
    ]


def _own_attributes(connection: sql.Connection, study: Study, trial_id: int) -> dict[str, Any]:
    """Return the user attributes of a trial of a user's own objective that are not ours."""
    if study.spec.is_declared:
        return {}
    found = recorded.user_attributes(connection, trial_id)
    return {key: value for key, value in found.items() if not key.startswith(OURS)}


def _losses(connection: sql.Connection, study: Study, ids: Sequence[int]) -> dict[int, float]:
    """Return {trial id: validation loss by the study's rule} of a declared study."""
    if not study.spec.is_declared:
        return {}
    rule = ValueRule.parse(study.spec.value or "best", "minimize")
    curves = recorded.raw_curve(connection, study, ids, metrics.column("loss"))
    return {trial_id: rule(curve) for trial_id, curve in curves.items() if curve}


def _is_whole(study: Study, params: Mapping[str, Any]) -> bool:
    """Return whether a trial has every parameter of the space. One that Optuna or a fork added may lack some."""
    missing: list[str] = []

    def take(path: str, _: Parameter) -> Any:
        if path not in params:
            missing.append(path)
        return params.get(path)

    try:
        space.pin(study.spec.tree, take)
    except (KeyError, TypeError, ValueError):
        return False
    return not missing


def _different(leaders: Sequence[Leader]) -> list[Leader]:
    """Return the leaders without those whose parameters an earlier one has."""
    found: dict[str, Leader] = {}
    for one in leaders:
        found.setdefault(json.dumps(dict(one.params), sort_keys=True, default=repr), one)
    return list(found.values())


def _spread(leaders: Sequence[Leader], wanted: int) -> list[Leader]:
    """Return so many leaders, spread evenly, with both ends."""
    if len(leaders) <= wanted:
        return list(leaders)
    return [leaders[round(place * (len(leaders) - 1) / (wanted - 1))] for place in range(wanted)]


def _or_worst(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss
