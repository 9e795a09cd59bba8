"""Known configurations of a study: values of some or all of its parameters, checked against the search space.

A configuration is a dict of values by the parameters' dotted paths. It comes from words such as `lr=1e-3`, from a table
of a file, or from a Python program. What it leaves out is the sampler's choice.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from hpo.errors import Mistakes, SpecError, closest, located, nearest, shown
from hpo.spec import space
from hpo.spec.space import Choices, Parameter, Range, Tree

JSON_KEY = "json"  # the key of a table that holds a value as JSON, since TOML cannot express it
NONE = ("None", "null")  # words of a command line that may mean a choice without a value
STEP_TOLERANCE = 1e-8  # of a step; Optuna's own


class Written(str):
    """A value as a command line has it. What it means depends on its parameter: 1 may be a number or a text."""

    __slots__ = ()

    @property
    def value(self) -> Any:
        """The value that TOML reads, else a number that Python reads, else the text."""
        try:
            read = tomllib.loads(f"value = {self}")
        except (tomllib.TOMLDecodeError, RecursionError, ValueError):
            read = {}
        if [*read] == ["value"]:
            return _of_json(read["value"])
        try:
            return float(self)
        except ValueError:
            return str(self)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A configuration that fits a search space."""

    values: dict[str, Any]  # by path, as a study file writes them
    missing: list[str]  # parameters that the sampler chooses; those that hang on a missing choice are not listed


# --- as they are written ----------------------------------------------------------------------------------------------


def of_words(words: Iterable[str]) -> dict[str, Any]:
    """Return the configuration of words such as `optimizer.lr=1e-3`. Raises SpecError for another word."""
    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.strip():
            raise SpecError(f"{word}: is not a parameter and its value; write it such as lr=1e-3")
        if name.strip() in found:
            raise SpecError(f"{name.strip()}: is given twice; leave one out")
        found[name.strip()] = Written(value.strip())
    return found


def tables(start: Any) -> list[dict[str, Any]]:
    """Return the `[[start]]` tables of a document. Raises a PydanticCustomError for anything else."""
    if isinstance(start, dict):
        raise PydanticCustomError(
            "start", "is one table; write [[start]], with two brackets, before each configuration"
        )
    if not isinstance(start, list) or not all(isinstance(one, dict) for one in start):
        raise PydanticCustomError("start", "is no list of tables; write [[start]] before each configuration")
    return start


def flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return a configuration with nested tables, such as `optimizer.lr = 1e-3` in TOML, as values by dotted path."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        here = f"{path}.{key}" if path else str(key)
        plain = _of_json(value)
        found |= flat(plain, here) if plain is value and isinstance(value, Mapping) else {here: plain}
    return found


def _of_json(value: Any) -> Any:
    """Return the value of a table such as `{ json = "null" }`, any other value unchanged."""
    if isinstance(value, dict) and [*value] == [JSON_KEY] and isinstance(value[JSON_KEY], str):
        try:
            return json.loads(value[JSON_KEY])
        except (ValueError, RecursionError):
            return value
    return value


def text(values: Mapping[str, Any]) -> str:
    """Return a configuration as words: optimizer.lr = 0.001, optimizer.name = 'adamw'."""
    return ", ".join(f"{path} = {shown(value)}" for path, value in values.items())


# --- checked ----------------------------------------------------------------------------------------------------------


def each(
    given: Sequence[Mapping[str, Any]], check: Callable[[dict[str, Any]], Configuration], word: str = ""
) -> list[Configuration]:
    """Check each configuration. Raises SpecError that lists the mistakes of all; of several, each line names which one.

    Args:
        given: configurations, also with nested tables.
        check: checks one, whose keys are paths.
        word: what a configuration is called in messages. By default only one of several is named.
    """
    found, mistakes = [], Mistakes()
    for place, one in enumerate(given, start=1):
        name = f"{word or 'configuration'} {place}" if len(given) > 1 else word
        with mistakes.collect(), located(name) if name else nullcontext():
            checked_one = check(flat(one))
            if not checked_one.values:
                raise SpecError("no value that the study searches is given; give one, such as lr = 1e-3")
            found.append(checked_one)
    mistakes.raise_if_any()
    return found


def checked(tree: Tree, given: Mapping[str, Any], *, is_grid: bool = False) -> Configuration:
    """Check a configuration against a search space.

    A constant of the space may be given if the value is equal. It is left out of the result.

    Args:
        tree: the space.
        given: values by path.
        is_grid: whether the sampler is a grid, which can choose no single value.

    Raises SpecError that lists all mistakes: a name that is not searched, a value that its parameter cannot have, a
    parameter of a branch that is not taken, and with a grid a missing parameter.
    """
    mistakes = Mistakes()
    known, found = dict(space.parameters(tree)), dict[str, Any]()
    for path, value in given.items():
        with mistakes.collect():
            if path in known:
                found[path] = legal(known[path], path, value)
            else:
                _refuse_unless_constant(tree, known, path, value)
    reached = _reached(tree, found)
    branches = _branches(tree)
    for path in found.keys() - reached.keys():
        name, branch = branches[path]
        if name in given and name not in found:
            continue  # its value is wrong, which is said already
        mistakes.add(SpecError(_of_another_branch(tree, path, name, branch, found)))
    missing = [path for path in reached if path not in found]
    if is_grid and not mistakes:
        refuse_missing(missing)
    mistakes.raise_if_any()
    return Configuration(values=found, missing=missing)


def refuse_missing(missing: Sequence[str]) -> None:
    """Raise SpecError if a configuration of a grid study misses a parameter."""
    if missing:
        raise SpecError(f"{', '.join(missing)}: missing; a grid chooses no single values, so give all of them")


def _of_another_branch(tree: Tree, path: str, name: str, branch: str, found: Mapping[str, Any]) -> str:
    taken = found.get(name, dict(constants(tree)).get(name))
    why = f"is searched only with {name} = {branch!r}"
    if taken is None:
        return f"{path}: {why}, which is not given; add {name}={branch}"
    return f"{path}: {why}, and {name} is {taken!r}; leave it out"


def _refuse_unless_constant(tree: Tree, known: Mapping[str, Parameter], path: str, value: Any) -> None:
    fixed = dict(constants(tree))
    if path not in fixed:
        raise SpecError(f"{path}: the study does not search it{meant(path, known)}")
    readings = _readings(value)
    if not any(_same(fixed[path], one) for one in readings):
        raise SpecError(
            f"{path} = {shown(readings[0])}: the study does not search it, it is always {shown(fixed[path])}; "
            "leave it out"
        )


def why_left(tree: Tree, path: str, value: Any) -> str:
    """Return why a value of a pinned config cannot be taken, "" if it is the space's own constant."""
    fixed = dict(constants(tree))
    if path not in fixed:
        return f"{path} = {shown(value)}: the study has no such value"
    return "" if _same(fixed[path], value) else f"{path} = {shown(value)}: here it is {shown(fixed[path])}"


def meant(path: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the parameter that was probably meant, else ' (known: ...)'."""
    known = [*known]
    ending = [one for one in known if one.rpartition(".")[2] == path.rpartition(".")[2]]
    if len(ending) == 1 and closest(path, known) is None:
        return f" (did you mean {ending[0]!r}?)"
    return nearest(path, ending or known)


def _reached(tree: Tree, found: Mapping[str, Any]) -> dict[str, Parameter]:
    """Return the parameters that are searched with these values. Where a part's name is open, none of its branches counts."""
    reached: dict[str, Parameter] = {}

    def pick(path: str, parameter: Parameter) -> Any:
        reached[path] = parameter
        return found.get(path, parameter)

    space.pin(tree, pick)
    return reached


def _branches(
    tree: Mapping[str, Any], path: str = "", inside: tuple[str, str] = ("", "")
) -> dict[str, tuple[str, str]]:
    """Return, for each parameter inside a branch, the path of the name that decides it, and the branch."""
    found: dict[str, tuple[str, str]] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            found |= _branches(value, here, (f"{path}.name" if path else "name", key) if "name" in tree else inside)
        elif inside[0]:
            found[here] = inside
    return found


def constants(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) for all constants of a space, in all branches."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from constants(value, here)
        elif not isinstance(value, Range | Choices):
            yield here, value


# --- one value --------------------------------------------------------------------------------------------------------


def legal(parameter: Parameter, path: str, value: Any) -> Any:
    """Return a value as its parameter has it. Raises SpecError that names the nearest legal value."""
    if isinstance(parameter, Choices):
        return _choice(parameter, path, value)
    return _number(parameter, path, value.value if isinstance(value, Written) else value)


def _number(parameter: Range, path: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"{path} = {shown(value)}: is not a number of {parameter}")
    best = _nearest(parameter, value)
    if abs(value - best) > (0 if parameter.integer else STEP_TOLERANCE * (parameter.step or 0)):
        raise SpecError(f"{path} = {shown(value)}: is not in {parameter}; the nearest legal value is {best!r}")
    return best if parameter.integer else float(value)


def _nearest(parameter: Range, value: float) -> float:
    """Return the value of a range that is nearest to a number."""
    inside = min(max(value, parameter.low), parameter.high)
    if parameter.step is None and not parameter.integer:
        return float(inside)
    step = parameter.step or 1
    best = min(parameter.low + round((inside - parameter.low) / step) * step, parameter.high)
    return int(best) if parameter.integer else float(best)


def _choice(parameter: Choices, path: str, value: Any) -> Any:
    readings = _readings(value)
    for one in readings:
        for option in parameter.options:
            if _same(option, one):
                return option
    best = _nearest_choice(parameter.options, readings[0])
    mend = "" if best is None else f"; the nearest legal value is {shown(best)}"
    raise SpecError(f"{path} = {shown(readings[0])}: is none of the choices {shown(list(parameter.options))}{mend}")


def _readings(value: Any) -> list[Any]:
    """Return what a value may mean. A text may be a list's, as Optuna stores it."""
    if isinstance(value, Written):
        return [value.value, str(value), *([None] if value in NONE else [])]
    return [value, Written(value).value] if isinstance(value, str) else [value]


def _nearest_choice(options: Iterable[Any], value: Any) -> Any:
    """Return the choice that is nearest to a number, or closest to a text; None if no choice is."""
    if _is_number(value):
        numbers = [option for option in options if _is_number(option)]
        return min(numbers, key=lambda option: abs(option - value), default=None)
    texts = {str(option): option for option in options}
    found = closest(str(value), texts)
    return None if found is None else texts[found]


def _same(option: Any, value: Any) -> bool:
    """Return whether a value is this option. 1 and 1.0 are the same, True is another."""
    if _is_number(option) and _is_number(value):
        return bool(option == value)
    return json.dumps(option, default=repr) == json.dumps(value, default=repr)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
