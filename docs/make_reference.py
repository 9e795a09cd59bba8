"""The reference page: every name that a study file may hold, read off the dicts, signatures and tables themselves.

`make reference` writes docs/reference.md; a test holds it against this.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import enum
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import annotated_types as at
import pydantic
from pydantic.fields import FieldInfo

from hpo.final.after.steps import GIVEN, STEPS
from hpo.spec import options
from hpo.spec.options import Function
from hpo.spec.study_file import StudySpec
from hpo.spec.training import OPTIONAL, SECTIONS, TrainConfig
from hpo.strategy.pruners import PRUNERS
from hpo.strategy.samplers import SAMPLERS
from hpo.train.build.registry import KINDS, UNSEARCHED, PartKind

REGENERATE = "make reference"
NAMES = {float: "float", int: "int", str: "string", bool: "true or false", dict: "table", Any: "any value"}
LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable)
BOUNDS = {at.Gt: (">", "gt"), at.Ge: (">=", "ge"), at.Lt: ("<", "lt"), at.Le: ("<=", "le")}
ARGUMENT = re.compile(r" {4}(?P<name>\w+): (?P<text>.+)")  # a line with which a docstring begins on an argument
#: parts of a study that are no part of a training: their functions, and how many arguments those get from us
OF_THE_STUDY: dict[str, tuple[Mapping[str, Function], int]] = {"sampler": (SAMPLERS, 1), "pruner": (PRUNERS, 0)}
HEAD = f"""# Reference

All names of a study file with their options: default, type, bounds and meaning. `{REGENERATE}` makes this page from the code,
so edits are lost. In the sections {", ".join(section for section in SECTIONS if section not in UNSEARCHED)} each value may be
a constant, a range or choices. The sections {" and ".join(UNSEARCHED)} take constants only.
[Study file](study-file.md) explains the grammar.
"""


def page() -> str:
    """Return the page, in Markdown."""
    sections = {name: _section(name) for name in StudySpec.model_fields}
    found = {name: lines for name, lines in sections.items() if lines}
    links = ", ".join(f"[{name}](#{name})" for name in ["study", *found, "after"])
    lines = [
        HEAD,
        f"Sections: {links}.",
        *["", "## study", "", "Keys before the first section.", "", *_settings(set(found))],
    ]
    for name, of_section in found.items():
        lines += ["", f"## {name}", "", *of_section]
    lines += ["", "## after", "", "Steps of `hpo after FOLDER STEP...`. They are not part of a study file.", ""]
    return "\n".join([*lines, *_entries(STEPS, GIVEN)]) + "\n"


def _section(name: str) -> list[str]:
    """Return what stands under a section's heading; nothing if a key of this name is no section."""
    if name in KINDS:
        return [_of_a_part(name), "", *_shared(KINDS[name]), *_entries(_functions(KINDS[name]), KINDS[name].given)]
    if name in OF_THE_STUDY:
        return [f"One of these, as `{name}.name`.", "", *_entries(*OF_THE_STUDY[name])]
    table = _table(TrainConfig.model_fields[name] if name in TrainConfig.model_fields else StudySpec.model_fields[name])
    if table is None:
        return []
    inner = {key: one for key, field in table.model_fields.items() if (one := _table(field)) and _is_section(one)}
    lines = [f"{_first_paragraph(table)}{_left_out(name)}", "", *_lines(table, _docs(table), left_out=set(inner))]
    for key, one in inner.items():
        lines += ["", f"#### {name}.{key}", "", *(_fields(one) or ["No keys."])]
    return lines


def _functions(kind: PartKind) -> dict[str, Function]:
    """Return the functions of a kind, and one of each library."""
    return {**kind.functions, **{f"{library}:NAME": of("NAME") for library, (of, _) in kind.libraries.items()}}


def _is_section(table: type[pydantic.BaseModel]) -> bool:
    return (table.__doc__ or "").startswith("The section [")


def _of_a_part(name: str) -> str:
    return f'One of these, as `{name}.name`, or your own as `"module:function"`.{_left_out(name)}'


def _left_out(name: str) -> str:
    return " Optional." if name in OPTIONAL else ""


def _shared(kind: PartKind) -> list[str]:
    """Return the options that every part of a kind takes: those of any other function that the kind has."""
    others = [
        getattr(kind, field.name)
        for field in dataclasses.fields(kind)
        if field.name not in ("functions", "returns", "libraries")
    ]
    lines = [line for one in others if inspect.isroutine(one) for line in _option_lines(one, _positional(one))]
    return ["Options of each:", "", *lines, ""] if lines else []


def _positional(function: Function) -> int:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def _entries(functions: Mapping[str, Function], given: int) -> list[str]:
    lines: list[str] = []
    for name, function in functions.items():
        lines += [f"### {name}", "", *_prose(function)]
        found = _option_lines(function, given)
        lines += [*found, ""] if found else []
    return lines[:-1]


def _option_lines(function: Function, given: int) -> list[str]:
    shared = options.shared_keys(function)
    docs = (_docs_of_keys(shared) if shared else {}) | _docs_of_arguments(function)
    return list(_lines(options.model_of(function, given), docs))


def _fields(table: type[pydantic.BaseModel]) -> list[str]:
    return list(_lines(table, _docs(table)))


def _settings(sections: set[str]) -> list[str]:
    """Return the keys of a study that are no sections."""
    return list(_lines(StudySpec, _docs(StudySpec), left_out=sections))


def _lines(model: type[pydantic.BaseModel], docs: Mapping[str, str], left_out: set[str] | None = None) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name in (left_out or ()):
            continue
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        given = f" = {default_text(default)}" if default is not None else ""
        needed = ", required" if field.is_required() else ""
        meaning = f". {docs[name]}" if name in docs else ""
        yield f"- `{name}{given}`: {field_text(field)}{needed}{meaning}"


def _table(field: pydantic.fields.FieldInfo) -> type[pydantic.BaseModel] | None:
    """Return the model of a field that is a table of its own, if it is one."""
    for one in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(one, type) and issubclass(one, pydantic.BaseModel):
            return one
    return None


def _docs(table: type[pydantic.BaseModel]) -> dict[str, str]:
    """Return the strings that stand below the fields of a class and of those it comes from."""
    found: dict[str, str] = {}
    for owner in reversed(table.__mro__):
        if issubclass(owner, pydantic.BaseModel) and owner is not pydantic.BaseModel:
            found |= _strings_below(_written(owner))
    return found


def _docs_of_keys(keys: type) -> dict[str, str]:
    """Return the strings that stand below the keys of a TypedDict and of those it is made of, which it has forgotten."""
    written, known = _written(keys), vars(sys.modules[keys.__module__])
    bases = [known[base.id] for base in written.bases if isinstance(base, ast.Name) and base.id in known]
    found: dict[str, str] = {}
    for base in filter(typing.is_typeddict, bases):
        found |= _docs_of_keys(base)
    return found | _strings_below(written)


def _docs_of_arguments(function: Function) -> dict[str, str]:
    """Return what a function's docstring says of its arguments, each beginning on a line of its own under `Args:`."""
    _, _, arguments = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    found: dict[str, str] = {}
    name = ""
    for line in arguments.split("\n\n")[0].splitlines():
        if begun := ARGUMENT.fullmatch(line):
            name, found[begun["name"]] = begun["name"], begun["text"]
        elif name:
            found[name] += f" {line.strip()}"
    return {name: f"{text[:1].upper()}{text[1:]}" for name, text in found.items()}


def _written(owner: type) -> ast.ClassDef:
    (written,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(written, ast.ClassDef)
    return written


def _strings_below(written: ast.ClassDef) -> dict[str, str]:
    found = {}
    for field, below in zip(written.body, written.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value) if isinstance(below.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).split())
    return {name: text for name, text in found.items() if text}


def _prose(function: Function) -> list[str]:
    """Return what a function's docstring says before its arguments, a paragraph a line, with an empty line behind each."""
    _, *others = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")[0].split("\n\n")
    paragraphs = [_first_paragraph(function), *(" ".join(text.split()) for text in others)]
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _first_paragraph(documented: Any) -> str:
    """Return the first paragraph of a docstring in one line; ValueError if there is none."""
    text = inspect.getdoc(documented)
    if not text:
        raise ValueError(f"{documented.__name__}: has no docstring for the reference; write one")
    return " ".join(text.split("\n\n")[0].split())


# --- types as TOML writes them -----------------------------------------------------------------------------------------


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


def main() -> None:
    """Write the page to the file that the command line names."""
    Path(sys.argv[1]).write_text(page())


if __name__ == "__main__":
    main()
