"""The options of a function are read off its signature and checked strictly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict, Unpack

import pytest
from annotated_types import Ge, Lt

from hpo.errors import SpecError
from hpo.spec import options


def part(
    given: int,
    *,
    rate: Annotated[float, Ge(0), Lt(1)],
    widths: Sequence[int] = (1, 2),
    kind: Literal["a", "b"] = "a",
    count: int | None = None,
    flag: bool = False,
) -> None:
    del given, rate, widths, kind, count, flag


class Net:
    def __init__(self, shape: tuple[int, ...], classes: int, *, width: int = 8, copy: bool = True) -> None:
        del shape, classes, width, copy


def untyped(first, second, width=3, **more):
    del first, second, width, more


def starred(*given: Any, width: int = 3) -> None:
    del given, width


class Shared(TypedDict, total=False):
    slope: Annotated[float, Ge(0)]
    file: Annotated[str, "mark"]


class Further(Shared):
    needed: int
    maybe: NotRequired[bool]


def sharing(shape: tuple[int, ...], *, width: int = 3, **more: Unpack[Shared]) -> None:
    del shape, width, more


def needing(shape: tuple[int, ...], **more: Unpack[Further]) -> None:
    del shape, more


def faults(function: Any, given: int, found: dict[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        options.check("model", "part", function, given, found, {"rate": "model.part.rate"})
    return str(caught.value).splitlines()


def test_defaults_are_plain_values_and_none_is_left_out() -> None:
    assert options.defaults(part, 1) == {"widths": [1, 2], "kind": "a", "flag": False}
    assert options.defaults(Net, 2) == {"width": 8, "copy": True}
    assert options.defaults(untyped, 2) == {"width": 3}
    assert options.defaults(starred, 2) == {"width": 3}


@pytest.mark.parametrize(
    ("function", "given", "found"),
    [
        (part, 1, {"rate": 0.5, "widths": [3], "kind": "b", "count": 7, "flag": True}),
        (part, 1, {"rate": 0}),
        (Net, 2, {"width": 3, "copy": False}),
        (untyped, 2, {"width": "anything", "other": [1]}),
        (starred, 2, {"width": 4}),
    ],
)
def test_what_the_function_takes_is_right(function: Any, given: int, found: dict[str, Any]) -> None:
    options.check("model", "part", function, given, found, {})


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        ({}, ["model.part.rate: model part needs 'rate'; add it"]),
        ({"rate": 1.0}, ["model.part.rate = 1.0: input should be less than 1"]),
        ({"rate": True}, ["model.part.rate = true: input should be a valid number"]),
        ({"rate": 0.5, "flag": 1}, ["model.flag = 1: input should be true or false"]),
        ({"rate": 0.5, "widths": [1, "2"]}, ["model.widths.1 = '2': input should be a valid integer"]),
        ({"rate": 0.5, "kind": "c"}, ["model.kind = 'c': input should be 'a' or 'b'"]),
        ({"rate": 0.5, "width": [1]}, ["width: model part takes no 'width' (did you mean 'widths'?)"]),
        ({"rates": 0.5}, ["rates: model part takes no 'rates' (did you mean 'rate'?)"]),  # not that rate is missing too
        ({"rate": 0.5, "given": 1}, ["given: model part takes no 'given' (known: count, flag, kind, rate, widths)"]),
    ],
)
def test_what_it_does_not_take_is_told_with_path_and_value(found: dict[str, Any], lines: list[str]) -> None:
    assert faults(part, 1, found) == lines


def test_everything_wrong_is_told_at_once() -> None:
    assert len(faults(part, 1, {"rate": 2.0, "kind": "c", "flag": "no"})) == 3


def test_a_function_that_cannot_be_read_is_told_as_a_fault_of_the_file() -> None:
    def without_arguments() -> None: ...

    def misspelt(a: int, b: int, *, width: Nope = 1) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    start = "model part: its parameters cannot be read: "
    assert faults(without_arguments, 2, {}) == [
        f"{start}TypeError: it takes 0 positional arguments, but hpo passes 2 before the options"
    ]
    assert faults(misspelt, 2, {}) == [f"{start}NameError: name 'Nope' is not defined"]
    assert faults(int, 2, {})[0].startswith(f"{start}ValueError: no signature found for builtin type")


def test_an_argument_that_hpo_passes_is_told_to_be_no_option() -> None:
    def net(num_classes: int, width: int = 8, *, p: float = 0.0) -> None:
        del num_classes, width, p

    with pytest.raises(SpecError) as caught:
        options.check("model", "net.py:net", net, 2, {"width": 4, "q": 1}, {}, gives="a shape and a number")
    assert caught.value.lines == [
        "width: model net.py:net takes no 'width'; hpo calls it with a shape and a number before its options",
        "q: model net.py:net takes no 'q' (known: p)",
    ]


def test_a_return_type_that_only_a_type_checker_knows_is_no_option() -> None:
    namespace: dict[str, Any] = {}
    exec(
        "from __future__ import annotations\ndef make(shape, *, width: int = 3) -> Unknown: ...",
        namespace,
    )
    assert options.defaults(namespace["make"], 1) == {"width": 3}


def test_functions_share_options_by_a_typed_dict() -> None:
    """Functions share options by a typed dict whose keys are checked and may be left out."""
    assert options.defaults(sharing, 1) == {"width": 3}
    options.check("model", "part", sharing, 1, {"slope": 0.5, "width": 2}, {})
    assert faults(sharing, 1, {"slope": -1.0, "slop": 1.0}) == [
        "model.slope = -1.0: input should be greater than or equal to 0",
        "slop: model part takes no 'slop' (did you mean 'slope'?)",
    ]
    assert faults(needing, 1, {"maybe": 1}) == [
        "model.needed: model part needs 'needed'; add it",
        "model.maybe = 1: input should be true or false",
    ]


def test_shared_options_carry_marks_as_others_do() -> None:
    assert options.marked(sharing, 1, "mark") == {"file"}
    assert options.marked(part, 1, "mark") == set()
