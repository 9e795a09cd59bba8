"""Which changes of a file of code count as changes."""

from __future__ import annotations

import warnings

import pytest

from hpo.spec import syntax

CODE = """
import math

class Net:
    '''Words.'''
    size = 0x10
    def f(self, a, *, b=None):
        '''Words.'''
        return f"{a!r:>{b}}" + u"x"

def objective(trial):
    x = trial.suggest_float("x", -1.0, 1)  # a comment
    return math.sin(x) if x else None
"""


def changed(before: str, after: str) -> str:
    assert before in CODE
    return CODE.replace(before, after, 1)


@pytest.mark.parametrize(
    "code",
    [
        changed("  # a comment", ""),
        changed("import math", "# first\n\n\nimport math"),
        changed("'''Words.'''", "'''Other words.'''"),
        changed("    '''Words.'''\n", ""),
        f"'''What it is for.'''\n{CODE}",
        changed("0x10", "16"),
        changed('"x", -1.0, 1', "'x',\n        -1.0,\n        1,\n    "),
        CODE.replace("\n", "\r\n"),
    ],
)
def test_comments_docstrings_and_layout_are_no_changes(code: str) -> None:
    assert code != CODE
    assert syntax.digest(code.encode()) == syntax.digest(CODE.encode())


@pytest.mark.parametrize(
    "code",
    [
        changed("-1.0, 1", "-1.0, 1.0"),
        changed("-1.0, 1", "-1.0, True"),
        changed("-1.0, 1", "-1.0, 1, None"),
        changed("-1.0, 1", "1, -1.0"),
        changed("else None", "else 0"),
        changed("math.sin(x)", "math.cos(x)"),
        changed("math.sin(x)", "'math.sin(x)'"),
        changed("b=None", "b"),
        changed("*, b", "b"),
        changed("!r:", "!s:"),
        changed("size = 0x10", "size: 0x10"),
        changed("    size = 0x10\n    def f", "    size = 0x10\ndef f"),
    ],
)
def test_all_else_is_a_change(code: str) -> None:
    assert syntax.digest(code.encode()) != syntax.digest(CODE.encode())


def test_each_version_of_python_comes_to_the_same() -> None:
    """Workers of one study may have different versions."""
    assert syntax.digest(CODE.encode()).hex() == "05bf85d0f25ec646751c0333d01865f90dbd6133c6d2e1470f8dcccb7859a150"


def test_what_is_no_python_is_compared_as_it_is() -> None:
    assert syntax.digest(b"\x80\x02}q\x00.") != syntax.digest(b"\x80\x02}q\x00. ")
    assert syntax.digest(b"def f(:") != syntax.digest(b"def f(: # words")


def test_warnings_on_code_change_nothing() -> None:
    """Users may turn warnings into errors. `"\\d"` has an escape that Python warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert syntax.digest(b'x = "\\d"') == syntax.digest(b'x = "\\d"  # words')


def test_long_sums_and_long_numbers_have_a_digest() -> None:
    """`ast.dump` fails on both."""
    for start, part in ((b"x = 1", b" + 1"), (b"x = 0x1", b"f")):
        assert syntax.digest(start + 2000 * part) != syntax.digest(start + 2001 * part)
        assert syntax.digest(start + 9000 * part) != syntax.digest(start + 9001 * part)
