"""What is printed: foreign text made safe to show, and words quoted to be pasted into a shell.

Foreign is what files, databases, drivers, command lines and code of the user's own say. A terminal obeys some characters of
it, others hide or reorder what stands beside them, and a newline makes a line that looks like ours. `say`, `say_command` and
`say_page` are the only ways to the terminal, beside the live view. tests/cases/test_terminal_escapes.py holds every module
to that.
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

LONGEST_NAME = 200  # characters of a name or a value, where it is shown
LONGEST_TEXT = 500  # characters of a message or a path
LONGEST_LINE = 2000  # characters of a line
LONGEST_WORD = 500  # characters of a word to be pasted


def safe(foreign: object, longest: int = LONGEST_LINE) -> str:
    """Return text as one line that a terminal only shows: other characters as Python escapes them, `\\x1b` or `\\n`.

    What is longer than `longest` loses its middle.
    """
    text = _escaped(str(foreign))
    if len(text) <= longest:
        return text
    mark = f"…({len(text)} characters)…"
    tail = (longest - len(mark)) // 3
    return text[: longest - len(mark) - tail] + mark + text[-tail:]


def short(foreign: object) -> str:
    """Return a name or a value of somebody else's, short enough to stand among other things."""
    return safe(foreign, LONGEST_NAME)


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(character if _is_plain(character) else repr(character)[1:-1] for character in text)


def _is_plain(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # a space of some width


def all_safe(value: Shown) -> Shown:
    """Return a value with every text in it made safe, in dataclasses, mappings, lists, tuples and sets too; names are kept
    short.
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
    """Return lines as one text, each made safe: a newline within one of them is foreign."""
    return "\n".join(map(safe, lines))


def say(line: object, *, to: IO[str] | None = None) -> None:
    """Print one line, made safe.

    Args:
        to: another stream than standard output.
    """
    say_page(safe(line), to=to)


def say_command(before: object, command: str, after: object = "", *, to: IO[str] | None = None) -> None:
    """Print a command to be pasted, of words that are quoted, whole and on one line with what stands around it."""
    say_page(f"{safe(before)}{command}{safe(after)}", to=to)


def say_page(text: str, *, to: IO[str] | None = None) -> None:
    """Print lines as `page` makes them; a stream with another encoding gets escapes for what it cannot write."""
    stream = to or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = "\n".join(map(_escaped, text.split("\n"))).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)


def say_json(value: object) -> None:
    """Print a value as one line of JSON: ASCII alone, and no control character."""
    print(json.dumps(value).replace("\x7f", "\\u007f"), flush=True)


def traceback_page(error: BaseException) -> str:
    """Return an exception's traceback; all but its head is indented, whatever lines the exception's text has."""
    head, *rest = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    return page([head, *(f"  {line}" for line in rest)])


class Formatter(logging.Formatter):
    """Log lines made safe: a record is one line, and its traceback is indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return safe(super().formatMessage(record))

    def formatException(
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        return page(f"    {line}" for line in super().formatException(ei).split("\n"))


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning in one line, made safe; with the arguments of `warnings.formatwarning`."""
    del line
    return safe(f"{filename}:{lineno}: {category.__name__}: {message}") + "\n"


# --- to be pasted -----------------------------------------------------------------------------------------------------


def quoted(word: object) -> str:
    """Return a word as a shell reads it, in bash's $'...' where it holds what cannot be shown.

    One that is too long to be shown, or that no shell can pass on, has that told in its place, which names nothing.
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
        encoded = os.fsencode(character)  # a file's name in another encoding comes back as its bytes
    except UnicodeEncodeError:
        encoded = character.encode("utf-8", "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in encoded)


def command(verb: str, *words: object, options: str = "") -> str:
    """Return `hpo VERB WORDS OPTIONS` to be pasted into a shell; a word that starts with a dash goes last, behind `--`.

    Args:
        options: quoted already.
    """
    given = " ".join(map(quoted, words))
    is_option = any(str(word).startswith("-") for word in words)
    parts = ["hpo", verb, options, "--", given] if is_option else ["hpo", verb, given, options]
    return " ".join(part for part in parts if part)


def options(**values: Any) -> str:
    """Return `--key value` for each value that is given, quoted."""
    return " ".join(f"--{key} {quoted(value)}" for key, value in values.items() if value is not None)
