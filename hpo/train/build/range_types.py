"""The number type of a range or choice: the annotated type of its option decides, not the notation of its ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pydantic

from hpo.errors import Mistakes, SpecError
from hpo.spec import options, space
from hpo.spec.space import Choices, Parameter, Range, Tree

#: Maps a section and a part's name to the pydantic model of the part's options.
ModelOf = Callable[[str, str], type[pydantic.BaseModel]]


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """A parameter of the space, and the number types that the parts accept for it."""

    tables: tuple[str, ...]  # the section, and the branch if the parameter is in one
    key: str
    parameter: Parameter
    types: dict[str, set[type]]  # `options.number_types` by the part's name

    def first(self, *types: type) -> str | None:
        """Return the first part that accepts exactly these types; None if there is none."""
        return next((name for name, found in self.types.items() if found == set(types)), None)

    def __str__(self) -> str:
        return f"{'.'.join((*self.tables, self.key))} = {self.parameter}"


def _searched(tree: Tree, model_of: ModelOf) -> Iterator[_Searched]:
    for section, table in tree.items():
        names = space.ends_of(table.get("name", section))
        yield from _of_table((section,), table, names, model_of)
        for branch, inner in space.branches(table).items():
            yield from _of_table((section, branch), inner, [branch], model_of)


def _of_table(tables: tuple[str, ...], table: Tree, names: list[str], model_of: ModelOf) -> Iterator[_Searched]:
    for key, value in table.items():
        if isinstance(value, Range | Choices):
            numbers = [end for end in value.ends() if isinstance(end, int | float) and not isinstance(end, bool)]
            types = {name: options.number_types(model_of(tables[0], name), key, numbers) for name in names}
            yield _Searched(tables=tables, key=key, parameter=value, types=types)


def typed(tree: Tree, model_of: ModelOf) -> Tree:
    """Return the tree with real numbers in each range and choice of a real option; SpecError for ambiguous ranges."""
    found: Tree = {
        section: {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
        for section, table in tree.items()
    }
    mistakes = Mistakes()
    for one in _searched(tree, model_of):
        if all(types == {float} for types in one.types.values()):
            table = found
            for name in one.tables:
                table = table[name]
            table[one.key] = one.parameter.real
        elif isinstance(one.parameter, Range) and (said := _mistake(one, one.parameter)):
            mistakes.add(SpecError(f"{one}: {said}"))
    mistakes.raise_if_any()
    return found


def _mistake(one: _Searched, given: Range) -> str | None:
    """Return why a range may mean integers or real numbers, and how to write both; None if it is clear."""
    if not given.integer:
        return None
    counting, real, both, silent = one.first(int), one.first(float), one.first(int, float), one.first()
    if both:
        return (
            f"may mean integers or real numbers, since {both} takes both; write {given.real} for real numbers, "
            "{ choices = [...] } for integers"
        )
    if real and counting:
        return f"{counting} takes integers there, {real} real numbers; {_apart(one, counting, real)}"
    if real and silent:
        return (
            f"may mean integers or real numbers: {real} takes real numbers there, {silent} does not say; annotate "
            f"{one.key}, write {given.real} for real numbers, or {_apart(one, silent, real)}"
        )
    return None


def _apart(one: _Searched, *names: str) -> str:
    return "give each its own range, in " + " and ".join(f'[{one.tables[0]}."{name}"]' for name in names)


def untyped(tree: Tree, model_of: ModelOf) -> Iterator[str]:
    """Yield a line for each range with whole ends whose option has no annotated number type in some part."""
    for one in _searched(tree, model_of):
        silent, given = one.first(), one.parameter
        if silent is not None and isinstance(given, Range) and given.has_whole_ends:
            searched = "integers, as its ends are" if given.integer else "real numbers, as its step is"
            yield (
                f"{one}: is searched over {searched}, since {silent} does not say of what type {one.key} is; "
                f"annotate it, or write {given.real} for real numbers"
            )
