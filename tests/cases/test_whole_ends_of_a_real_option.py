"""`{ low = 0, high = 1 }` for a real option means real numbers: its annotated type decides, not how the ends are written.

Ranges of a learning rate, a dropout or a decay are written so every day.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpo.errors import SpecError
from hpo.spec.space import Choices, Range
from hpo.spec.study_file import StudySpec
from hpo.train.build import range_types, registry

DOCUMENT: dict[str, Any] = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "optimizer": {"name": "sgd", "lr": 0.1},
}
ZERO_TO_ONE = {"low": 0, "high": 1}
MINE = """
from __future__ import annotations
from functools import partial
from typing import Annotated, Any, Literal, NewType, Optional, TypedDict, Unpack
from annotated_types import Ge, Le

Rate = NewType("Rate", float)

class Shared(TypedDict, total=False):
    of_all: Annotated[float, Ge(0)]

def net(
    shape, classes, *,
    maybe: Optional[float] = None, word: float | Literal["auto"] = "auto", bound: Annotated[float, Ge(0), Le(1)] = 0.0,
    named: Rate = 0.5, quoted: "float" = 1.0, count: int = 1, some: int | None = None, number: int | float = 1,
    silent=0.5, anything: Any = None, **shared: Unpack[Shared],
): ...

class Net:
    def __init__(self, shape, classes, *, bound: float = 0.5, count: int = 1): ...

class Maker:
    def __call__(self, shape, classes, *, bound: float = 0.5): ...

maker = Maker()
half = partial(net, count=3)

def counting(shape, classes, *, size: int = 1): ...
def measuring(shape, classes, *, size: float = 1.0): ...
def silent(shape, classes, *, size=1.0): ...
def either(shape, classes, *, size: int | float = 1.0): ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    return registry.resolve(StudySpec.from_document(DOCUMENT | changes), folder).tree


def fault(folder: Path, **changes: Any) -> str:
    with pytest.raises(SpecError) as caught:
        tree(folder, **changes)
    return str(caught.value)


def untyped(found: dict[str, Any], folder: Path) -> list[str]:
    return list(range_types.untyped(found, registry.option_models(folder)))


def test_a_real_option_of_ours_is_searched_over_real_numbers(tmp_path: Path) -> None:
    optimizer = {
        "name": {"choices": ["sgd", "adam"]},
        "lr": {"low": 1, "high": 10, "log": True},
        "weight_decay": {"low": 0, "high": 10, "step": 1},
        "sgd": {"momentum": {"low": 0, "high": 0.9}},
        "adam": {"eps": {"choices": [1, 2]}},
    }
    given = {
        "optimizer": optimizer,
        "sam": {"rho": ZERO_TO_ONE},
        "stopping": {"gl": {"low": 1, "high": 5, "step": 0.5}},
    }
    found = tree(tmp_path, **given)
    assert found["optimizer"]["lr"] == Range(low=1.0, high=10.0, log=True)
    wanted = {
        "lr": "{ low = 1.0, high = 10.0, log = true }",
        "weight_decay": "{ low = 0.0, high = 10.0, step = 1.0 }",
        "sgd": "{ low = 0.0, high = 0.9 }",
        "adam": "{ choices = [1.0, 2.0] }",
    }
    said = {
        **found["optimizer"],
        "sgd": found["optimizer"]["sgd"]["momentum"],
        "adam": found["optimizer"]["adam"]["eps"],
    }
    assert {key: str(said[key]) for key in wanted} == wanted
    assert str(found["sam"]["rho"]) == "{ low = 0.0, high = 1.0 }"
    assert str(found["stopping"]["gl"]) == "{ low = 1.0, high = 5.0, step = 0.5 }"
    assert not any(parameter.integer for parameter in (found["sam"]["rho"], found["stopping"]["gl"]))


@pytest.mark.parametrize("key", ["maybe", "word", "bound", "named", "quoted", "of_all"])
def test_an_own_option_is_real_as_it_is_annotated(key: str, folder: Path) -> None:
    found = tree(folder, model={"name": "mine.py:net", key: ZERO_TO_ONE})
    assert str(found["model"][key]) == "{ low = 0.0, high = 1.0 }"
    assert untyped(found, folder) == []


@pytest.mark.parametrize("name", ["Net", "maker", "half"])
def test_a_class_a_callable_object_and_a_partial_say_types_too(name: str, folder: Path) -> None:
    found = tree(folder, model={"name": f"mine.py:{name}", "bound": ZERO_TO_ONE})
    assert str(found["model"]["bound"]) == "{ low = 0.0, high = 1.0 }"


@pytest.mark.parametrize("key", ["count", "some"])
def test_a_counting_option_stays_one(key: str, folder: Path) -> None:
    found = tree(folder, model={"name": "mine.py:net", key: ZERO_TO_ONE})
    assert str(found["model"][key]) == "{ low = 0, high = 1 }"
    assert tree(folder, training={"epochs": {"low": 2, "high": 4}})["training"]["epochs"].integer
    for low in (1.0, 1.5):  # no integers to count by
        assert "input should be a valid integer" in fault(
            folder, model={"name": "mine.py:net", key: {"low": low, "high": 4}}
        )


@pytest.mark.parametrize("key", ["silent", "anything"])
def test_an_option_without_a_type_goes_by_the_ends_and_that_is_told(key: str, folder: Path) -> None:
    found = tree(folder, model={"name": "mine.py:net", key: ZERO_TO_ONE})
    assert str(found["model"][key]) == "{ low = 0, high = 1 }"
    assert untyped(found, folder) == [
        f"model.{key} = {{ low = 0, high = 1 }}: is searched over integers, as its ends are, since mine.py:net does not say of "
        f"what type {key} is; annotate it, or write {{ low = 0.0, high = 1.0 }} for real numbers"
    ]
    found = tree(folder, model={"name": "mine.py:net", key: {"low": 0.0, "high": 1}})
    assert untyped(found, folder) == []


def test_what_may_mean_both_is_refused_with_both_readings(folder: Path) -> None:
    assert fault(folder, model={"name": "mine.py:net", "number": ZERO_TO_ONE}) == (
        "model.number = { low = 0, high = 1 }: may mean integers or real numbers, since mine.py:net takes both; "
        "write { low = 0.0, high = 1.0 } for real numbers, { choices = [...] } for integers"
    )
    both = {"choices": ["mine.py:counting", "mine.py:measuring"]}
    assert fault(folder, model={"name": both, "size": {"low": 1, "high": 4}}) == (
        "model.size = { low = 1, high = 4 }: mine.py:counting takes integers there, mine.py:measuring real numbers; give "
        'each its own range, in [model."mine.py:counting"] and [model."mine.py:measuring"]'
    )
    apart = {name: {"size": {"low": 1, "high": 4}} for name in both["choices"]}
    found = tree(folder, model={"name": both, **apart})["model"]
    assert [str(found[name]["size"]) for name in apart] == ["{ low = 1, high = 4 }", "{ low = 1.0, high = 4.0 }"]
    explicit = {"name": "mine.py:net", "number": {"choices": [0, 1, 0.5]}}
    assert tree(folder, model=explicit)["model"]["number"] == Choices(options=(0, 1, 0.5))


def test_a_part_that_does_not_say_beside_one_of_real_numbers_is_refused_with_both_readings(folder: Path) -> None:
    both = {"choices": ["mine.py:silent", "mine.py:measuring"]}
    assert fault(folder, model={"name": both, "size": {"low": 1, "high": 4}}) == (
        "model.size = { low = 1, high = 4 }: may mean integers or real numbers: mine.py:measuring takes real numbers there, "
        "mine.py:silent does not say; annotate size, write { low = 1.0, high = 4.0 } for real numbers, or give each its own "
        'range, in [model."mine.py:silent"] and [model."mine.py:measuring"]'
    )
    found = tree(folder, model={"name": both, "size": {"low": 1.0, "high": 4.0}})
    assert (str(found["model"]["size"]), untyped(found, folder)) == ("{ low = 1.0, high = 4.0 }", [])
    found = tree(folder, model={"name": both, "size": {"choices": [16, 32]}})
    assert str(found["model"]["size"]) == "{ choices = [16, 32] }"


def test_a_part_that_does_not_say_beside_one_that_counts_gets_integers_and_that_is_told(folder: Path) -> None:
    both = {"choices": ["mine.py:counting", "mine.py:silent"]}
    found = tree(folder, model={"name": both, "size": {"low": 1, "high": 4}})
    assert str(found["model"]["size"]) == "{ low = 1, high = 4 }"
    (line,) = untyped(found, folder)
    assert line.startswith(
        "model.size = { low = 1, high = 4 }: is searched over integers, as its ends are, since mine.py:silent"
    )


COUNTING = [
    ({"low": 10, "high": 22, "step": 1.5}, 1),
    ({"low": 10, "high": 22, "step": 2.0}, 2),
    ({"low": 1, "high": 2, "step": 0.5}, 1),
]


@pytest.mark.parametrize(("given", "step"), COUNTING)
def test_an_option_that_counts_takes_no_real_step(given: dict[str, Any], step: int, folder: Path) -> None:
    said = f"{{ low = {given['low']}, high = {given['high']}, step = {given['step']} }}"
    mend = f"{said}: its real step gives real numbers; write step = {step}"
    both = {"choices": ["mine.py:either", "mine.py:counting"]}
    for format in (1, 2):
        told = fault(
            folder, format=format, training={"batch_size": given}, model={"name": both, "size": given}
        ).splitlines()
        assert {line for line in told if "{" in line} == {f"training.batch_size = {mend}", f"model.size = {mend}"}
    assert tree(folder, training={"batch_size": {**given, "step": step}})["training"]["batch_size"].integer


def test_a_real_step_is_not_blamed_for_a_wrong_end(folder: Path) -> None:
    told = fault(folder, optimizer={"name": "sgd", "lr": {"low": -1, "high": 1, "step": 0.5}})
    assert "optimizer.lr = -1" in told
    assert "step" not in told


def test_a_real_step_between_whole_ends_is_real_where_that_may_be(folder: Path) -> None:
    given = {"low": 0, "high": 3, "step": 0.5}
    for name in ("either", "measuring", "silent"):
        found = tree(folder, model={"name": f"mine.py:{name}", "size": given})
        assert not found["model"]["size"].integer
        told = untyped(found, folder)
        assert told == ([] if name != "silent" else [
            "model.size = { low = 0, high = 3, step = 0.5 }: is searched over real numbers, as its step is, since "
            "mine.py:silent does not say of what type size is; annotate it, or write { low = 0.0, high = 3.0, step = 0.5 } "
            "for real numbers"
        ])  # fmt: skip


def test_an_old_study_keeps_its_integers(tmp_path: Path) -> None:
    old = tree(tmp_path, format=1, optimizer={"name": "sgd", "lr": 0.1, "weight_decay": ZERO_TO_ONE})
    assert str(old["optimizer"]["weight_decay"]) == "{ low = 0, high = 1 }"
