"""A report as JSON: the numbers behind the page, without the trials, which the table has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from hpo.files import without_nan
from hpo.study.results import TrialResult
from hpo.view import confirmed
from hpo.view.pages import to_json
from hpo.view.report.privacy import Privacy
from hpo.view.report.reading import StudyReport

FORMAT = 1  # of the document; a key that changes its meaning makes it 2


def render(reports: Sequence[StudyReport], privacy: Privacy) -> str:
    """Return the document. Numbers that are not finite are null."""
    told = {"format": FORMAT, "studies": [_study(one, privacy) for one in reports]}
    return json.dumps(without_nan(privacy.clean(told)), indent=2, allow_nan=False) + "\n"


def _study(report: StudyReport, privacy: Privacy) -> dict[str, Any]:
    columns, went = report.columns, report.progress
    better = went.improvements(columns)
    summary = to_json(report.summary)
    for key in () if privacy.is_off else ("logs", "running"):
        summary.pop(key)
    return {
        "name": report.name,
        "read_at": datetime.fromtimestamp(report.read_at, UTC).isoformat(timespec="seconds"),
        "objectives": dict(columns.goals.directions),
        "summary": summary,
        "confirmation": None if report.confirmation is None else confirmed.to_json(report.confirmation),
        "leaders": [_leader(one, privacy) for one in report.leaders],
        "health": [{"name": one.name, "text": one.text, "mend": one.mend} for one in report.findings],
        "improvements": [
            {
                "trial": int(columns.numbers[went.order[place]]),
                "value": float(columns.finished.values[went.order[place]]),
                "epochs": int(went.epochs[place]),
                "hours": float(went.hours[place]),
            }
            for place in better
        ],
        "importances": [
            {
                "objective": one.objective,
                "trials": one.trials,
                "best": one.best,
                "why_none": one.why_none,
                "parameters": [
                    {
                        "name": found.name,
                        "share": found.share,
                        "low": found.low,
                        "high": found.high,
                        "chance": found.chance,
                        "has_effect": found.has_effect,
                    }
                    for found in one.found
                ],
            }
            for one in report.importances
        ],
        "pruning": None
        if report.pruning is None
        else {
            "pruned": report.pruning.pruned,
            "epochs_saved": report.pruning.saved,
            "share_saved": report.pruning.share,
            "judged": report.pruning.judged,
            "might_have_been_best": report.pruning.missed,
        },
        "cost": {
            "epochs": report.cost.epochs,
            "epochs_by_state": dict(report.cost.by_state),
            "training_seconds": report.cost.training_seconds,
            "seconds": report.cost.seconds,
            "peak_memory_mb": report.cost.peak_memory,
        },
        "fingerprint": report.fingerprint,
        "test_openings": report.openings,
        "settings": report.settings.splitlines(),
    }


def _leader(found: TrialResult, privacy: Privacy) -> dict[str, Any]:
    return {
        "trial": found.number,
        "value": found.value,
        "values": found.values,
        "interval": [found.interval.low, found.interval.high] if found.interval else None,
        "params": found.params,
        "constraints": found.constraints,
        "attempt": found.attempt,
        "receipt": privacy.receipt(found.receipt),
        **({"checkpoint": found.checkpoint} if privacy.is_off else {}),
    }
