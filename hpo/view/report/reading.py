"""All that a report says of one study, read at one moment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from optuna.trial import TrialState

from hpo.analysis import confirmation, effects, evidence, health, progress, pruning
from hpo.analysis.columns import Columns
from hpo.analysis.confirmation import Confirmation
from hpo.analysis.effects import Importances
from hpo.analysis.health import Finding
from hpo.analysis.progress import Progress
from hpo.analysis.pruning import Pruning
from hpo.errors import StudyError
from hpo.spec.metrics import column
from hpo.study import plain
from hpo.study.plain import PlainStudy
from hpo.study.query import recorded, worker_rows
from hpo.study.results import TrialResult
from hpo.study.status import Summary
from hpo.study.study import Study
from hpo.text import command

MOST_CURVES = 300  # in a figure
MOST_LEADERS = 10  # in the table of the best trials
MOST_OF_FRONT = 30  # likewise, of a Pareto front
MEMORY = "peak_memory_mb"  # the raw metric with a process's peak memory


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a search has spent."""

    epochs: int  # of all trials, running ones too
    by_state: Mapping[str, int]  # epochs by the state of their trials
    training_seconds: float  # summed over trials; 0 if no epoch was timed
    seconds: float  # in which the search ran
    peak_memory: float | None  # MiB, of the largest process; None if it was not watched


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """What a report says of one study."""

    name: str
    read_at: float  # seconds since 1970
    summary: Summary
    columns: Columns
    metric: str  # the name of the first objective, as figures show it
    unit: str  # "epoch" or "step"
    leaders: Sequence[TrialResult]  # the best trials; of several objectives the Pareto front
    curves: Mapping[int, Sequence[tuple[int, float]]]  # (step, value) by position, of at most MOST_CURVES trials
    progress: Progress
    importances: Sequence[Importances]
    pruning: Pruning | None
    cost: Cost
    settings: str = ""  # the study file in lines; of a study of Optuna's own nothing
    openings: int = 0  # of the test split
    fingerprint: str = ""
    warnings: Sequence[str] = ()  # on chance, as `hpo status` says it
    findings: Sequence[Finding] = ()  # of the health checks
    confirmation: Confirmation | None = None  # as it stands, if `hpo confirm` was called
    confirms: str | None = None  # the study that this one confirms

    @property
    def are_several(self) -> bool:
        """Whether there are several objectives."""
        return self.columns.goals.are_several

    @property
    def direction(self) -> str:
        """The direction of the first objective."""
        return self.columns.goals.directions[self.columns.goals.first]

    @property
    def winner(self) -> TrialResult | None:
        """The best trial, None if there is none, and with several objectives."""
        return None if self.are_several or not self.leaders else self.leaders[0]


def read(study: Study | PlainStudy) -> StudyReport:
    """Read a study. Nothing is written or locked. Raises StudyError for a study in which no trial has begun."""
    from hpo.view import chance, checked

    seen = evidence.read(study)
    summary = seen.summary
    if not summary.spent:
        raise StudyError(
            f"study {study.name!r} has no trial that has begun, so there is nothing to report; "
            f"let `hpo run` begin one, `{command('status', study.name)}` shows how far it is"
        )
    seen = evidence.with_columns(study, seen)
    found = seen.columns
    assert found is not None, "they were asked for"
    most = MOST_OF_FRONT if study.goals.are_several else MOST_LEADERS
    is_ours = isinstance(study, Study)
    return StudyReport(
        name=study.name,
        read_at=time.time(),
        summary=summary,
        columns=found,
        metric=_metric(study),
        unit="epoch" if isinstance(study, Study) and (study.spec.is_declared or study.spec.command) else "step",
        leaders=plain.best(study, k=most) if len(found.leaders) else [],
        curves=_curves(study, found),
        progress=progress.of_study(found),
        importances=effects.of_study(found),
        pruning=pruning.of_study(found),
        cost=_cost(study, found, summary),
        settings=checked.spec_text(study.spec) if isinstance(study, Study) else "",
        openings=_openings(study) if isinstance(study, Study) else 0,
        findings=health.examine(seen),
        confirmation=confirmation.read(study) if isinstance(study, Study) else None,
        confirms=confirmation.source_of(study) if isinstance(study, Study) else None,
        fingerprint=study.spec.fingerprint if isinstance(study, Study) else "",
        warnings=tuple(line.partition(" ")[2].strip() for line in chance.choice_lines(summary)) if is_ours else (),
    )


def _metric(study: Study | PlainStudy) -> str:
    first = study.goals.first
    return f"validation {first}" if isinstance(study, Study) and study.spec.is_declared else first


def _curves(study: Study | PlainStudy, found: Columns) -> dict[int, list[tuple[int, float]]]:
    """Return the curves of the best trials and of others drawn at random."""
    reported = np.flatnonzero(found.epochs > 0).tolist()
    keep = found.leaders[: MOST_CURVES // 3].tolist()
    shown = progress.sampled(reported, MOST_CURVES, keep=[position for position in keep if found.epochs[position]])
    rows = {position: found.rows[position] for position in shown}
    if isinstance(study, Study) and study.spec.is_declared:
        ids = [row.trial_id for row in rows.values()]
        with study.storage.engine.connect() as connection:
            raw = recorded.raw_curve(connection, study, ids, column(study.goals.first))
        return {position: list(enumerate(raw[row.trial_id], start=1)) for position, row in rows.items()}
    return {position: list(zip(row.steps, row.curve, strict=True)) for position, row in rows.items()}


def _cost(study: Study | PlainStudy, found: Columns, summary: Summary) -> Cost:
    own = ~found.is_imported
    by_state: dict[str, int] = {}
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        by_state[state.name.lower()] = int(found.epochs[own & (found.finished.states == state.value)].sum())
    by_state["running"] = sum(len(row.steps) for row in found.open)
    memory = None
    if isinstance(study, Study):
        with study.storage.engine.connect() as connection:
            memory = recorded.largest(connection, study, MEMORY)
    return Cost(
        epochs=sum(by_state.values()),
        by_state={state: epochs for state, epochs in by_state.items() if epochs},
        training_seconds=float(sum(found.seconds.values())),
        seconds=summary.seconds,
        peak_memory=memory,
    )


def _openings(study: Study) -> int:
    with study.storage.engine.connect() as connection:
        return recorded.count_openings(connection, study)


def hosts(study: Study) -> list[str]:
    """Return the names of the machines that have worked on a study."""
    with study.storage.engine.connect() as connection:
        return worker_rows.hosts(connection, study)
