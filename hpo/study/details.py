"""What the live view of a run shows beyond a study's summary: parameters and raw curves of a few trials."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.study.status import Reading
    from hpo.study.study import Study

MOST_RUNNING = 40  # running trials of which more is read than the summary has
MOST_BEST = 5  # best trials that are read in more detail


@dataclass(frozen=True, kw_only=True)
class BestTrial:
    """One of the best trials."""

    number: int
    value: float
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunningDetails:
    """A trial that runs."""

    number: int
    params: dict[str, Any]
    raw: list[float] = field(default_factory=list)  # the metric by epoch, some seconds late; [] if trials report it so
    epochs: int | None = None  # to be trained in all, where that is known


@dataclass(frozen=True, kw_only=True)
class Details:
    """More on some trials."""

    best: list[BestTrial] = field(default_factory=list)  # the best first; empty with several objectives
    running: list[RunningDetails] = field(default_factory=list)


def read(study: Study, reading: Reading) -> Details:
    """Read more on the best trials and on those that run."""
    from hpo.study.query import recorded

    running = dict(list(reading.live.items())[:MOST_RUNNING])
    leading = [] if study.spec.objectives else reading.leading[:MOST_BEST]
    metric = f"validation_{study.spec.metric}" if study.spec.is_declared and study.spec.value != "last" else None
    with study.storage.engine.connect() as connection:
        params = recorded.params(connection, study, [*running.values(), *(one.trial_id for one in leading)])
        raw = recorded.raw_curve(connection, study, list(running.values()), metric) if metric else {}
    return Details(
        best=[BestTrial(number=one.number, value=one.value, params=params[one.trial_id]) for one in leading],
        running=[
            RunningDetails(
                number=number,
                params=params[trial_id],
                raw=raw.get(trial_id, []),
                epochs=_epochs(study, params[trial_id]),
            )
            for number, trial_id in running.items()
        ],
    )


def _epochs(study: Study, params: dict[str, Any]) -> int | None:
    """Return how many epochs a trial with these parameters trains; None for an objective of the user's own."""
    if not study.spec.is_declared:
        return None
    given = params.get("training.epochs", study.spec.training.get("epochs"))
    return given if isinstance(given, int) else None
