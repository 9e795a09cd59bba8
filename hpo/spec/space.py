"""The search space: ranges and choices of a study file, and the only `trial.suggest_*` calls.

A leaf of the tree is a constant, a range `{ low, high, log, step }` or choices `{ choices = [...] }`. A table with a `name`
is a part. The tables inside a part are its branches. Each branch has the name of one choice and is searched only if that
choice is taken. A parameter's name in Optuna is its dotted path, such as `optimizer.sgd.momentum`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.errors import SpecError, nearest, shown

if TYPE_CHECKING:
    import optuna

Tree = dict[str, Any]
GRAMMAR = "a range is { low = ..., high = ... }, a choice is { choices = [...] }"  # for messages
MAX_INTEGER = 2**53  # Optuna stores numbers as floats, which are exact for integers up to here
RANGE_KEYS = {"low", "high", "log", "step"}


@dataclass(frozen=True, kw_only=True)
class Range:
    """A numeric parameter from `low` to `high`, both included. It is an integer if both ends and the step are integers."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def has_whole_ends(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def integer(self) -> bool:
        return self.has_whole_ends and isinstance(self.step or 1, int)

    @property
    def real(self) -> Range:
        """This range with float ends and step."""
        step = None if self.step is None else float(self.step)
        return Range(low=float(self.low), high=float(self.high), log=self.log, step=step)

    def suggest(self, trial: optuna.Trial, path: str) -> float:
        if self.integer:
            return trial.suggest_int(path, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(path, self.low, self.high, step=self.step, log=self.log)

    def ends(self) -> list[float]:
        return [self.low, self.high]

    def middle(self) -> float:
        """Return the middle of the range: geometric for a log range, else arithmetic."""
        if self.log:
            value = math.sqrt(self.low) * math.sqrt(self.high)  # two roots, since low * high may overflow
        elif self.step:
            value = self.low + self.step * (round((self.high - self.low) / self.step) // 2)
        else:
            value = (self.low + self.high) / 2
        return round(value) if self.integer else value

    def values(self, path: str) -> list[float]:
        """Return all values, for a grid; SpecError for a real range without a step."""
        step = self.step or 1
        return [min(self.low + i * step, self.high) for i in range(self.count(path))]  # min: 3 * 0.1 > 0.3

    def count(self, path: str) -> int:
        """Return the number of values; SpecError for a real range without a step."""
        if self.step is None and not self.integer:
            raise SpecError(f"{path}: a grid needs a step, got {self}; add step = ... or use {{ choices = [...] }}")
        return round((self.high - self.low) / (self.step or 1)) + 1

    def __str__(self) -> str:
        extras = [
            *(["log = true"] if self.log else []),
            *([f"step = {self.step}"] if self.step is not None else []),
        ]
        return "{ " + ", ".join([f"low = {self.low}", f"high = {self.high}", *extras]) + " }"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A categorical parameter. Optuna stores a list as compact JSON text."""

    options: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, path: str) -> Any:
        encoded = [encode(option) for option in self.options]
        return self.options[encoded.index(trial.suggest_categorical(path, encoded))]

    @property
    def real(self) -> Choices:
        """The same choices with floats in place of integers."""
        return Choices(options=tuple(float(one) if type(one) is int else one for one in self.options))

    def ends(self) -> list[Any]:
        return list(self.options)

    def middle(self) -> Any:
        return self.options[len(self.options) // 2]

    def values(self, path: str) -> list[Any]:  # noqa: ARG002  (the same signature as Range.values)
        return [encode(option) for option in self.options]

    def count(self, path: str) -> int:  # noqa: ARG002  (the same signature as Range.count)
        return len(self.options)

    def __str__(self) -> str:
        return "{ choices = [" + ", ".join(json.dumps(option) for option in self.options) + "] }"


Parameter = Range | Choices


def ends_of(value: Any) -> list[Any]:
    """Return the extreme values of a leaf: both ends of a range, all choices, or the constant."""
    return value.ends() if isinstance(value, Range | Choices) else [value]


def encode(option: Any) -> Any:
    """Return a choice as Optuna stores it: scalars unchanged, lists and tables as compact JSON text."""
    return json.dumps(option, separators=(",", ":")) if isinstance(option, list | dict) else option


def lift(tree: Mapping[str, Any], path: str = "") -> Tree:
    """Return the tree with a Parameter for each range and choice table; SpecError names a wrong path."""
    return {key: _lift_leaf(value, f"{path}.{key}" if path else key) for key, value in tree.items()}


def _lift_leaf(value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "choices" in value:
        return _choices(value, path)
    if "low" in value or "high" in value:
        return _range(value, path)
    return lift(value, path)


def _choices(table: Mapping[str, Any], path: str) -> Choices:
    for key in table.keys() - {"choices"}:
        raise SpecError(f"{path}: {key!r} cannot stand beside choices; write {{ choices = [...] }} alone")
    options = table["choices"]
    if not isinstance(options, list) or not options:
        raise SpecError(
            f"{path}: choices = {shown(options)} is empty or not a list; give at least one value in brackets"
        )
    if any(isinstance(option, dict) for option in options):
        raise SpecError(
            f"{path}: choices = {shown(options)} holds a table; a choice is a number, a string, true, false or a list"
        )
    if len({encode(option) for option in options}) < len(options):  # 1, 1.0 and true are one value to Optuna
        raise SpecError(f"{path}: choices = {shown(options)} repeats a value; list each value once")
    return Choices(options=tuple(options))


def _range(table: Mapping[str, Any], path: str) -> Range:
    for key in sorted(table.keys() - RANGE_KEYS):
        raise SpecError(f"{path}: unknown key {key!r} in a range{nearest(key, RANGE_KEYS)}")
    for key in ("low", "high"):
        if key not in table:
            raise SpecError(f"{path}: a range needs low and high, but {key} is missing; add {key} = ...")
    for key in table.keys() & {"low", "high", "step"}:
        number = table[key]
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise SpecError(f"{path}.{key}: {shown(number)} is not a finite number")
    if not isinstance(table.get("log", False), bool):
        raise SpecError(f"{path}.log: {shown(table['log'])} is not true or false")
    found = Range(low=table["low"], high=table["high"], log=table.get("log", False), step=table.get("step"))
    _check_range(found, path)
    return found


def _check_range(found: Range, path: str) -> None:
    if not math.isfinite(found.high - found.low):
        raise SpecError(f"{path}: {found} is too wide: high - low overflows a float; move its ends")
    if found.integer and max(abs(found.low), abs(found.high)) > MAX_INTEGER:
        raise SpecError(f"{path}: {found} exceeds 2**53, the largest integer that Optuna can store; write floats")
    if found.low > found.high:
        raise SpecError(f"{path}: low = {found.low} is above high = {found.high}; swap them")
    if found.log and found.low <= 0:
        raise SpecError(f"{path}: a log range cannot start at low = {found.low}; use a low above 0 or remove log")
    if found.step is None:
        return
    if found.log:
        raise SpecError(f"{path}: log and step = {found.step} cannot be combined; remove one of them")
    if found.step <= 0:
        raise SpecError(f"{path}.step: {found.step} must be above 0")
    steps = (found.high - found.low) / found.step
    if steps > MAX_INTEGER:
        raise SpecError(f"{path}.step: {found.step} is too small for {found}; remove it")
    if abs(steps - round(steps)) > 1e-8:
        reached = round(found.low + math.floor(steps) * found.step, 12)
        raise SpecError(
            f"{path}: high = {found.high} is not a whole number of steps of {found.step} above low; use high = {reached}"
        )


def lower(tree: Mapping[str, Any]) -> Tree:
    """Return the tree as plain TOML and JSON values, the inverse of `lift`."""
    return {key: _lower_leaf(value) for key, value in tree.items()}


def _lower_leaf(value: Any) -> Any:
    if isinstance(value, Choices):
        return {"choices": list(value.options)}
    if isinstance(value, Range):
        table: Tree = {"low": value.low, "high": value.high}
        if value.log:
            table["log"] = True
        if value.step is not None:
            table["step"] = value.step
        return table
    return lower(value) if isinstance(value, Mapping) else value


def parameters(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Parameter]]:
    """Yield (dotted path, parameter) for all ranges and choices of a lifted tree, in all branches."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Range | Choices):
            yield here, value
        elif isinstance(value, Mapping):
            yield from parameters(value, here)


def branches(part: Mapping[str, Any]) -> dict[str, Tree]:
    """Return the tables inside a part by name. Each holds the options of one choice of the part's name."""
    return {key: value for key, value in part.items() if isinstance(value, dict)}


def is_conditional(tree: Mapping[str, Any]) -> bool:
    """Return whether some parameter exists only under one choice of its part's name."""
    tables = branches(tree).values()
    if isinstance(tree.get("name"), Choices) and any(list(parameters(table)) for table in tables):
        return True
    return any(map(is_conditional, tables))


def check_branches(tree: Mapping[str, Any]) -> None:
    """Raise SpecError for a branch whose name is not a choice of its part's name."""
    for key, part in tree.items():
        if not isinstance(part, Mapping):
            continue
        name = part.get("name")
        names = list(name.options) if isinstance(name, Choices) else [name]
        for branch, table in branches(part).items():
            if "name" not in part:
                raise SpecError(f"{key}.{branch}: {_no_parameter(table)}")
            if branch not in names and table.keys() & {"min", "max"}:
                raise SpecError(f"{key}.{branch}: a range is {{ low = ..., high = ... }}, not min and max")
            if branch not in names:
                taken = ", ".join(map(repr, names))
                raise SpecError(
                    f"{key}.{branch}: no choice has this name: {key}.name is {taken}; "
                    f"add {branch!r} to the choices of {key}.name or remove [{key}.{branch}]; {GRAMMAR}"
                )
            for inner, deeper in branches(table).items():
                raise SpecError(f"{key}.{branch}.{inner}: {_no_parameter(deeper)}")


def check_free(tree: Mapping[str, Any], path: str) -> None:
    """Check a tree whose tables are nested as the user likes. A table with a `name` is a part, as in the training sections.

    Raises SpecError for a wrong branch, and for a key with a dot, which would be read as a path.
    """
    if dotted := next((key for key in tree if "." in key), None):
        raise SpecError(
            f"{path}.{dotted!r}: a key with a dot would be read as a path; write a table, or _ in place of the dot"
        )
    if "name" in tree:
        check_branches({path: tree})
        return
    for key, table in branches(tree).items():
        check_free(table, f"{path}.{key}")


def _no_parameter(table: Tree) -> str:
    return f"{shown(lower(table))} is neither a range nor a choice; {GRAMMAR}"


def pin(tree: Mapping[str, Any], pick: Callable[[str, Parameter], Any], path: str = "") -> Tree:
    """Return the tree with each parameter replaced by `pick(path, parameter)`, without the branches not taken.

    A part's name is picked first. So a branch's parameters are picked only if the branch is taken.
    """
    pinned: Tree = {}
    for key in sorted(tree, key=lambda key: key != "name"):  # a stable sort: the name first, the rest as written
        value, here = tree[key], f"{path}.{key}" if path else key
        if isinstance(value, Range | Choices):
            pinned[key] = pick(here, value)
        elif not isinstance(value, Mapping):
            pinned[key] = value
        elif "name" not in pinned or key == pinned["name"]:
            pinned[key] = pin(value, pick, here)
    return pinned


def queued(parameter: Parameter, path: str, value: Any) -> Any:
    """Return an enqueued value as Optuna stores it; ValueError names the allowed values if it is wrong.

    A list may be written as in a study file, such as [64, 32], or as text, such as "[64, 32]".
    """
    legal = f"{path} = {shown(value)}: this enqueued value is not allowed; enqueue a value of {parameter}"
    if isinstance(parameter, Range):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(legal)
        return value
    stored = [encode(option) for option in parameter.options]
    written = [value]
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            written.append(json.loads(value))
    for one in map(encode, written):
        if one in stored:
            return stored[stored.index(one)]
    raise ValueError(legal)


def suggest(tree: Mapping[str, Any], trial: optuna.Trial) -> Tree:
    """Return the tree pinned to the values that the study's sampler suggests for this trial."""
    return pin(tree, lambda path, parameter: parameter.suggest(trial, path))


def grid(tree: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return all values of each parameter for a grid search.

    Raises SpecError for a real range without a step and for a conditional space.
    """
    _refuse_a_conditional_grid(tree)
    return {path: parameter.values(path) for path, parameter in parameters(tree)}


def grid_points(tree: Mapping[str, Any]) -> int:
    """Return the number of grid points without listing them; SpecError as `grid`."""
    _refuse_a_conditional_grid(tree)
    return math.prod(parameter.count(path) for path, parameter in parameters(tree))


def _refuse_a_conditional_grid(tree: Mapping[str, Any]) -> None:
    if is_conditional(tree):
        raise SpecError(
            "sampler.name: grid cannot search a conditional space (a branch such as [optimizer.sgd] holds ranges); "
            "make the branch's values constants or use sampler tpe"
        )


def middle(tree: Mapping[str, Any], taken: Mapping[str, Any]) -> Tree:
    """Return the tree with each parameter at its middle value, or at the value that `taken` has for its path."""
    return pin(tree, lambda path, parameter: taken.get(path, parameter.middle()))


def variants(tree: Mapping[str, Any]) -> Iterator[Tree]:
    """Yield pinned trees that together contain both ends of every range and every choice, in every branch.

    Each pair of sections is tried in all combinations of their parts. Each parameter of the pair is tried at each of its
    ends; all other parameters stay at their middle. The number of combinations of all sections would grow exponentially.
    """
    names = {section: _names(table) for section, table in tree.items()}
    for sections in itertools.combinations(names, 2) if len(names) > 1 else [tuple(names)]:
        for picked in itertools.product(*(names[section] for section in sections)):
            taken = {
                f"{section}.name": name for section, name in zip(sections, picked, strict=True) if name is not None
            }
            yield middle(tree, taken)
            for path, parameter in _open(tree, taken).items():
                if path.partition(".")[0] in sections and path not in taken:
                    yield from (middle(tree, {**taken, path: end}) for end in parameter.ends())


def _names(table: Any) -> list[Any]:
    """Return the choices of a section's part name, [None] if the name is not searched."""
    name = table.get("name") if isinstance(table, Mapping) else None
    return list(name.ends()) if isinstance(name, Choices) else [None]


def _open(tree: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the parameters that are searched if the parts have these names."""
    found: dict[str, Parameter] = {}

    def pick(path: str, parameter: Parameter) -> Any:
        found[path] = parameter
        return taken.get(path, parameter.middle())

    pin(tree, pick)
    return found
