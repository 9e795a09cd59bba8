"""The options of anything chosen by name: read off the function's signature, checked by pydantic.

A part is a function whose first parameters come from us and whose other parameters are the part's options. Their
annotations say what a study file may write, their defaults what it may leave out, so a new entry is one function.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic

from hpo.errors import SpecError, nearest

Function = Callable[..., Any]


def model_of(function: Function, given: int) -> type[pydantic.BaseModel]:
    """Return the pydantic model of a function's options; `given` is how many leading parameters are not options."""
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target, include_extras=True)
    listed = list(inspect.signature(function).parameters.values())
    fields: dict[str, Any] = {}
    extra: typing.Literal["allow", "forbid"] = "forbid"
    for parameter in listed[given:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (hints.get(parameter.name, Any), default)
    config = pydantic.ConfigDict(extra=extra, strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    return pydantic.create_model(getattr(function, "__name__", "options"), __config__=config, **fields)


def check(function: Function, given: int, options: Mapping[str, Any], paths: Mapping[str, str], owner: str) -> None:
    """Raise SpecError if the function does not take these options.

    Args:
        paths: the dotted path at which each option stands in the file, for the message.
        owner: what the options belong to, such as "optimizer sgd".
    """
    model = model_of(function, given)
    try:
        model.model_validate(dict(options))
    except pydantic.ValidationError as error:
        raise SpecError("\n".join(explain(error, paths, owner, model.model_fields))) from None


def explain(
    error: pydantic.ValidationError, paths: Mapping[str, str], owner: str, known: typing.Iterable[str]
) -> list[str]:
    """Return one line for each thing pydantic found: path, value, what is allowed."""
    lines = []
    for found in error.errors():
        key, *inside = [str(step) for step in found["loc"]] or [""]
        path = ".".join([paths.get(key, key), *inside])
        if found["type"] == "extra_forbidden":
            lines.append(f"{path}: {owner} takes no {key!r}{nearest(key, known)}")
        elif found["type"] == "missing":
            lines.append(f"{path}: {owner} needs {key!r}; add it")
        else:
            lines.append(f"{path} = {found['input']!r}: {found['msg'][0].lower()}{found['msg'][1:]}")
    return lines


def defaults(function: Function, given: int) -> dict[str, Any]:
    """Return the options that have a default other than None, as plain TOML values."""
    fields = model_of(function, given).model_fields
    found = {name: field.default for name, field in fields.items() if not field.is_required()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if isinstance(value, bool | int | float | str | list | tuple)
    }
