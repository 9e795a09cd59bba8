"""How the type, the bounds and the default of an option read to somebody who writes TOML."""

from __future__ import annotations

import collections.abc
import enum
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import annotated_types as at
import pydantic
from pydantic.fields import FieldInfo

NAMES = {float: "float", int: "int", str: "string", bool: "true or false", dict: "table", Any: "any value"}
LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
BOUNDS = {at.Gt: (">", "gt"), at.Ge: (">=", "ge"), at.Lt: ("<", "lt"), at.Le: ("<=", "le")}


def field_text(field: FieldInfo) -> str:
    """Return the type and bounds of a pydantic field."""
    return type_text(field.annotation, field.metadata)


def type_text(kind: Any, metadata: Iterable[Any] = ()) -> str:
    """Return a type as words: `float > 0, < 1`, `"relu" or "gelu"`, `list of int > 0`; None is not named."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    bounds = _bounds(metadata)
    if origin is typing.Annotated:
        return type_text(inner[0], [*inner[1:], *metadata])
    if origin is typing.Literal:
        return _either(default_text(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return _either(type_text(one, metadata) for one in inner if one is not type(None))
    if origin in LISTS or kind in LISTS:
        of = next((one for one in inner if one is not Ellipsis), Any)
        return f"list of {type_text(of)}{bounds}" if of is not Any else f"list{bounds}"
    if origin is not None and issubclass(origin, collections.abc.Mapping):
        return f"table of {type_text(inner[1])}{bounds}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _either(default_text(one.value) for one in kind)
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return f"table of {', '.join(f'`{name}`' for name in kind.model_fields)}"
    return NAMES.get(kind, getattr(kind, "__name__", str(kind))) + bounds


def _either(alternatives: Iterable[str]) -> str:
    found = list(dict.fromkeys(alternatives))
    return " or ".join([", ".join(found[:-1]), found[-1]] if found[1:] else found)


def _bounds(metadata: Iterable[Any]) -> str:
    """Return ` > 0, <= 1` for what annotated_types or pydantic say of a value; what is neither is left out."""
    told: list[str] = []
    for one in _flat(metadata):
        if type(one) in BOUNDS:
            sign, attribute = BOUNDS[type(one)]
            told.append(f"{sign} {getattr(one, attribute)}")
        elif isinstance(one, at.MultipleOf):
            told.append(f"in steps of {one.multiple_of}")
        elif isinstance(one, at.MinLen) and one.min_length:
            told.append(f"at least {one.min_length} long")
        elif isinstance(one, at.MaxLen):
            told.append(f"at most {one.max_length} long")
    return f" {', '.join(told)}" if told else ""


def _flat(metadata: Iterable[Any]) -> Iterable[Any]:
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from _flat(one.metadata)
        elif isinstance(one, at.GroupedMetadata):
            yield from _flat(one)
        else:
            yield one


def default_text(value: Any) -> str:
    """Return a value as TOML has it."""
    if isinstance(value, pydantic.BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {default_text(one)}" for key, one in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(default_text, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
