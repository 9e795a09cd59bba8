"""What trials of a study are judged by: objectives, the first of them with a curve, and bounds on what they come to.

A declared training has one metric of its curve, which comes first, and costs, which are known before a trial is trained.
An objective of the user's own names what it returns. A bound is soft: a trial that violates it is trained like any other,
and no result.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hpo.errors import SpecError, nearest
from hpo.spec import metrics
from hpo.spec.curve import Direction

#: What a trained model costs, less being better; how each is measured stands in `costs.py`.
COSTS = ("params", "latency_ms", "memory_mb")
OWN_VALUE = "value"  # how the one value of a user's own objective is called
_BOUND = re.compile(r"(<=|>=)\s*([-+0-9.eE_]+)")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A soft constraint: what is bounded, from which side, by how much."""

    name: str
    sign: Literal["<=", ">="]
    limit: float

    @classmethod
    def parse(cls, name: str, text: str) -> Bound:
        """Read `<= 1e6` or `>= 0.9`; SpecError for anything else."""
        match = _BOUND.fullmatch(text.strip())
        try:
            limit = float(match[2]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or not math.isfinite(limit):
            raise SpecError(f'constraints.{name} = {text!r}: is no bound; write "<= 1e6" or ">= 0.9"')
        return cls(name=name, sign="<=" if match[1] == "<=" else ">=", limit=limit)

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.limit:g}"

    def violation(self, value: Any) -> Any:
        """Return by what share of the limit a value, or each of an array, is beyond it, more than 0 if it is (absolute for a
        limit of 0).

        Samplers add up what different bounds say (Deb et al., NSGA-II, 2002), so it is in no unit.
        """
        over = value - self.limit if self.sign == "<=" else self.limit - value
        return over / abs(self.limit) if self.limit else over


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What the end of a trial is written with beside its first value."""

    values: tuple[float, ...] = ()  # of the objectives after the first
    constraints: Mapping[str, float] = field(default_factory=dict)  # violations by name


NOTHING = Beside()


@dataclass(frozen=True, kw_only=True)
class KnownCosts:
    """What is known of a trial before it is trained, and what of its end follows from that."""

    values: tuple[float, ...]  # of the objectives after the first
    constraints: Mapping[str, float]  # violations of the bounds on costs, by name
    bounds: tuple[Bound, ...] = ()  # on the first objective

    def beside(self, first: float | None) -> Beside:
        """Return what the end is written with if the first objective comes to this value, or to none."""
        if first is None:
            return Beside(constraints=self.constraints)
        late = {bound.name: bound.violation(first) for bound in self.bounds}
        return Beside(values=self.values, constraints={**self.constraints, **late})

    def to_json(self) -> str:
        bounds = {bound.name: f"{bound.sign} {bound.limit!r}" for bound in self.bounds}
        return json.dumps({"values": self.values, "constraints": dict(self.constraints), "bounds": bounds})

    @classmethod
    def from_json(cls, text: str) -> KnownCosts:
        found = json.loads(text)
        bounds = tuple(Bound.parse(name, bound) for name, bound in found["bounds"].items())
        return cls(values=tuple(found["values"]), constraints=found["constraints"], bounds=bounds)


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What the trials of one study are judged by."""

    directions: Mapping[str, Direction]  # by objective, in their order
    bounds: tuple[Bound, ...] = ()

    @property
    def names(self) -> list[str]:
        """The objectives' names, in their order."""
        return list(self.directions)

    @property
    def first(self) -> str:
        """The objective that is reported epoch by epoch."""
        return self.names[0]

    @property
    def are_several(self) -> bool:
        """Whether there is a front of trials, and no single best one."""
        return len(self.directions) > 1

    @property
    def static_bounds(self) -> tuple[Bound, ...]:
        """The bounds on what may be known before a trial is trained: all but those on the first objective."""
        return tuple(bound for bound in self.bounds if bound.name != self.first)

    @property
    def costs(self) -> list[str]:
        """What may be known before a trial is trained: the objectives after the first, and what else is bounded."""
        named = [*self.names[1:], *(bound.name for bound in self.static_bounds)]
        return list(dict.fromkeys(named))

    def known(self, costs: Mapping[str, float]) -> KnownCosts:
        """Return what a declared trial's costs say about its end."""
        return KnownCosts(
            values=tuple(costs[name] for name in self.names[1:]),
            constraints={bound.name: bound.violation(costs[bound.name]) for bound in self.static_bounds},
            bounds=tuple(bound for bound in self.bounds if bound.name == self.first),
        )

    def returned(self, values: Mapping[str, float]) -> KnownCosts:
        """Return likewise what an objective of the user's own has returned, by name."""
        return KnownCosts(
            values=tuple(values[name] for name in self.names[1:]),
            constraints={bound.name: bound.violation(values[bound.name]) for bound in self.bounds},
        )


# --- the study file ---------------------------------------------------------------------------------------------------


def check_declared(objectives: Mapping[str, Direction]) -> None:
    """Raise SpecError for objectives that a declared training cannot have."""
    _check_count(objectives)
    first, *others = objectives
    if not metrics.is_known(first):
        raise SpecError(
            f"objectives.{first}: stands first, and is no metric of the curve; begin with {' or '.join(metrics.ALWAYS)}"
        )
    for name in others:
        if metrics.is_known(name):
            raise SpecError(
                f"objectives.{name}: only the first objective is a metric of the curve, the others are costs: "
                f"{', '.join(COSTS)}"
            )
        if name not in COSTS:
            raise SpecError(f"objectives.{name}: there is no such objective{nearest(name, COSTS)}")
    for name, direction in objectives.items():
        wanted = metrics.direction(name) if metrics.is_known(name) else "minimize"
        if direction != wanted:
            raise SpecError(f'objectives.{name} = {direction!r}: is to be {wanted}d; write "{wanted}"')


def check_own(objectives: Mapping[str, Direction]) -> None:
    """Raise SpecError for objectives that an objective of the user's own cannot have."""
    _check_count(objectives)


def _check_count(objectives: Mapping[str, Direction]) -> None:
    if len(objectives) == 1:
        (name,) = objectives
        raise SpecError(f"objectives.{name}: is the only one; name two or more, or remove [objectives]")


def bounds_of(constraints: Mapping[str, str], known: Iterable[str]) -> tuple[Bound, ...]:
    """Read constraints; SpecError for one on what is not known, or that is no bound."""
    known = list(dict.fromkeys(known))
    for name in constraints:
        if name not in known:
            raise SpecError(
                f"constraints.{name}: there is no such value{nearest(name, known)}; bounds go on {', '.join(known)}"
            )
    return tuple(Bound.parse(name, text) for name, text in constraints.items())
