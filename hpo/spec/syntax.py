"""The digest of Python source: comments, docstrings and layout do not change it, nor does the version of Python."""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def digest(content: bytes) -> bytes:
    """Return the SHA-256 of a file's syntax tree, or of the file if it is no Python source, such as weights."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the import shows them; turned into errors they would end the parsing
            tree = ast.parse(content)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return hashlib.sha256(content).digest()
    return hashlib.sha256("\n".join(_words(tree)).encode(errors="surrogatepass")).digest()


def _words(tree: ast.Module) -> Iterator[str]:
    """Yield the tree's nodes, fields and values. Each node and list ends with a word of its own.

    `ast.dump` writes a tree in another way with each version of Python. It also recurses, and a long sum is a deep tree.
    """
    left: list[Any] = [tree]
    while left:
        one = left.pop()
        if isinstance(one, _Word):
            yield one
        elif isinstance(one, ast.AST):
            yield type(one).__name__
            left += [_Word(")"), *reversed([part for field in _fields(one) for part in field])]
        elif isinstance(one, list):
            yield "["
            left += [_Word("]"), *reversed(one)]
        else:
            yield hex(one) if type(one) is int else repr(one)  # `repr` refuses very long numbers


class _Word(str):
    """A word that is yielded as it is."""

    __slots__ = ()


def _fields(node: ast.AST) -> Iterator[tuple[_Word, Any]]:
    """Yield name and value of each field that is filled. Empty ones differ between versions of Python."""
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            value = value[1:]
        if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty pieces into an f-string
            value = [one for one in value if not (isinstance(one, ast.Constant) and one.value == "")]
        if value is not None and value != [] and name != "kind":  # the `u` of u"..."
            yield _Word(f".{name}"), value
