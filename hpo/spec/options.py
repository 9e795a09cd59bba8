"""Options of parts that are chosen by name: read from a function's signature, checked by pydantic.

A part is a function. `hpo` passes its first parameters; all others are options of the study file. The annotation of an option
gives its type and bounds, its default makes it optional. So a new part needs one function and nothing else. Options that
several functions share are keys of a TypedDict: `**options: Unpack[Shared]`.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Literal

import pydantic

from hpo.errors import SpecError, closest, nearest, shown

Function = Callable[..., Any]
# Names that pydantic puts into an error's location for one type of a union.
_ALTERNATIVE = re.compile(
    r"(literal|list|tuple|set|dict|union|nullable)\[|constrained-|function-|(str|int|float|bool|none)$"
)
#: pydantic's error type -> our words for the wanted type
WANTED = {
    "string_type": "text in quotes",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "sequence_str": "a list",
}
TABLE_ERRORS = {"dict_type", "model_type", "model_attributes_type"}  # pydantic's names


@cache  # a file's values are checked many times, and building a model takes longer than a check
def model_of(function: Function, given: int, common: Function | None = None) -> type[pydantic.BaseModel]:
    """Return the pydantic model of a function's options.

    Args:
        function: the part's function.
        given: the number of leading parameters that are not options.
        common: a function with one leading parameter, whose options belong to every part of the section. The part's own
            options win over options of the same name.
    """
    fields, extra = _fields(function, given)
    if common is not None:
        fields = {**_fields(common, 1)[0], **fields}
    config = pydantic.ConfigDict(extra=extra, strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # an option may be named "copy" or "json", like a method of pydantic
        return pydantic.create_model(getattr(function, "__name__", "options"), __config__=config, **fields)


@cache  # without it, reading the annotations of a trial's parts took as long as an epoch of a small model
def _fields(function: Function, given: int) -> tuple[Mapping[str, Any], Literal["allow", "forbid"]]:
    """Return a function's options as pydantic fields, and whether untyped `**` allows any other option."""
    hints = _hints(_annotated(function))
    listed = list(inspect.signature(function).parameters.values())
    _check_leading(listed, given)
    fields: dict[str, Any] = {}
    extra: Literal["allow", "forbid"] = "forbid"
    stars = [index for index, parameter in enumerate(listed[:given]) if parameter.kind is parameter.VAR_POSITIONAL]
    for parameter in listed[stars[0] + 1 if stars else given :]:
        if parameter.kind is parameter.VAR_KEYWORD:
            keys = _unpacked(hints.get(parameter.name))
            fields |= _fields_of(keys) if keys else {}
            extra = "forbid" if keys else "allow"
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (hints.get(parameter.name, Any), default)
    return fields, extra


def marked(function: Function, given: int, mark: str) -> set[str]:
    """Return the names of the options that have this string in their `Annotated` metadata."""
    fields, _ = _fields(function, given)
    return {name for name, (hint, _) in fields.items() if mark in getattr(hint, "__metadata__", ())}


def _annotated(function: Function) -> Function:
    """Return the function that holds the annotations of a function, class, partial or callable object."""
    if isinstance(function, functools.partial):
        return _annotated(function.func)
    if inspect.isclass(function):
        return function.__init__
    return function if inspect.isroutine(function) else type(function).__call__


def _hints(target: Function) -> dict[str, Any]:
    """Return the types of a function's parameters. The return type is left out: it may be imported for type checkers only."""
    annotations = {name: hint for name, hint in inspect.get_annotations(target).items() if name != "return"}
    known = getattr(inspect.unwrap(target), "__globals__", {})
    return typing.get_type_hints(
        types.SimpleNamespace(__annotations__=annotations), globalns=known, include_extras=True
    )


def shared_keys(function: Function) -> Any:
    """Return the TypedDict of a function's `**options: Unpack[SomeTypedDict]`, None without one."""
    hints = _hints(_annotated(function))
    stars = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    return _unpacked(hints.get(stars[0])) if stars else None


def _unpacked(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Unpack else None


def _fields_of(keys: Any) -> dict[str, Any]:
    """Return the keys of a TypedDict as pydantic fields. An optional key gets None; its real default is in the function."""
    hints = typing.get_type_hints(keys, include_extras=True)
    return {name: (_bare(hint), ... if name in keys.__required_keys__ else None) for name, hint in hints.items()}


def _bare(hint: Any) -> Any:
    wrapped = typing.get_origin(hint) in (typing.Required, typing.NotRequired)
    return typing.get_args(hint)[0] if wrapped else hint


def _check_leading(listed: list[inspect.Parameter], given: int) -> None:
    """Raise TypeError if the function cannot take all leading arguments by position."""
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in listed[: given + 1]):
        return
    by_position = [p for p in listed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_position) < given:
        raise TypeError(f"it takes {len(by_position)} positional arguments, but hpo passes {given} before the options")


def check(
    section: str,
    name: str,
    function: Function,
    given: int,
    options: Mapping[str, Any],
    paths: Mapping[str, str],
    common: Function | None = None,
    gives: str = "",
) -> None:
    """Raise SpecError if a part does not accept these options.

    Args:
        section: the section of the study file, for the message.
        name: the name of the part, for the message.
        function: the part's function.
        given: the number of leading parameters that are not options.
        options: the values to check.
        paths: the dotted path of each option in the file, for the message.
        common: a function whose options belong to every part of the section.
        gives: the leading arguments in words, for the message.
    """
    owner = f"{section} {name}"
    try:
        model = model_of(function, given, common)
    except Exception as error:  # reading the user's own annotations may raise anything
        said = f"{type(error).__name__}: {error}{passed_first(gives)}"
        raise SpecError(f"{owner}: its parameters cannot be read: {said}") from error
    paths = {key: f"{section}.{key}" for key in model.model_fields} | dict(paths)
    try:
        model.model_validate(dict(options))
    except pydantic.ValidationError as error:
        leading = list(inspect.signature(function).parameters)[:given]
        lines = explain(error, paths, owner, model, dict.fromkeys(leading, passed_first(gives)))
        raise SpecError(*lines) from None


def passed_first(gives: str) -> str:
    """Return '; hpo calls it with ...' for the leading arguments of a part in words, "" for none."""
    return gives and f"; hpo calls it with {gives} before its options"


def explain(
    error: pydantic.ValidationError,
    paths: Mapping[str, str],
    owner: str,
    model: type[pydantic.BaseModel],
    leading: Mapping[str, str] = types.MappingProxyType({}),
) -> list[str]:
    """Return one line for each error of pydantic: path, value and what is allowed.

    A needed option that was misspelt has one line, the one on the misspelt key.

    Args:
        error: pydantic's errors.
        paths: the dotted path of each option in the file.
        owner: the part or section.
        model: what pydantic has checked against.
        leading: the names of a part's arguments that are not options, each with what the message then adds.
    """
    lines = []
    unknown = [
        str(one["loc"][0]) for one in error.errors() if one["type"] == "extra_forbidden" and len(one["loc"]) == 1
    ]
    meant = {closest(key, model.model_fields) for key in unknown}
    for found in error.errors():
        key, *inside = map(str, found["loc"] or [""])
        inside = [step for step in inside if not _ALTERNATIVE.match(step)]
        path = ".".join([paths.get(key, key), *inside])
        if found["type"] == "extra_forbidden" and inside:  # in a section that is a model itself
            section: typing.Any = model
            for step in (key, *inside[:-1]):
                is_list = typing.get_origin(section) is list  # and the step is an index
                section = typing.get_args(section)[0] if is_list else section.model_fields[step].annotation
            where = path.rpartition(".")[0]
            lines.append(f"{path}: {where} takes no {inside[-1]!r}{nearest(inside[-1], section.model_fields)}")
        elif found["type"] == "extra_forbidden":
            why = leading.get(key) or nearest(key, model.model_fields)
            lines.append(f"{path}: {owner} takes no {key!r}{why}")
        elif found["type"] == "missing":
            if inside or key not in meant:
                lines.append(f"{path}: {owner} needs {key!r}; add it")
        elif found["type"] in TABLE_ERRORS:
            lines.append(f"{path} = {shown(found['input'])}: is not a table; write its keys under [{path}]")
        else:
            is_list = found.get("ctx", {}).get("class") == "Sequence"
            wanted = "a list" if is_list else WANTED.get(found["type"])
            said = f"input should be {wanted}" if wanted else f"{found['msg'][0].lower()}{found['msg'][1:]}"
            alternative = f"{path} = {shown(found['input'])}: "
            if lines and lines[-1].startswith(alternative):
                lines[-1] += f", or {said.removeprefix('input should ')}"
            else:
                lines.append(alternative + said)
    return lines


def number_types(model: type[pydantic.BaseModel], key: str, numbers: Iterable[float]) -> set[type]:
    """Return the number types, int and float, with which an option's annotation accepts these numbers.

    The set holds both if the annotation names both. It is empty if the annotation names no type or refuses the numbers.
    """
    field = model.model_fields.get(key)
    if field is None or field.annotation in (Any, object):
        return set()
    settings = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(field.rebuild_annotation(), config=settings)
    found = set()
    for number in numbers:
        for said in (int(number), float(number)):
            with suppress(Exception):  # the user's own validators may raise anything; `check` reports wrong values
                found.add(type(adapter.validate_python(said)))
    return found & {int, float}


def names(function: Function, given: int) -> set[str]:
    """Return the names of a function's options."""
    return set(_fields(function, given)[0])


def defaults(function: Function, given: int, common: Function | None = None) -> dict[str, Any]:
    """Return the options whose default is not None, as plain TOML values, those of `common` included."""
    fields = model_of(function, given, common).model_fields
    found = {name: field.default for name, field in fields.items() if not field.is_required()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if isinstance(value, bool | int | float | str | list | tuple)
    }
