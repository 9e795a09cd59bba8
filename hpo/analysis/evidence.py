"""What the health checks look at: the summary of a study and its best trials, and for some checks all trials as columns.

Reading the first takes as long as `hpo status` may take. It loads neither Optuna nor numpy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpo.analysis import noise
from hpo.analysis.noise import Noise
from hpo.spec.space import Choices, Parameter, Range, parameters
from hpo.storage import study_rows
from hpo.study import interval, status
from hpo.study.interval import TEST_IMAGES_KEY
from hpo.study.plain import PlainStudy
from hpo.study.plain import summarize as summarize_plain
from hpo.study.query import ranking, recorded
from hpo.study.status import LEADING, Summary
from hpo.study.study import Study

if TYPE_CHECKING:
    from hpo.analysis.columns import Columns
    from hpo.strategy.rungs import Ladder

TENTH = 0.1  # the share of the finished trials that are the best ones
FEWEST = 5  # trials of which something is said; Optuna asks as many of PED-ANOVA
CURVES = 10  # of the best trials, whose curves are read
SISTER = "/confirm"  # ends the name of a confirmation: confirmation.SUFFIX, whose module is loaded only if there is one


@dataclass(frozen=True, kw_only=True)
class Leader:
    """One of the best trials: COMPLETE, and no constraint is violated."""

    number: int
    value: float
    params: Mapping[str, Any] = field(default_factory=dict)
    curve: Sequence[float] = ()  # what pruners see, by step


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One study at one moment, as the checks see it."""

    summary: Summary
    leaders: Sequence[Leader] = ()  # the best first; none with several objectives
    best: Sequence[Leader] = ()  # the best tenth in full; empty if that is fewer than FEWEST
    space: Mapping[str, Parameter] = field(default_factory=dict)  # of the best ones; without a range that changed
    declared: frozenset[str] = frozenset()  # parameters that the study file declares; others are asked for in code
    images: int | None = None  # examples of the validation part, of which an accuracy is the share
    test_images: int | None = None
    noise: Noise | None = None  # the largest difference of two values that says nothing
    is_confirmed: bool = False  # `hpo confirm` has decided between the leaders
    can_confirm: bool = False
    columns: Columns | None = None  # of all trials, for the dear checks
    ladder: Ladder | None = None  # the steps at which the pruner compares trials, likewise

    @property
    def name(self) -> str:
        return self.summary.name

    @property
    def sign(self) -> float:
        """The factor, 1 or -1, after which higher values are better."""
        return 1.0 if self.summary.direction == "maximize" else -1.0

    @property
    def finished(self) -> int:
        """The number of trials that ended without a failure."""
        return self.summary.counts["complete"] + self.summary.counts["pruned"]

    @property
    def spread(self) -> float:
        """The difference between the best and the last of the best tenth."""
        return abs(self.best[0].value - self.best[-1].value) if self.best else math.nan

    @cached_property
    def dimensions(self) -> float:
        """The number of searched parameters that a trial has, as the mean of those of the best trials that were read."""
        fixed = {name for name, parameter in self.space.items() if len({*map(str, parameter.ends())}) == 1}
        known = [len(one.params.keys() - fixed) for one in self.leaders if one.params]
        return sum(known) / len(known) if known else 0.0


def read(study: Study | PlainStudy) -> Evidence:
    """Read what the quick checks need. Nothing is written or locked."""
    return _of_plain(study) if isinstance(study, PlainStudy) else _of_ours(study)


def with_columns(study: Study | PlainStudy, found: Evidence) -> Evidence:
    """Add all trials, for the dear checks. This loads Optuna and numpy. Nothing is written or locked."""
    from hpo.analysis import columns

    ladder = None if isinstance(study, PlainStudy) else _ladder(study)
    return replace(found, columns=columns.read(study), ladder=ladder)


def _of_ours(study: Study) -> Evidence:
    reading = status.read(study)
    summary = reading.summary
    if summary.objectives or not reading.leading or study.name.endswith(SISTER):
        return Evidence(
            summary=summary
        )  # the trials of a confirmation repeat a few configurations; none of them is searched
    count = _size_of_tenth(summary)
    shown = reading.leading[: max(count, 1)]
    ids = [one.trial_id for one in shown]
    with study.storage.engine.connect() as connection:
        params = recorded.params(connection, study, ids)
        curves = recorded.judged_curves(connection, ids[:CURVES] if count else [])
        described = recorded.distributions(connection, ids)
        row = ranking.result(connection, study, reading.leading[0].number)
    receipt = json.loads((row and row.receipt) or "{}")
    leaders = [
        Leader(
            number=one.number,
            value=one.value,
            params=params.get(one.trial_id, {}),
            curve=[value for _, value in sorted(curves.get(one.trial_id, {}).items())],
        )
        for one in reading.leading
    ]
    images = interval.counted(receipt)
    measured, is_confirmed = _confirmation(study)
    return Evidence(
        summary=summary,
        leaders=leaders,
        best=leaders[:count],
        space=_space(described),
        declared=frozenset(name for name, _ in parameters(study.spec.tree)),
        images=images,
        test_images=interval.counted(receipt, TEST_IMAGES_KEY),
        noise=noise.larger(noise.of_one_item(summary.metric, images), measured),
        is_confirmed=is_confirmed,
        can_confirm=True,
    )


def _confirmation(study: Study) -> tuple[Noise | None, bool]:
    """Return the noise that a study's confirmation has measured, and whether it has decided. (None, False) without one."""
    found, _ = study_rows.look_up(study.storage.engine, study.name + SISTER)
    if found is None:
        return None, False
    from hpo.analysis import confirmation

    return confirmation.measured_noise(study), confirmation.decided(study) is not None


def _of_plain(study: PlainStudy) -> Evidence:
    from optuna.distributions import distribution_to_json

    summary = summarize_plain(study)
    if summary.objectives:
        return Evidence(summary=summary)
    count, shown = _size_of_tenth(summary), study.leading()[:LEADING]
    described: dict[str, set[str]] = {}
    for one in shown[: max(count, 1)]:
        for name, distribution in one.distributions.items():
            described.setdefault(name, set()).add(distribution_to_json(distribution))
    leaders = [
        Leader(
            number=one.number,
            value=float(one.values[0]),
            params=one.params,
            curve=[value for _, value in sorted(one.intermediate_values.items())],
        )
        for one in shown
    ]
    return Evidence(summary=summary, leaders=leaders, best=leaders[:count], space=_space(described))


def _size_of_tenth(summary: Summary) -> int:
    """Return the size of the best tenth of all finished trials; 0 if it is smaller than FEWEST.

    If a pruner lets few trials end, it is half of these at most: the last ones of them are not good.
    """
    complete = summary.counts["complete"] - summary.infeasible
    count = min(math.ceil(TENTH * (summary.counts["complete"] + summary.counts["pruned"])), complete // 2, LEADING)
    return count if count >= FEWEST else 0


def _space(described: Mapping[str, Iterable[str]]) -> dict[str, Parameter]:
    """Return the parameters that had the same range or choices in all trials."""
    found = {name: [*texts] for name, texts in described.items()}
    known = {name: _parameter(texts[0]) for name, texts in found.items() if len(texts) == 1}
    return {name: parameter for name, parameter in known.items() if parameter is not None}


def _parameter(distribution: str) -> Parameter | None:
    """Return a distribution of Optuna's, as JSON, as a study file has it. None for those of an earlier Optuna."""
    described = json.loads(distribution)
    told = described.get("attributes", {})
    match described.get("name"):
        case "CategoricalDistribution":
            return Choices(options=tuple(told["choices"]))
        case "IntDistribution":
            step = None if told["step"] == 1 else told["step"]
            return Range(low=int(told["low"]), high=int(told["high"]), log=told["log"], step=step)
        case "FloatDistribution":
            return Range(low=float(told["low"]), high=float(told["high"]), log=told["log"], step=told["step"])
    return None


def _ladder(study: Study) -> Ladder | None:
    """Return the steps at which a study's pruner compares trials; None if it does not compare them by their values alone."""
    from hpo.strategy import pruners
    from hpo.strategy.rungs import Ladder

    given = study.spec.pruner
    if study.spec.goals.costs or study.spec.goals.are_several:
        return None
    if given["name"] in ("auto", "successive_halving", "hyperband"):
        return pruners.ladder(study.spec)
    if given["name"] in ("median", "percentile"):
        warm_up = given.get(pruners.WARM_UP, 0)
        assert isinstance(warm_up, int)
        return Ladder(first=warm_up + 1, factor=3)
    return None
