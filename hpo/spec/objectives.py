"""Objectives and constraints of a study.

In a declared training the first objective is a metric of the validation curve. The others are costs, which are known before
the training starts. A user's own objective names its return values. A bound is a soft constraint: a trial that violates it
is trained like any other, but it is not a result.
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

#: Costs of a model, all minimized. `train/build/costs.py` measures them.
COSTS = ("params", "latency_ms", "memory_mb")
OWN_VALUE = "value"  # the name of a user's own objective that returns one value
_BOUND = re.compile(r"(<=|>=)\s*([-+0-9.eE_]+)")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A soft constraint: the name of a value, a sign and a limit."""

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
            raise SpecError(f'constraints.{name} = {text!r}: is not a bound; write "<= 1e6" or ">= 0.9"')
        return cls(name=name, sign="<=" if match[1] == "<=" else ">=", limit=limit)

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.limit:g}"

    def violation(self, value: Any) -> Any:
        """Return the violation of the bound by a value or by each element of an array. It is above 0 if the bound is violated.

        The violation is a share of the limit, or absolute if the limit is 0. Samplers add the violations of different bounds
        (Deb et al., NSGA-II, 2002), so they must have no unit.
        """
        over = value - self.limit if self.sign == "<=" else self.limit - value
        return over / abs(self.limit) if self.limit else over


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What is written with a trial's end in addition to its first value."""

    values: tuple[float, ...] = ()  # of the objectives after the first
    constraints: Mapping[str, float] = field(default_factory=dict)  # violations by name


NOTHING = Beside()


@dataclass(frozen=True, kw_only=True)
class KnownCosts:
    """A declared trial's costs, known before its training, and the bounds on its first objective."""

    values: tuple[float, ...]  # of the objectives after the first
    constraints: Mapping[str, float]  # violations of the bounds on costs, by name
    bounds: tuple[Bound, ...] = ()  # on the first objective

    def beside(self, first: float | None) -> Beside:
        """Return what is written with the end of a trial, given its first value; None for a trial without one."""
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
    """The objectives and constraints of one study."""

    directions: Mapping[str, Direction]  # by objective, in order
    bounds: tuple[Bound, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of the objectives, in order."""
        return list(self.directions)

    @property
    def first(self) -> str:
        """The objective that is reported after each epoch."""
        return self.names[0]

    @property
    def are_several(self) -> bool:
        """Whether the result is a Pareto front and not one best trial."""
        return len(self.directions) > 1

    @property
    def static_bounds(self) -> tuple[Bound, ...]:
        """The bounds on costs: all bounds but those on the first objective."""
        return tuple(bound for bound in self.bounds if bound.name != self.first)

    @property
    def costs(self) -> list[str]:
        """The values known before the training: the objectives after the first, and other bounded values."""
        named = [*self.names[1:], *(bound.name for bound in self.static_bounds)]
        return list(dict.fromkeys(named))

    def known(self, costs: Mapping[str, float]) -> KnownCosts:
        """Return a declared trial's measured costs with the bounds that apply to them."""
        return KnownCosts(
            values=tuple(costs[name] for name in self.names[1:]),
            constraints={bound.name: bound.violation(costs[bound.name]) for bound in self.static_bounds},
            bounds=tuple(bound for bound in self.bounds if bound.name == self.first),
        )

    def returned(self, values: Mapping[str, float]) -> KnownCosts:
        """Return the same for the values, by name, that a user's own objective returned."""
        return KnownCosts(
            values=tuple(values[name] for name in self.names[1:]),
            constraints={bound.name: bound.violation(values[bound.name]) for bound in self.bounds},
        )


# --- the study file ---------------------------------------------------------------------------------------------------


def check_declared(objectives: Mapping[str, Direction]) -> None:
    """Raise SpecError unless the first objective is a metric, the others are costs, and all directions are right."""
    _check_count(objectives)
    first, *others = objectives
    if not metrics.is_known(first):
        raise SpecError(
            f"objectives.{first}: the first objective must be a metric of the curve; begin with "
            f"{' or '.join(metrics.ALWAYS)}"
        )
    for name in others:
        if metrics.is_known(name):
            raise SpecError(
                f"objectives.{name}: only the first objective can be a metric of the curve; the others are costs: "
                f"{', '.join(COSTS)}"
            )
        if name not in COSTS:
            raise SpecError(f"objectives.{name}: there is no such objective{nearest(name, COSTS)}")
    for name, direction in objectives.items():
        wanted = metrics.direction(name) if metrics.is_known(name) else "minimize"
        if direction != wanted:
            raise SpecError(f'objectives.{name} = {direction!r}: must be {wanted}d; write "{wanted}"')


def check_own(objectives: Mapping[str, Direction]) -> None:
    """Raise SpecError if a user's own objective has exactly one named objective."""
    _check_count(objectives)


def _check_count(objectives: Mapping[str, Direction]) -> None:
    if len(objectives) == 1:
        (name,) = objectives
        raise SpecError(f"objectives.{name}: is the only objective; name two or more, or remove [objectives]")


def bounds_of(constraints: Mapping[str, str], known: Iterable[str]) -> tuple[Bound, ...]:
    """Return the bounds of [constraints]; SpecError for an unknown name or a wrong bound."""
    known = list(dict.fromkeys(known))
    for name in constraints:
        if name not in known:
            raise SpecError(
                f"constraints.{name}: there is no such value{nearest(name, known)}; a bound can limit {', '.join(known)}"
            )
    return tuple(Bound.parse(name, text) for name, text in constraints.items())
