"""A study's `command` and its `metric`: the words with their places, and how a value is read from a line of output.

A place is a parameter's name in braces, such as `{lr}` or `--width={model.width}`. `{{` and `}}` stand for braces.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.errors import ProgramError, SpecError, nearest, shown
from hpo.spec import space

#: The variables that each program finds in its environment. Each may also stand in a place, such as `{HPO_SEED}`.
TRIAL, STUDY, SEED, CHECKPOINT_DIR = "HPO_TRIAL", "HPO_STUDY", "HPO_SEED", "HPO_CHECKPOINT_DIR"
VARIABLES = (TRIAL, STUDY, SEED, CHECKPOINT_DIR)
REPORTS = "HPO_REPORTS"  # likewise, for `hpo.report` alone: the file that it writes to
CHANNEL = "HPO_RANK_CHANNEL"  # of a rank that runs a function: the descriptor by which it talks to its worker
PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
JSON = "json:"  # before the key of a value in JSON lines
EPOCH, VALUE = "epoch", "value"  # the groups of a pattern, and the keys of what `hpo.report` writes
MAX_EPOCH = 2**31 - 2
LARGEST_CODE = 2**20  # bytes of a file; a larger one is data
LONGEST_SHOWN = 200  # characters of a line in a message
LONGEST_SEARCHED = 2048  # characters of a line in which a pattern is looked for, since `.*` takes their square
NUMBER = re.compile(r"((?<!\w)-)?(\d+(\.\d+)?|(?<!\w)\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Command:
    """The words of a command, with places for values."""

    words: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Command:
        """Read a command; SpecError for an empty one, and for a brace that is no place."""
        if not words or not words[0].strip():
            raise SpecError(
                f'command = {shown(list(words))}: names no program; write ["python", "train.py", "--lr", "{{lr}}"]'
            )
        for word in words:
            _refuse_braces(word)
        return cls(words=tuple(words))

    @property
    def places(self) -> list[str]:
        """The names in braces, each once."""
        found = (match[1] for word in self.words for match in PARTS.finditer(word) if match[1] is not None)
        return list(dict.fromkeys(found))

    def filled(self, values: Mapping[str, Any]) -> list[str]:
        """Return the words with values in their places."""

        def put(match: re.Match[str]) -> str:
            return match[0][0] if match[1] is None else as_word(values[match[1]])

        return [PARTS.sub(put, word) for word in self.words]

    def check(self, tree: space.Tree) -> None:
        """Raise SpecError for a place without a value in [space], and for a value without a place.

        Args:
            tree: the section [space], with Parameters for ranges and choices.
        """
        known = [name for name, _ in flat(tree)]
        lines = [*_conditional(tree, "space")]
        for place in self.places:
            if place not in known and place not in VARIABLES:
                meant = nearest(place, [*known, *VARIABLES])
                lines.append(
                    f"command: {{{place}}} has no range in [space]{meant}; add {place} = {{ low = ..., high = ... }}"
                )
        for name in known:
            if not NAME.fullmatch(name):
                lines.append(f"space.{shown(name)}: cannot stand in a place; rename it to letters, digits, _ and -")
            elif name not in self.places:
                lines.append(
                    f"space.{name}: has no place in command; write {{{name}}} into one of its words, or remove it"
                )
        if lines:
            raise SpecError(*lines)

    def files(self, folder: Path) -> list[Path]:
        """Return the files in the study file's folder that the command names, such as `train.py`."""
        names = [os.path.relpath(folder / word, folder) for word in self.words if not PARTS.search(word)]
        inside = [folder / name for name in names if os.pardir not in Path(name).parts]
        return [file for file in inside if os.path.isfile(file)]  # Path.is_file raises for a long script

    def code(self, folder: Path) -> list[Path]:
        """Return those of the files that count as the study's code. A file above LARGEST_CODE is data."""
        return [file for file in self.files(folder) if file.stat().st_size <= LARGEST_CODE]

    def refuse_missing(self, folder: Path) -> None:
        """Raise SpecError if the program is not found, or is a file that cannot be run."""
        program = self.words[0]
        if PARTS.search(program) or shutil.which(_beside(program, folder), path=search_path()):
            return
        file = folder / program
        if not file.is_file():
            where = f"in {folder}" if "/" in program else "on PATH"
            raise SpecError(
                f"command = [{shown(program)}, ...]: there is no such program {where}; give its path, or install it"
            )
        if "/" not in program:
            raise SpecError(
                f'command = [{shown(program)}, ...]: is not on PATH; write "./{program}" for the file in {folder}'
            )
        raise SpecError(
            f"command = [{shown(program)}, ...]: may not be run; `chmod +x {file}`, or name its interpreter first"
        )


def _conditional(tree: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield a line for each table that is searched under one choice alone: its places would be empty under the others."""
    for key, table in space.branches(tree).items():
        if isinstance(tree.get("name"), space.Choices):
            yield f"{path}.{key}: has values under one choice of {path}.name alone; a command needs a value for each place"
        yield from _conditional(table, f"{path}.{key}")


def _refuse_braces(word: str) -> None:
    for match in PARTS.finditer(word):
        if match[1] is not None and not NAME.fullmatch(match[1]):
            raise SpecError(
                f"command: {shown(match[0])} in {shown(word)} names no parameter; write {{name}}, or {{{{ and }}}} for braces"
            )
        if match[0] in "{}":
            raise SpecError(f"command: {shown(word)} has a single {match[0]}; write {match[0] * 2} for a brace")


def _beside(program: str, folder: Path) -> str:
    return str(folder / program) if "/" in program else program


def search_path() -> str:
    """Return the PATH of a program: this process's, then the folder of this Python."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])


def as_word(value: Any) -> str:
    """Return a value as a word of a command: numbers as Python writes them, true and false, lists as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, bool | list | dict) else repr(value)


def flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for each leaf of a tree of tables."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from flat(value, here)
        else:
            yield here, value


# --- what it prints ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A value that a program has printed or sent."""

    value: float
    epoch: int | None  # None if the program names no epoch
    line: str  # for messages


@dataclass(frozen=True, kw_only=True)
class PrintedMetric:
    """How a value is read from a line: by a pattern, or by a key of a JSON object."""

    pattern: re.Pattern[str] | None = None
    key: str | None = None

    @classmethod
    def parse(cls, text: str) -> PrintedMetric:
        """Read the key `metric` of a study with a command; "" reads nothing. SpecError for a wrong pattern."""
        if text.startswith(JSON):
            key = text.removeprefix(JSON).strip()
            if not key:
                raise SpecError(f'metric = {shown(text)}: names no key; write "json:val_acc"')
            return cls(key=key)
        if not text:
            return cls()
        said = f"metric = '{text}'"  # as it stands in the file, with single backslashes
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise SpecError(f"{said}: is not a pattern of Python's re: {error}; write it in '...'") from None
        if VALUE not in pattern.groupindex:
            raise SpecError(
                f"{said}: has no group `value`; write 'acc=(?P<value>\\S+)', or \"json:KEY\" for JSON lines"
            )
        for group in pattern.groupindex.keys() - {EPOCH, VALUE}:
            raise SpecError(f"{said}: has a group {group!r}; only `value` and `epoch` are read, so rename it")
        return cls(pattern=pattern)

    def find(self, line: str) -> Reported | None:
        """Return the value in a line, None without one.

        Raises ProgramError for a value or an epoch that is no number, and for a value that is a part of a number.
        """
        if self.pattern is not None:
            match = self.pattern.search(line, 0, LONGEST_SEARCHED)
            found = match.groupdict() if match else {}
            if match:
                _refuse_a_part(match, line)
        elif self.key is not None:
            found = _of_json(line)
            found = {EPOCH: found.get(EPOCH), VALUE: found.get(self.key)}
        else:
            found = {}
        return None if found.get(VALUE) is None else reported(found, line)


def _refuse_a_part(match: re.Match[str], line: str) -> None:
    """Raise ProgramError if the value that a pattern found is only a part of a number, such as 3.2 of 3.2e-05."""
    start, end = match.span(VALUE)
    for number in NUMBER.finditer(line):
        if number.start() <= start < end <= number.end() and number.span() != (start, end):
            raise ProgramError(
                f"the pattern cuts the number {number[0]} to '{match[VALUE]}' in the line {cut(line)!r}; "
                "write (?P<value>\\S+)"
            )


def reported(found: Mapping[str, Any], line: str) -> Reported:
    """Return the value of a line from its parts. Raises ProgramError for one that is no number."""
    value, epoch = found[VALUE], found.get(EPOCH)
    number, place = _number(value), None if epoch is None else _number(epoch)
    if number is None:
        raise ProgramError(
            f"the metric {shown(value)} is not a number, in the line {cut(line)!r}; let `metric` match the number alone"
        )
    if epoch is not None and (place is None or not 0 <= place <= MAX_EPOCH or place % 1):
        raise ProgramError(
            f"the epoch {shown(epoch)} is not a whole number from 0 to {MAX_EPOCH}, in the line {cut(line)!r}"
        )
    return Reported(value=number, epoch=None if place is None else int(place), line=cut(line))


def _number(value: Any) -> float | None:
    """Return a float, None for what is no number or too large for one."""
    with suppress(TypeError, ValueError, OverflowError):
        return None if isinstance(value, bool) else float(value)
    return None


def cut(line: str) -> str:
    """Return a line for a message, cut after LONGEST_SHOWN characters."""
    return line if len(line) <= LONGEST_SHOWN else f"{line[:LONGEST_SHOWN]}..."


def of_report(line: str) -> Reported:
    """Return what `hpo.report` wrote in a line of its file. Raises ProgramError for a line that it did not write."""
    found = _of_json(line)
    if VALUE not in found:
        raise ProgramError(f"{REPORTS}: a line is not of hpo.report: {cut(line)!r}")
    return reported(found, line)


def _of_json(line: str) -> dict[str, Any]:
    line = line.strip()
    if not line.startswith("{"):
        return {}
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
