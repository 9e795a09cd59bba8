"""The reference page is current, and names whatever there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from annotated_types import Ge, Gt, Le, MultipleOf

from docs import make_reference as reference
from docs.make_reference import default_text, field_text
from hpo.final.after.steps import STEPS
from hpo.spec import options
from hpo.spec.study_file import StudySpec
from hpo.strategy.pruners import PRUNERS
from hpo.strategy.samplers import SAMPLERS
from hpo.train.build.registry import KINDS, PartKind

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"


def test_the_committed_page_is_current() -> None:
    assert PAGE.read_text() == reference.page(), (
        f"docs/reference.md is not what the code says; run: {reference.REGENERATE}"
    )


def test_every_entry_and_every_section_is_on_the_page() -> None:
    page = reference.page()
    libraries = [[f"{library}:NAME" for library in kind.libraries] for kind in KINDS.values()]
    listed = [*(kind.functions for kind in KINDS.values()), *libraries, SAMPLERS, PRUNERS, STEPS]
    sections = {line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")}
    entries = [line.removeprefix("### ") for line in page.splitlines() if line.startswith("### ")]
    assert sorted(entries) == sorted(name for functions in listed for name in functions)
    assert [key for key in StudySpec.model_fields if key not in sections and f"\n- `{key}" not in page] == []
    assert set(KINDS) | {"training", "budget", "recovery", "failures", "sampler", "pruner"} <= sections


def part(
    given: object, *, rate: Annotated[float, Gt(0), Le(1)], widths: Sequence[Annotated[int, Ge(1)]] = (4, 2)
) -> object:
    """Do this
    and that.

    More of it.

    Args:
        given: what we give.
        widths: how wide, and
            where.
    """


def test_a_new_entry_is_on_the_page_without_a_word_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = PartKind(functions={"new": part}, given=1, returns=object)
    monkeypatch.setitem(KINDS, "schedule", kind)
    start = reference.page().partition("\n## schedule\n")[2].partition("\n## ")[0]
    assert start.split("\n\n")[-3:] == [
        "Do this and that.",
        "More of it.",
        "- `rate`: float > 0, <= 1, required\n- `widths = [4, 2]`: list of int >= 1. How wide, and where.\n",
    ]


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Annotated[float, Ge(0), Le(1)], "float >= 0, <= 1"),
        (Annotated[float, Gt(0)] | None, "float > 0"),
        (Literal["a", 1, True], '"a", 1 or true'),
        (tuple[int, ...], "list of int"),
        (list[Literal["a", "b"]], 'list of "a" or "b"'),
        (Annotated[list[int], pydantic.Field(min_length=1)], "list of int at least 1 long"),
        (dict[str, float], "table of float"),
        (Annotated[int, MultipleOf(16)], "int in steps of 16"),
        (bool, "true or false"),
        (Any, "any value"),
    ],
)
def test_a_type_reads_as_words(hint: Any, text: str) -> None:
    def function(*, option: Any) -> None: ...

    function.__annotations__["option"] = hint
    assert field_text(options.model_of(function, 0).model_fields["option"]) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (False, "false"), ("a", '"a"'), ((1, 2), "[1, 2]"), ({"a": [0.1]}, "{ a = [0.1] }"), ({}, "{}")],
)
def test_a_default_reads_as_toml(value: object, text: str) -> None:
    assert default_text(value) == text


def test_an_entry_without_a_docstring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "__doc__", None)
    monkeypatch.setitem(KINDS, "schedule", PartKind(functions={"new": part}, given=1, returns=object))
    with pytest.raises(ValueError, match="part: has no docstring for the reference; write one"):
        reference.page()
