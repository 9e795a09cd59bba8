"""A pickled function: when two are the same, what is refused by name, and what the file says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.spec import pickled, usercode
from hpo.spec.captures import Captures
from tests.support.cells import cell
from tests.support.paths import ROOT

SETUP = """
import dataclasses, enum, functools, math
import numpy as np
import torch
@dataclasses.dataclass
class Config:
    rate: float = 0.5
    names: list = dataclasses.field(default_factory=list)
class Kind(enum.Enum):
    A = 1
class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(1, width)
    @property
    def width(self): return self.layer.out_features
torch.manual_seed(0)
net, config, table = Net(2), Config(), {"b": 1, "a": {3, 1, 2}}
numbers, tensor = np.arange(4.0), torch.arange(3)
half = functools.partial(pow, 0.5)
def helper(x): return x * config.rate + half(2) + table["b"]
def outer(k):
    def inner(x): return x in {"x", "y", k}
    return inner
inner = outer("z")
"""
FUNCTION = """
def f(trial):
    "What it does."
    return helper(1) + numbers.sum() + tensor.sum() + net.width + len(Kind) + math.pi + inner("x")
"""
SAME = {
    "run again": FUNCTION,
    "a comment": FUNCTION.replace("    return", "    # why\n    return"),
    "another docstring": FUNCTION.replace("What it does", "What else"),
    "another layout": FUNCTION.replace("    return helper(1) +", "    return helper(1)\\\n        +"),
    "what it does not use": FUNCTION + "other = 3\n",
}
OTHER = {
    "code": (SETUP + FUNCTION.replace("helper(1)", "helper(2)"), "the code"),
    "a helper": (SETUP.replace("return x * config", "return 1 - x * config") + FUNCTION, "the global 'helper'"),
    "a field": (SETUP.replace("Config()", "Config(names=[1])") + FUNCTION, "the global 'config'"),
    "a set": (SETUP.replace("{3, 1, 2}", "{3, 1, 4}") + FUNCTION, "the global 'table'"),
    "an array": (SETUP.replace("arange(4.0)", "arange(5.0)") + FUNCTION, "the global 'numbers'"),
    "a type of number": (
        SETUP.replace("torch.arange(3)", "torch.arange(3, dtype=torch.int32)") + FUNCTION,
        "the global 'tensor'",
    ),
    "weights": (SETUP.replace("manual_seed(0)", "manual_seed(1)") + FUNCTION, "the global 'net'"),
    "a method": (SETUP.replace("return self.layer.out_features", "return 2") + FUNCTION, "the global 'net'"),
    "a member": (SETUP.replace("A = 1", "A = 2") + FUNCTION, "the global 'Kind'"),
    "a partial": (SETUP.replace("(pow, 0.5)", "(pow, 0.4)") + FUNCTION, "the global 'half'"),
    "a variable": (SETUP.replace('outer("z")', 'outer("w")') + FUNCTION, "the variable 'k'"),
}


@pytest.fixture(scope="module")
def first() -> Captures:
    return Captures(cell(SETUP + FUNCTION))


@pytest.mark.parametrize("case", SAME)
def test_the_same_function_has_the_same_digest(case: str, first: Captures) -> None:
    assert Captures(cell(SETUP + SAME[case])).parts == first.parts


@pytest.mark.parametrize("case", OTHER)
def test_what_changed_is_told(case: str, first: Captures) -> None:
    source, part = OTHER[case]
    found = Captures(cell(source))
    assert found.digest != first.digest
    assert [name for name in first.parts if first.parts[name] != found.parts[name]] == [part]


def test_another_process_finds_the_same_digest() -> None:
    source = """
import typing, pydantic
from random import random, uniform
from numpy.random import rand
T = typing.TypeVar("T")
class Box(typing.Generic[T]): pass
class Settings(pydantic.BaseModel):
    rate: float = 0.5
limits = {"a", "b", "c", "d"}
def half(x): return x / 2
def twice(x): return 2 * x
class Steps: known = set()
steps = {half, twice, (1, "a"), ("b",), frozenset({"c", "d"})}
Steps.known.add(Steps())
def f(x): return x in {"k", "l", "m"} or x in limits or (Box[int], Settings(), random, uniform, rand, steps, Steps)
"""
    code = "from hpo.spec.captures import Captures\nfrom tests.support.cells import cell\n"
    code += f"print(Captures(cell({source!r})).digest)"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == Captures(cell(source)).digest


NAMED = [
    *("random:random", "random:uniform", "numpy.random:rand", "math:sqrt", "cmath:sqrt", "numpy:add"),
    *("scipy.special:expit", "torch:channels_last", "torch:float32"),
]


@pytest.mark.parametrize("named", NAMED)
def test_what_a_module_holds_goes_by_its_name(named: str, tmp_path: Path) -> None:
    """A method of a module's generator is that generator's in the worker, too, and no copy's."""
    module, name = named.split(":")
    pickled.write(cell(f"from {module} import {name}\ndef f(trial): return {name}"), tmp_path)
    loaded = usercode.load_objective("function.pickle:f", tmp_path)
    assert loaded(None) is getattr(sys.modules[module], name)


PLAIN = "class A:\n    def g(x=1): return x\ndef f(x): return A().g()"
FIELDS = "import numpy\na = numpy.array([(1, 2)], dtype=[('x', 'i4'), ('y', 'i4')])\ndef f(x): return a['x']"
CONJUGATE = "import torch\na = torch.tensor([1 + 2j]).conj()\ndef f(x): return a"
DIFFERENT = {
    "functions of a name": [f"from {module} import sqrt\ndef f(x): return sqrt(x)" for module in ("math", "cmath")],
    "kinds of method": [
        PLAIN.replace("    def g", f"    {decorator}def g")
        for decorator in ("", "@staticmethod\n    ", "@classmethod\n    ")
    ],
    "names of fields": [FIELDS, FIELDS.replace("[('x', 'i4'), ('y', 'i4')]", "[('y', 'i4'), ('x', 'i4')]")],
    "what a docstring equals": [f"def f(x):\n    '{word}'\n    return '{word}'" for word in "ab"],
    "conjugate tensors": [CONJUGATE, CONJUGATE.replace(".conj()", "")],
}
EQUAL = {
    "equal constants of one cell or two": [
        [*cells, "def f(x): return a, b"]
        for cells in (["a = (1, (2,))\nb = (1, (2,))"], ["a = (1, (2,))", "b = (1, (2,))"])
    ],
    "a class within, on another line": [
        [f"{lines}def f(x):\n    class A: x = 1\n    return A"] for lines in ("", "# why\n\n")
    ],
    "a conjugate tensor and its values": [[CONJUGATE], [CONJUGATE.replace("+ 2j]).conj()", "- 2j])")]],
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_differs_has_different_digests(case: str) -> None:
    assert len({Captures(cell(source)).digest for source in DIFFERENT[case]}) == len(DIFFERENT[case])


@pytest.mark.parametrize("case", EQUAL)
def test_what_is_equal_has_one_digest(case: str) -> None:
    assert len({Captures(cell(*sources)).digest for sources in EQUAL[case]}) == 1


@pytest.mark.parametrize("made", ["functools.partial(run, k=3)", "Objective()", "Objective().run"])
def test_a_callable_object_of_a_module_is_pickled(made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def run(trial, k): return k\nclass Objective:\n    def run(self, trial): return 3\n    __call__ = run\n"
    (tmp_path / "objectives_of_mine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = cell(f"import functools\nfrom objectives_of_mine import run, Objective\nf = {made}")
    assert usercode.reference_of(found) is None
    assert usercode.load_objective(pickled.write(found, tmp_path), tmp_path)(None) == 3


def test_pickling_it_changes_nothing(first: Captures, tmp_path: Path) -> None:
    function = cell(SETUP + FUNCTION)
    for _ in range(2):
        assert pickled.write(function, tmp_path) == "function.pickle:f"
        assert pickled.head(tmp_path).digest == first.digest
    loaded = usercode.load_objective("function.pickle:f", tmp_path)
    assert loaded(None) == function(None)
    assert Captures(loaded).digest == first.digest


REFUSED = {
    "an open file": (
        "log = open('log.txt', 'w')\ndef f(trial): log.write('x')",
        "the global 'log' is an open file, 'log.txt'",
    ),
    "one of a helper": (
        "log = open('log.txt', 'w')\ndef say(): log.write('x')\ndef f(trial): say()",
        "the global 'log' is an open file, 'log.txt'; open it inside the function",
    ),
    "a file within": (
        "class A: pass\na = A()\na.files = {'x': open('log.txt', 'w')}\ndef f(trial): return a",
        "the global 'a'.files['x'] is an open file",
    ),
    "a socket": ("import socket\ns = socket.socket()\ndef f(trial): return s", "the global 's' is a socket"),
    "a lock": (
        "import threading\nlock = threading.Lock()\ndef f(trial): return lock",
        "the global 'lock' cannot be pickled (_thread.lock: cannot pickle '_thread.lock' object); make it inside the function",
    ),
    "a connection": (
        "import sqlite3\ndb = sqlite3.connect(':memory:')\ndef f(trial): return db",
        "the global 'db' cannot be pickled (sqlite3.Connection: ",
    ),
    "an engine": (
        "import sqlalchemy\nengine = sqlalchemy.create_engine('sqlite://')\ndef f(trial): return engine",
        "the global 'engine'",
    ),
    "a cached function": (
        "import functools\n@functools.lru_cache\ndef g(x): return x\ndef f(trial): return g(1)",
        "the global 'g' cannot be pickled (functools._lru_cache_wrapper: it is found by its name alone)",
    ),
    "a generator": (
        "rows = (i for i in range(3))\ndef f(trial): return next(rows)",
        "the global 'rows' cannot be pickled",
    ),
    "a large array": (
        "import numpy as np\nsmall = np.zeros(10**6)\nlarge = np.zeros(10**8)\ndef f(trial): return small[0] + large[0]",
        "the function captures more than 50 MB (the global 'large' 800 MB); load such data inside the function",
    ),
    "large data in pieces": (
        "import torch\nparts = [torch.zeros(10**6) for _ in range(20)]\ndef f(trial): return parts",
        "the function captures more than 50 MB (the global 'parts' 52 MB",
    ),
    "an enclosing variable": (
        "def make():\n    stream = open('log.txt', 'w')\n    return lambda trial: stream\nf = make()",
        "the variable 'stream' is an open file",
    ),
    "a default": ("def f(trial, out=open('log.txt', 'w')): pass", "a default of f[0] is an open file"),
    "a default of a helper": (
        "import weakref\nseen = weakref.WeakValueDictionary()\ndef f(trial): return seen",
        "the global 'seen': a default of remove[0] cannot be pickled (weakref.ReferenceType: ",
    ),
    "the environment": (
        "from os import environ\ndef f(trial): return environ['HOME']",
        "the global 'environ' is the whole environment, secrets included; read os.environ inside the function",
    ),
    "too deep": (
        "deep = []\nfor _ in range(10**4): deep = [deep]\ndef f(trial): return deep",
        "the global 'deep': is nested too deep",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_another_process_cannot_get_is_refused_by_name(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, message = REFUSED[case]
    with pytest.raises(SpecError, match=re.escape(message)):
        pickled.write(cell(source), tmp_path)
    assert not (tmp_path / pickled.FILE).exists()


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_is_refused_by_name(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with pytest.raises(SpecError, match=r"the global 'weights'\[0\] is a tensor on cuda:0; move it with \.cpu\(\)"):
        pickled.write(
            cell("import torch\nweights = [torch.ones(2, device='cuda')]\ndef f(trial): return weights"), tmp_path
        )


def test_a_file_that_is_missing_damaged_or_of_another_python(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"function\.pickle: the pickled function cannot be read: No such file"):
        usercode.load_objective("function.pickle:f", tmp_path)
    pickled.write(cell("def f(trial): return 1.0"), tmp_path)
    file = tmp_path / pickled.FILE
    content = file.read_bytes()
    file.write_bytes(content[:20])
    with pytest.raises(SpecError, match=r"holds no pickled function; call hpo\.search with the function again"):
        usercode.load_objective("function.pickle:f", tmp_path)
    version = f'"python": "{sys.version_info.major}.{sys.version_info.minor}"'
    assert version.encode() in content
    file.write_bytes(content.replace(version.encode(), b'"python": "3.9"'))
    with pytest.raises(SpecError, match=r"was pickled by Python 3\.9, here is 3"):
        usercode.load_objective("function.pickle:f", tmp_path)


def test_a_function_without_a_trial_is_refused(tmp_path: Path) -> None:
    pickled.write(cell("def f(): return 1.0"), tmp_path)
    with pytest.raises(SpecError, match=re.escape("takes (), but is called with the trial; write `def f(trial)`")):
        usercode.load_objective("function.pickle:f", tmp_path)


def test_modules_of_the_user_are_found_by_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "helpers_of_mine.py").write_text("def twice(x): return 2 * x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    pickled.write(cell("from helpers_of_mine import twice\ndef f(trial): return twice(2)"), tmp_path)
    folders = pickled.head(tmp_path).folders
    assert (folders[0], str(tmp_path) in folders) == (
        str(tmp_path / "lib"),
        False,
    )  # the current folder is not on the path
    code = "import sys\nfrom pathlib import Path\nfrom hpo.spec import usercode\n"
    code += "print(usercode.load_objective('function.pickle:f', Path(sys.argv[1]))(None))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("4\n", 0), done.stderr
