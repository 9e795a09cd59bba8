"""Tables of made-up trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.distributions import FloatDistribution

from hpo.lab.table import Ending, Row, Table

OWN = {"name": "made", "objective": "mine.py:objective", "direction": "minimize"}
DECLARED = {
    "name": "made",
    "metric": "loss",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "optimizer": {"name": "sgd", "lr": {"low": 0.0, "high": 1.0}},
}
X = FloatDistribution(0.0, 1.0)


def row(number: int, curve: Sequence[float], ending: Ending = Ending.COMPLETE, **changes: Any) -> Row:
    """Return a trial with the parameter x, which is a hundredth of its number, and a curve of steps from 1."""
    found: dict[str, Any] = {
        "number": number,
        "space": {"x": X},
        "params": (number / 100,),
        "steps": tuple(range(1, len(curve) + 1)),
        "curve": tuple(curve),
        "value": curve[-1] if ending is Ending.COMPLETE else None,
        "ending": ending,
        "seconds": 1.0,
    }
    return Row(**found | changes)


def table(*rows: Row, document: dict[str, Any] | None = None) -> Table:
    """Return a table of a study with an objective of the user's own, to be minimized."""
    return Table(document=document or OWN, rows=rows)


def falling(count: int, epochs: int = 4) -> list[Row]:
    """Return trials whose curves fall by 1 an epoch from 100 + their number on."""
    return [row(number, [100.0 + number - epoch for epoch in range(epochs)]) for number in range(count)]
