"""Safe output to a terminal, and quoting of words for a shell.

Foreign text comes from files, databases, drivers, command lines and user code. It may hold control sequences for the terminal,
characters that hide or reorder others, or newlines that imitate our own lines. `say`, `say_command`, `say_page` and `say_json`
are the only functions that print, beside the live view. tests/cases/test_terminal_escapes.py checks every module.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import traceback
import unicodedata
from collections.abc import Iterable
from types import TracebackType
from typing import IO, Any, TypeVar, cast

Shown = TypeVar("Shown")

LONGEST_NAME = 200  # characters of a shown name or value
LONGEST_TEXT = 500  # characters of a shown message or path
LONGEST_LINE = 2000  # characters of a shown line
LONGEST_WORD = 500  # characters of a word in a command


def safe(foreign: object, longest: int = LONGEST_LINE) -> str:
    """Return text as one printable line. Other characters are escaped as in Python, such as `\\x1b` or `\\n`.

    A text longer than `longest` characters loses its middle.
    """
    text = _escaped(str(foreign))
    if len(text) <= longest:
        return text
    mark = f"…({len(text)} characters)…"
    tail = (longest - len(mark)) // 3
    return text[: longest - len(mark) - tail] + mark + text[-tail:]


def short(foreign: object) -> str:
    """Return foreign text as one printable line of at most LONGEST_NAME characters."""
    return safe(foreign, LONGEST_NAME)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(character if _is_plain(character) else repr(character)[1:-1] for character in text)


def _is_plain(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # a space of any width


def all_safe(value: Shown) -> Shown:
    """Return a value with all its strings made safe, inside dataclasses, dicts, lists, tuples and sets too.

    The keys of dicts, and their values that are strings, are also made short.
    """
    made: Any = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: all_safe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        made = dataclasses.replace(value, **fields)
    elif isinstance(value, dict):
        made = {short(key): short(item) if isinstance(item, str) else all_safe(item) for key, item in value.items()}
    elif isinstance(value, list | tuple | set | frozenset):
        kind: Any = getattr(value, "_make", type(value))  # a named tuple takes its items one by one
        made = kind(map(all_safe, value))
    elif isinstance(value, str):
        made = safe(value, LONGEST_TEXT)
    return cast(Shown, made)


def page(lines: Iterable[str]) -> str:
    """Return lines as one text, each made safe. A newline within a line is escaped."""
    return "\n".join(map(safe, lines))


def say(line: object, *, to: IO[str] | None = None) -> None:
    """Print one line, made safe.

    Args:
        line: the line.
        to: the stream; standard output by default.
    """
    say_page(safe(line), to=to)


def say_command(before: object, command: str, after: object = "", *, to: IO[str] | None = None) -> None:
    """Print a command for the user to paste, uncut, on one line with the text before and after it.

    Args:
        before: foreign text before the command.
        command: the command, already quoted.
        after: foreign text after the command.
        to: the stream; standard output by default.
    """
    say_page(f"{safe(before)}{command}{safe(after)}", to=to)


def say_page(text: str, *, to: IO[str] | None = None) -> None:
    """Print lines as `page` returns them. Characters that the stream's encoding lacks are escaped."""
    stream = to or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = "\n".join(map(_escaped, text.split("\n"))).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)


def say_json(value: object) -> None:
    """Print a value as one line of JSON, in printable ASCII."""
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


def traceback_page(error: BaseException) -> str:
    """Return an exception's traceback. All lines but the first are indented, so the exception's text cannot imitate ours."""
    head, *rest = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    return page([head, *(f"  {line}" for line in rest)])


class Formatter(logging.Formatter):
    """Formats a log record as one safe line, with an indented traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return safe(super().formatMessage(record))

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        return page(f"    {line}" for line in super().formatException(ei).split("\n"))


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning as one safe line. The arguments are those of `warnings.formatwarning`."""
    del line
    return safe(f"{filename}:{lineno}: {category.__name__}: {message}") + "\n"


# --- to be pasted -----------------------------------------------------------------------------------------------------


def quoted(word: object) -> str:
    """Return a word quoted for a shell, in bash's $'...' if it holds unprintable characters.

    A word that is too long, or that holds a null character, is replaced by a placeholder.
    """
    text = str(word)
    if "\0" in text:
        return "NAME_WITH_A_NULL_CHARACTER"
    shown = shlex.quote(text) if text.isprintable() else f"$'{''.join(map(_shell_escaped, text))}'"
    return shown if len(shown) <= LONGEST_WORD else f"NAME_OF_{len(text)}_CHARACTERS"


def _shell_escaped(character: str) -> str:
    if character.isprintable() and character not in "\\'!":
        return character
    try:
        encoded = os.fsencode(character)  # gives back the bytes of a file name in another encoding
    except UnicodeEncodeError:
        encoded = character.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in encoded)


def command(verb: str, *words: object, options: str = "") -> str:
    """Return `hpo VERB WORDS OPTIONS` for a shell. Words that start with a dash come last, after `--`.

    Args:
        verb: the command.
        words: its arguments, quoted here.
        options: its options, already quoted.
    """
    given = " ".join(map(quoted, words))
    is_option = any(str(word).startswith("-") for word in words)
    parts = ["hpo", verb, options, "--", given] if is_option else ["hpo", verb, given, options]
    return " ".join(part for part in parts if part)


def options(**values: Any) -> str:
    """Return `--key value`, quoted, for each value that is not None."""
    return " ".join(f"--{key} {quoted(value)}" for key, value in values.items() if value is not None)
