"""What cannot be an objective, or names none, is told before any trial; what can be one works."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.spec import usercode

WRONG = {
    "class f:\n    def __call__(self, trial): return 1.0\n": (
        "is a class, so a call returns an object; write `objective = f(...)` below it and name that"
    ),
    "async def f(trial): return 1.0\n": (
        "is a coroutine function; name a plain function that returns `asyncio.run(...)` of it"
    ),
    "class C:\n    async def __call__(self, trial): return 1.0\nf = C()\n": (
        "is a coroutine function; name a plain function that returns `asyncio.run(...)` of it"
    ),
    "from functools import partial\nasync def g(trial, d): return 1.0\nf = partial(g, d=1)\n": (
        "is a coroutine function; name a plain function that returns `asyncio.run(...)` of it"
    ),
    "async def f(trial): yield 1.0\n": "yields, so a call returns a generator; return the value instead",
    "def f(trial): yield 1.0\n": "yields, so a call returns a generator; return the value instead",
    "def f(trial, data): return 1.0\n": (
        "takes (trial, data), but is called with the trial alone: missing a required argument: 'data'; "
        "give further arguments a default, or name a functools.partial that sets them"
    ),
    "def f(trial, *, data): return 1.0\n": (
        "takes (trial, *, data), but is called with the trial alone: missing a required argument: 'data'; "
        "give further arguments a default, or name a functools.partial that sets them"
    ),
    "class C:\n    def m(self, trial, fold): return 1.0\nf = C().m\n": (
        "takes (trial, fold), but is called with the trial alone: missing a required argument: 'fold'; "
        "give further arguments a default, or name a functools.partial that sets them"
    ),
    "def f(): return 1.0\n": "takes (), but is called with the trial; write `def f(trial)`",
    "def f(**options): return 1.0\n": "takes (**options), but is called with the trial; write `def f(trial)`",
}
RIGHT = [
    "def f(trial): return trial\n",
    "def f(trial, data=3): return trial\n",
    "def f(*arguments): return arguments[0]\n",
    "f = lambda trial: trial\n",
    "from functools import partial\ndef g(trial, data): return trial\nf = partial(g, data=1)\n",
    "class C:\n    def __call__(self, trial): return trial\nf = C()\n",
    "class C:\n    def m(self, trial): return trial\nf = C().m\n",
    "class C:\n    @staticmethod\n    def m(trial): return trial\nf = C.m\n",
    "import functools\ndef given(g):\n    @functools.wraps(g)\n    def h(trial): return g(trial, 3)\n    return h\n"
    "@given\ndef f(trial, data): return trial\n",
    "import asyncio\nasync def g(trial): return trial\ndef f(trial): return asyncio.run(g(trial))\n",
    "f = float\nf = f.__call__\n",
]


def refusal(reference: str, folder: Path) -> str:
    with pytest.raises(SpecError) as caught:
        usercode.load_objective(reference, folder)
    return str(caught.value)


@pytest.mark.parametrize("source", WRONG)
def test_what_cannot_be_one_is_told(source: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source)
    assert refusal("mine.py:f", tmp_path) == f"objective = 'mine.py:f': {WRONG[source]}"


@pytest.mark.parametrize("source", RIGHT)
def test_what_can_be_one_works(source: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source)
    assert usercode.load_objective("mine.py:f", tmp_path)(5.0) == 5.0


def test_a_class_can_be_another_part(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class Net:\n    def __init__(self, shape, classes): pass\n")
    assert usercode.load("mine.py:Net", tmp_path, "model.name").__name__ == "Net"


@pytest.mark.parametrize(
    "reference",
    ["./train.py:f", "sub/../train.py:f", "{folder}/train.py:f", "sub/train.py:f", "my-train.py:f", "a:b/train.py:f"],
)
def test_paths_of_every_kind_work(reference: str, tmp_path: Path) -> None:
    reference = reference.format(folder=tmp_path)
    file = tmp_path / reference.removesuffix(":f")
    for folder in ("sub", "a:b"):
        (tmp_path / folder).mkdir()
    file.write_text("def f(trial): return __name__\n")
    assert usercode.load_objective(reference, tmp_path)(None) == file.stem
    assert usercode.digest([reference], tmp_path) == usercode.digest([str(file) + ":f"], tmp_path)


def test_a_notebook_is_told_the_mend(tmp_path: Path) -> None:
    assert refusal("sub/nb.ipynb:objective", tmp_path) == (
        "objective = 'sub/nb.ipynb:objective': a notebook cannot be imported; convert it to a script with "
        '`jupyter nbconvert --to script sub/nb.ipynb`, and write "sub/nb.py:objective"'
    )


@pytest.mark.parametrize("location", ["sub/train", "./train", "run.sh", "train.pyc"])
def test_what_is_no_python_file_is_refused_unread(location: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise AssertionError('was imported')\n")
    for name in ("run.sh", "train.pyc"):
        (tmp_path / name).write_text("")
    assert refusal(f"{location}:f", tmp_path) == (
        f'objective = \'{location}:f\': {location} is not a Python file; write "file.py:function" or "package.module:function"'
    )
