"""Reading TOML files that people wrote. Any file that cannot be used gives a SpecError with the mend."""

from __future__ import annotations

import codecs
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from hpo.errors import SpecError

MAX_BYTES = 64 * 2**20  # an exported file holds the curves of its trial
MAX_DEPTH = 64  # of nested lists and tables; Python's own limit is some hundreds
INTEGERS = range(-(2**63), 2**63)  # the range of TOML
KINDS = {
    stat.S_IFDIR: "a folder; name the file in it",
    stat.S_IFIFO: "a pipe; write it to a file first",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
OTHER_ENCODINGS = {  # by byte-order mark; UTF-32 first, since its mark begins with the mark of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
ESCAPES = "in \"...\" a backslash begins an escape; write a path in single quotes: 'C:\\data'"


def read(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file; FileNotFoundError if it does not exist, SpecError if it cannot be used."""
    text = read_text(path)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        if path.suffix == ".py":
            mend = f'write a study file that names its function: objective = "{path.name}:FUNCTION"'
            raise SpecError(f"{path}: is Python code, not TOML; {mend}") from None
        raise SpecError(f"{path}: not TOML: {error}{_mend(text, error)}") from None
    except RecursionError:
        raise SpecError(f"{path}: {_too_deep('lists')}") from None
    except ValueError:  # Python refuses integers of more than 4,300 digits
        line = _line_of(text, re.search(r"[\d_]{4300,}", text))
        raise SpecError(f"{path}: the integer in line {line} has thousands of digits; {_of_64_bits()}") from None
    _refuse_extremes(document, path)
    return document


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; FileNotFoundError if it does not exist, SpecError if it is not text.

    A byte-order mark, as editors on Windows write it, is removed.
    """
    try:
        found = path.stat()
        kind = KINDS.get(stat.S_IFMT(found.st_mode))
        if kind:  # reading a pipe may block forever
            raise SpecError(f"{path}: cannot be read: it is {kind}")
        if found.st_size > MAX_BYTES:
            raise SpecError(f"{path}: is larger than {MAX_BYTES // 2**20} MiB; is it the right file?")
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    return _decoded(content, path)


def _decoded(content: bytes, path: Path) -> str:
    for mark, encoding in OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise SpecError(f"{path}: is {encoding}; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise SpecError(f"{path}: is not UTF-8: byte {byte:#x} in line {line}; save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise SpecError(f"{path}: is not text: a zero byte in line {line}; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _mend(text: str, error: tomllib.TOMLDecodeError) -> str:
    """Return the mend for a wrong line with a backslash, such as a Windows path; "" for any other line."""
    found = re.search(r"at line (\d+)", str(error))
    lines = text.splitlines()
    if found is None or not 0 < int(found[1]) <= len(lines):
        return ""
    return f"; {ESCAPES}" if "\\" in lines[int(found[1]) - 1] else ""


def _line_of(text: str, found: re.Match[str] | None) -> int:
    return text.count("\n", 0, found.start() if found else 0) + 1


def _refuse_extremes(document: dict[str, Any], path: Path) -> None:
    """Raise SpecError for too deep nesting and for integers of more than 64 bits."""
    open_values: list[tuple[str, Any, int]] = [("", document, 0)]
    while open_values:
        at, value, depth = open_values.pop()
        if depth > MAX_DEPTH:
            raise SpecError(f"{path}: {at[:60]}...: {_too_deep('tables and lists')}")
        if isinstance(value, dict):
            open_values += [(f"{at}.{key}" if at else key, inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            open_values += [(at, inner, depth + 1) for inner in value if not isinstance(inner, str | bool | float)]
        elif isinstance(value, int) and value not in INTEGERS:
            raise SpecError(f"{path}: {at}: is an integer of {value.bit_length()} bits; {_of_64_bits()}")


def _too_deep(what: str) -> str:
    return f"{what} are nested more than {MAX_DEPTH} deep; a study file needs a handful"


def _of_64_bits() -> str:
    return "write an integer of 64 bits, or text in quotes"
