"""Known configurations: what fits a search space, and the message for all that does not."""

from __future__ import annotations

from typing import Any

import pytest

from hpo.errors import SpecError
from hpo.spec import configuration, space
from hpo.spec.configuration import checked, of_words

TREE = space.lift(
    {
        "model": {"widths": {"choices": [[32], [64, 32]]}, "bias": {"choices": [True, False]}},
        "optimizer": {
            "name": {"choices": ["sgd", "adamw", "mine.py:Own"]},
            "lr": {"low": 1e-4, "high": 0.1, "log": True},
            "decay": 0.01,
            "sgd": {"momentum": {"low": 0.0, "high": 0.9, "step": 0.3}},
            "mine.py:Own": {"power": {"low": 1, "high": 9, "step": 2}},
        },
        "training": {"epochs": {"low": 1, "high": 20}, "size": {"choices": [16, 64]}, "mark": {"choices": ["1", "2"]}},
    }
)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("optimizer.lr=1e-3", {"optimizer.lr": 0.001}),
        ("optimizer.lr=.01", {"optimizer.lr": 0.01}),
        ("training.epochs=3.0", {"training.epochs": 3}),
        ("training.mark=1 training.size=16.0", {"training.mark": "1", "training.size": 16}),
        ("model.widths=[64,32] model.bias=true", {"model.widths": [64, 32], "model.bias": True}),
        ("optimizer.name=sgd optimizer.sgd.momentum=0.9", {"optimizer.name": "sgd", "optimizer.sgd.momentum": 0.9}),
        ("optimizer.sgd.momentum=0.3 optimizer.name=sgd", {"optimizer.sgd.momentum": 0.3, "optimizer.name": "sgd"}),
        (
            "optimizer.name=mine.py:Own optimizer.mine.py:Own.power=3",
            {"optimizer.name": "mine.py:Own", "optimizer.mine.py:Own.power": 3},
        ),
        ("optimizer.lr=0.1 optimizer.decay=0.010", {"optimizer.lr": 0.1}),  # the space's own constant
    ],
)
def test_what_fits_is_taken_as_the_space_has_it(words: str, values: dict[str, Any]) -> None:
    found = checked(TREE, of_words(words.split()))
    assert found.values == values
    assert [type(value) for value in found.values.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("lr=0.1", "lr: the study does not search it (did you mean 'optimizer.lr'?)"),
        ("optimizer.nam=sgd", "optimizer.nam: the study does not search it (did you mean 'optimizer.name'?)"),
        ("optimizer.decay=0.1", "optimizer.decay = 0.1: the study does not search it, it is always 0.01; leave it out"),
        (
            "optimizer.lr=5",
            "optimizer.lr = 5: is not in { low = 0.0001, high = 0.1, log = true }; the nearest legal value is 0.1",
        ),
        ("optimizer.lr=-1", "is not in { low = 0.0001, high = 0.1, log = true }; the nearest legal value is 0.0001"),
        ("optimizer.lr=inf", "optimizer.lr = inf: is not a number of { low = 0.0001, high = 0.1, log = true }"),
        ("optimizer.lr=true", "optimizer.lr = true: is not a number of"),
        ("optimizer.lr=high", "optimizer.lr = 'high': is not a number of"),
        ("training.epochs=2.4", "is not in { low = 1, high = 20 }; the nearest legal value is 2"),
        ("training.size=50", "training.size = 50: is none of the choices [16, 64]; the nearest legal value is 64"),
        ("training.size=true", "training.size = true: is none of the choices [16, 64]"),
        ("model.bias=1", "model.bias = 1: is none of the choices [true, false]"),
        (
            "optimizer.name=SGD",
            "is none of the choices ['sgd', 'adamw', 'mine.py:Own']; the nearest legal value is 'sgd'",
        ),
        (
            "optimizer.name=sgd optimizer.sgd.momentum=0.5",
            "is not in { low = 0.0, high = 0.9, step = 0.3 }; the nearest legal value is 0.6",
        ),
        (
            "optimizer.sgd.momentum=0.3",
            "optimizer.sgd.momentum: is searched only with optimizer.name = 'sgd', which is not given; add optimizer.name=sgd",
        ),
        (
            "optimizer.sgd.momentum=0.3 optimizer.name=adamw",
            "optimizer.sgd.momentum: is searched only with optimizer.name = 'sgd', and optimizer.name is 'adamw'; leave it out",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(words: str, why: str) -> None:
    with pytest.raises(SpecError) as refused:
        checked(TREE, of_words(words.split()))
    assert why in str(refused.value)


def test_every_nearest_value_that_is_named_is_legal() -> None:
    known = dict(space.parameters(TREE))
    for path, wrong in {
        "optimizer.lr": 7,
        "optimizer.sgd.momentum": 0.5,
        "training.epochs": 99.5,
        "training.size": -3,
    }.items():
        with pytest.raises(SpecError) as refused:
            configuration.legal(known[path], path, wrong)
        [_, named] = str(refused.value).split("the nearest legal value is ")
        assert configuration.legal(known[path], path, configuration.Written(named)) == float(named)


def test_all_mistakes_of_all_configurations_are_told_at_once() -> None:
    given = [{"optimizer": {"lr": 5}, "lr": 1}, {}, {"optimizer.lr": 0.1}, {"optimizer.name": "sg"}]
    with pytest.raises(SpecError) as refused:
        configuration.each(given, lambda values: checked(TREE, values))
    assert [line.partition(":")[0] for line in refused.value.lines] == [
        "configuration 1",
        "configuration 1",
        "configuration 2",
        "configuration 4",
    ]


def test_what_is_missing_is_named_and_a_grid_takes_nothing_less_than_all() -> None:
    given = of_words(["optimizer.name=sgd", "optimizer.lr=0.1"])
    missing = [
        "model.widths",
        "model.bias",
        "optimizer.sgd.momentum",
        "training.epochs",
        "training.size",
        "training.mark",
    ]
    assert checked(TREE, given).missing == missing
    with pytest.raises(SpecError, match=r"^model\.widths, .*: missing; a grid chooses no single values"):
        checked(TREE, given, is_grid=True)


def test_a_list_is_read_as_optuna_stores_it() -> None:
    assert checked(TREE, {"model.widths": "[64,32]"}).values == {"model.widths": [64, 32]}


@pytest.mark.parametrize("word", ["lr", "=3", " =3", ""])
def test_a_word_without_a_name_or_a_value_is_refused(word: str) -> None:
    with pytest.raises(SpecError, match="is not a parameter and its value; write it such as lr=1e-3"):
        of_words([word])


def test_a_parameter_given_twice_is_refused() -> None:
    with pytest.raises(SpecError, match="lr: is given twice"):
        of_words(["lr=1", "lr=2"])


@pytest.mark.parametrize(
    ("word", "value"), [("a=1\nb=2", "1\nb=2"), ('a={ json = "null" }', None), ("a=[[", "[["), ("a=x=y", "x=y")]
)
def test_a_value_is_read_as_toml_or_is_a_text(word: str, value: Any) -> None:
    [written] = of_words([word]).values()
    assert written.value == value


@pytest.mark.parametrize("word", ["None", "null"])
def test_a_word_may_mean_the_choice_without_a_value(word: str) -> None:
    given = of_words([f"k={word}"])
    assert configuration.legal(space.Choices(options=("a", None)), "k", given["k"]) is None
    assert configuration.legal(space.Choices(options=(None, word)), "k", given["k"]) == word
