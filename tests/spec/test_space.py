"""The grammar of ranges and choices, and how a tree of them is lifted, pinned, suggested and listed."""

from __future__ import annotations

import random
from typing import Any

import optuna
import pytest

from hpo.errors import SpecError
from hpo.spec import space
from hpo.spec.space import Choices, Range

CONDITIONAL = {
    "model": {"widths": {"choices": [[64, 32], [128]]}, "dropout": {"low": 0.0, "high": 0.5}, "name": "mlp"},
    "optimizer": {
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "sgd": {"momentum": {"low": 0.0, "high": 0.9, "step": 0.3}},
        "adamw": {"beta1": 0.8},
        "name": {"choices": ["sgd", "adamw"]},
    },
    "training": {"batch_size": {"low": 16, "high": 64, "step": 16}, "epochs": 5},
}


@pytest.mark.parametrize("constant", [3, 0.5, True, "text", [1, 2], [], ["low", "high"], [[1], [2]]])
def test_a_bare_value_or_list_is_a_constant(constant: Any) -> None:
    assert space.lift({"x": constant}) == {"x": constant}
    assert list(space.parameters({"x": constant})) == []


@pytest.mark.parametrize(
    ("table", "parameter"),
    [
        ({"low": 1, "high": 9}, Range(low=1, high=9)),
        ({"low": 0.0, "high": 9.0}, Range(low=0.0, high=9.0)),
        ({"low": 1, "high": 9.5}, Range(low=1, high=9.5)),
        ({"low": 1e-4, "high": 1.0, "log": True}, Range(low=1e-4, high=1.0, log=True)),
        ({"low": 0, "high": 9, "step": 3}, Range(low=0, high=9, step=3)),
        ({"low": 0.1, "high": 0.7, "step": 0.2}, Range(low=0.1, high=0.7, step=0.2)),
        ({"low": 5, "high": 5}, Range(low=5, high=5)),
        ({"choices": ["a", 1, 2.5, False, [1, 2]]}, Choices(options=("a", 1, 2.5, False, [1, 2]))),
        ({"choices": ["only"]}, Choices(options=("only",))),
    ],
)
def test_a_table_is_a_range_or_a_choice_and_comes_back_when_lowered(table: dict[str, Any], parameter: Any) -> None:
    lifted = space.lift({"part": {"leaf": table}})
    assert lifted == {"part": {"leaf": parameter}}
    assert space.lower(lifted) == {"part": {"leaf": table}}


def test_a_range_is_of_ints_only_if_both_ends_are() -> None:
    assert [Range(low=a, high=b).integer for a, b in [(1, 2), (1.0, 2), (1, 2.0), (1.0, 2.0)]] == [True] + [False] * 3


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"low": 2, "high": 1}, "p: low = 2 is above high = 1; swap them"),
        (
            {"low": 0.0, "high": 1.0, "log": True},
            "p: a log range cannot start at low = 0.0; use a low above 0 or remove log",
        ),
        (
            {"low": -1, "high": 1, "log": True},
            "p: a log range cannot start at low = -1; use a low above 0 or remove log",
        ),
        ({"low": 1}, "p: a range needs low and high, but high is missing; add high = ..."),
        ({"high": 1}, "p: a range needs low and high, but low is missing; add low = ..."),
        ({"low": 1, "high": 2, "logg": True}, "p: unknown key 'logg' in a range (did you mean 'log'?)"),
        ({"low": 1, "high": 2, "log": 1}, "p.log: 1 is not true or false"),
        ({"low": True, "high": 2}, "p.low: true is not a finite number"),
        ({"low": "1", "high": 2}, "p.low: '1' is not a finite number"),
        ({"low": float("nan"), "high": 2.0}, "p.low: nan is not a finite number"),
        ({"low": 1.0, "high": float("inf")}, "p.high: inf is not a finite number"),
        ({"low": 1, "high": 2, "step": [1]}, "p.step: [1] is not a finite number"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "p: log and step = 1 cannot be combined; remove one of them"),
        ({"low": 1, "high": 3, "step": 0}, "p.step: 0 must be above 0"),
        (
            {"low": 0.1, "high": 1.0, "step": 0.4},
            "p: high = 1.0 is not a whole number of steps of 0.4 above low; use high = 0.9",
        ),
        (
            {"low": 0.0, "high": 1.0, "step": 1e-320},
            "p.step: 1e-320 is too small for { low = 0.0, high = 1.0, step = 1e-320 }; remove it",
        ),
        (
            {"low": -1e308, "high": 1e308},
            "p: { low = -1e+308, high = 1e+308 } is too wide: high - low overflows a float; move its ends",
        ),
        (
            {"low": 0, "high": 2**53 + 1},
            "p: { low = 0, high = 9007199254740993 } exceeds 2**53, the largest integer that Optuna can store; write floats",
        ),
        ({"choices": []}, "p: choices = [] is empty or not a list; give at least one value in brackets"),
        ({"choices": "abc"}, "p: choices = 'abc' is empty or not a list; give at least one value in brackets"),
        ({"choices": ["a", "b", "a"]}, "p: choices = ['a', 'b', 'a'] repeats a value; list each value once"),
        ({"choices": [1, 1.0]}, "p: choices = [1, 1.0] repeats a value; list each value once"),
        ({"choices": [[1], "[1]"]}, "p: choices = [[1], '[1]'] repeats a value; list each value once"),
        (
            {"choices": [{"a": 1}]},
            "p: choices = [{ a = 1 }] holds a table; a choice is a number, a string, true, false or a list",
        ),
        (
            {"choices": [1], "low": 0},
            "p: 'low' cannot stand beside choices; write { choices = [...] } alone",
        ),
    ],
)
def test_an_impossible_range_or_choice_is_refused(table: dict[str, Any], message: str) -> None:
    """An impossible range or choice is refused with path value and mend."""
    with pytest.raises(SpecError) as caught:
        space.lift({"p": table})
    assert str(caught.value) == message


def test_a_parameter_is_named_by_its_dotted_path_in_every_branch() -> None:
    assert [path for path, _ in space.parameters(space.lift(CONDITIONAL))] == [
        "model.widths",
        "model.dropout",
        "optimizer.lr",
        "optimizer.sgd.momentum",
        "optimizer.name",
        "training.batch_size",
    ]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"optimizer": {"name": "sgd", "adam": {"beta1": 0.5}}},
            "optimizer.adam: no choice has this name: optimizer.name is 'sgd'; add 'adam' to the choices of "
            "optimizer.name or remove [optimizer.adam]; a range is { low = ..., high = ... }, a choice is { choices = [...] }",
        ),
        (
            {"optimizer": {"name": "sgd", "lr": {"min": 0.1, "max": 0.5, "log": True}}},
            "optimizer.lr: a range is { low = ..., high = ... }, not min and max",
        ),
        (
            {"optimizer": {"name": {"choices": ["a", "b"]}, "c": {}}},
            "optimizer.c: no choice has this name: optimizer.name is 'a', 'b'; add 'c' to the choices of "
            "optimizer.name or remove [optimizer.c]; a range is { low = ..., high = ... }, a choice is { choices = [...] }",
        ),
        (
            {"training": {"epochs": {"lo": 1}}},
            "training.epochs: { lo = 1 } is neither a range nor a choice; "
            "a range is { low = ..., high = ... }, a choice is { choices = [...] }",
        ),
        (
            {"model": {"name": "m", "m": {"deep": {"x": 1}}}},
            "model.m.deep: { x = 1 } is neither a range nor a choice; "
            "a range is { low = ..., high = ... }, a choice is { choices = [...] }",
        ),
    ],
)
def test_a_table_under_no_choice_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        space.check_branches(space.lift(tree))
    assert str(caught.value) == message


def test_branches_that_belong_to_a_choice_are_in_order() -> None:
    space.check_branches(space.lift(CONDITIONAL))


def test_pinning_picks_the_name_first_and_drops_the_branches_not_taken() -> None:
    asked: list[str] = []

    def pick(path: str, parameter: Any) -> Any:
        asked.append(path)
        return {"optimizer.name": "adamw"}.get(path, parameter.ends()[0])

    assert space.pin(space.lift(CONDITIONAL), pick) == {
        "model": {"name": "mlp", "widths": [64, 32], "dropout": 0.0},
        "optimizer": {"name": "adamw", "lr": 1e-4, "adamw": {"beta1": 0.8}},
        "training": {"batch_size": 16, "epochs": 5},
    }
    assert asked == ["model.widths", "model.dropout", "optimizer.name", "optimizer.lr", "training.batch_size"]


def test_when_a_space_is_conditional() -> None:
    """A space is conditional only if a branch under a searched name holds a parameter."""
    choice, searched = {"choices": ["a", "b"]}, {"low": 1, "high": 2}
    table = [
        ({"o": {"name": choice, "a": {"x": searched}}}, True),
        ({"o": {"name": choice, "a": {"x": 1}}}, False),
        ({"o": {"name": "a", "a": {"x": searched}}}, False),
        ({"o": {"name": choice, "x": searched}}, False),
    ]
    assert [space.is_conditional(space.lift(tree)) for tree, _ in table] == [expected for _, expected in table]


def test_lists_are_stored_as_compact_json_and_come_back_as_lists() -> None:
    choices = Choices(options=([64, 32], [[1], ["ä"]], "plain", 3))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = [choices.suggest(study.ask(), "widths") for _ in range(40)]
    stored = {trial.params["widths"] for trial in study.trials}
    assert stored == {"[64,32]", '[[1],["\\u00e4"]]', "plain", 3}
    assert [space.encode(value) for value in seen] == [trial.params["widths"] for trial in study.trials]


def test_suggest_asks_optuna_for_the_distributions_that_were_declared() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trees, wanted = [], set()
    for _ in range(20):
        trial = study.ask()
        trees.append(space.suggest(space.lift(CONDITIONAL), trial))
        wanted.add(frozenset(trial.params))
    found = {name: d for trial in study.trials for name, d in trial.distributions.items()}
    assert found == {
        "model.widths": optuna.distributions.CategoricalDistribution(("[64,32]", "[128]")),
        "model.dropout": optuna.distributions.FloatDistribution(0.0, 0.5),
        "optimizer.name": optuna.distributions.CategoricalDistribution(("sgd", "adamw")),
        "optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "optimizer.sgd.momentum": optuna.distributions.FloatDistribution(0.0, 0.9, step=0.3),
        "training.batch_size": optuna.distributions.IntDistribution(16, 64, step=16),
    }
    shared = {"model.widths", "model.dropout", "optimizer.name", "optimizer.lr", "training.batch_size"}
    assert wanted == {frozenset(shared), frozenset(shared | {"optimizer.sgd.momentum"})}
    for tree, asked in zip(trees, study.trials, strict=True):
        assert tree["model"]["widths"] in ([64, 32], [128])
        assert ("sgd" in tree["optimizer"]) == (asked.params["optimizer.name"] == "sgd")


def test_a_log_range_of_ints_is_suggested_as_one() -> None:
    trial = optuna.create_study().ask()
    value = Range(low=1, high=64, log=True).suggest(trial, "n")
    assert isinstance(value, int)
    assert trial.distributions["n"] == optuna.distributions.IntDistribution(1, 64, log=True)


@pytest.mark.parametrize(
    ("parameter", "middle"),
    [
        (Range(low=1, high=4), 2),
        (Range(low=0.0, high=1.0), 0.5),
        (Range(low=1, high=64, log=True), 8),
        (Range(low=1e-4, high=1e-2, log=True), pytest.approx(1e-3)),
        (Range(low=1e200, high=1e300, log=True), pytest.approx(1e250)),
        (Range(low=1e-300, high=1e-200, log=True), pytest.approx(1e-250)),
        (Range(low=0, high=90, step=30), 30),
        (Range(low=3, high=3), 3),
        (Choices(options=("a", "b", "c")), "b"),
        (Choices(options=("a",)), "a"),
    ],
)
def test_the_middle_lies_inside_and_has_the_right_type(parameter: Any, middle: Any) -> None:
    assert parameter.middle() == middle
    if isinstance(parameter, Range):
        assert isinstance(parameter.middle(), int) == parameter.integer


def test_a_grid_lists_every_value_and_counts_without_listing() -> None:
    tree = space.lift(
        {
            "a": {"x": {"low": 0.0, "high": 0.3, "step": 0.1}, "n": {"low": 1, "high": 3}},
            "b": {"w": {"choices": [[1], "s"]}, "k": 7},
        }
    )
    assert space.grid(tree) == {"a.x": [0.0, 0.1, 0.2, 0.3], "a.n": [1, 2, 3], "b.w": ["[1]", "s"]}
    assert space.grid_points(tree) == 24
    huge = space.lift({"a": {f"n{i}": {"low": 0, "high": 10**12} for i in range(9)}})
    assert space.grid_points(huge) == (10**12 + 1) ** 9


@pytest.mark.parametrize("count", [space.grid, space.grid_points])
def test_a_grid_refuses_a_range_without_a_step_and_a_conditional_space(count: Any) -> None:
    with pytest.raises(SpecError) as caught:
        count(space.lift({"o": {"lr": {"low": 0.1, "high": 0.2}}}))
    assert str(caught.value) == (
        "o.lr: a grid needs a step, got { low = 0.1, high = 0.2 }; add step = ... or use { choices = [...] }"
    )
    with pytest.raises(SpecError, match=r"^sampler.name: grid cannot search a conditional space"):
        count(space.lift(CONDITIONAL))


def test_variants_hold_both_ends_of_every_parameter_in_every_branch() -> None:
    lifted = space.lift(CONDITIONAL)
    seen: dict[str, set[Any]] = {}

    def collect(tree: dict[str, Any], path: str = "") -> None:
        for key, value in tree.items():
            here = f"{path}.{key}" if path else key
            collect(value, here) if isinstance(value, dict) else seen.setdefault(here, set()).add(space.encode(value))

    variants = list(space.variants(lifted))
    for variant in variants:
        assert not list(space.parameters(variant))
        collect(variant)
    for path, parameter in space.parameters(lifted):
        assert set(map(space.encode, parameter.ends())) <= seen[path]
    assert seen["optimizer.adamw.beta1"] == {0.8}
    assert all(set(v["optimizer"]) & {"sgd", "adamw"} == {v["optimizer"]["name"]} for v in variants)


def test_variants_do_not_multiply() -> None:
    """Variants meet each end with each part of another section and do not multiply."""
    part = {"name": {"choices": list("abcdef")}, "x": {"low": 0, "high": 1}, "y": {"choices": [True, False]}}
    lifted = space.lift(dict.fromkeys(("model", "optimizer", "schedule", "loss", "warmup"), part))
    variants = list(space.variants(lifted))
    assert (
        len(variants) == 10 * 36 * 9
    )  # pairs of sections, of names; each with the middle and both ends of four parameters
    met = {(v["model"]["x"], v["loss"]["name"]) for v in variants}
    assert met == {(x, name) for x in (0, 1) for name in "abcdef"}


def test_a_pinned_tree_has_one_variant() -> None:
    pinned = {"model": {"name": "mlp", "widths": [1]}, "training": {}}
    assert list(space.variants(pinned)) == [pinned]


# --- random trees -------------------------------------------------------------------------------------------------------


def _leaf(rng: random.Random) -> Any:
    low = rng.randint(-50, 50)
    kinds = [
        lambda: rng.choice([rng.randint(0, 9), rng.random(), "text", True, [1, 2], []]),
        lambda: {"low": low, "high": low + rng.randint(0, 40)},
        lambda: {"low": float(low), "high": low + rng.random()},
        lambda: {"low": rng.uniform(1e-6, 1e-3), "high": rng.uniform(1e-3, 10.0), "log": True},
        lambda: {"low": low, "high": low + 3 * rng.randint(0, 5), "step": 3},
        lambda: {"low": 0.0, "high": 0.25 * rng.randint(1, 8), "step": 0.25},
        lambda: {"choices": rng.sample(["a", "b", 3, 4.5, [1], [2, "x"], False], rng.randint(1, 7))},
    ]
    return rng.choice(kinds)()


def _tree(rng: random.Random) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for section in ("model", "optimizer", "schedule"):
        names = rng.sample(["p", "q", "r", "own.py:net"], rng.randint(1, 3))
        part = {f"k{i}": _leaf(rng) for i in range(rng.randint(0, 3))}
        part["name"] = {"choices": names} if len(names) > 1 else names[0]
        for name in rng.sample(names, rng.randint(0, len(names))):
            part[name] = {f"b{i}": _leaf(rng) for i in range(rng.randint(0, 2))}
        tree[section] = part
    tree["training"] = {f"t{i}": _leaf(rng) for i in range(rng.randint(0, 3))}
    return tree


@pytest.mark.parametrize("seed", range(150))
def test_any_tree_comes_back_when_lowered(seed: int) -> None:
    """Any tree comes back when lowered and what is suggested pins it again."""
    raw = _tree(random.Random(seed))
    lifted = space.lift(raw)
    space.check_branches(lifted)
    assert space.lower(lifted) == raw

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    pinned = space.suggest(lifted, trial)
    assert not list(space.parameters(space.lift(pinned)))
    space.check_branches(pinned)
    declared = dict(space.parameters(lifted))
    for path, value in trial.params.items():
        parameter = declared[path]
        if isinstance(parameter, Range):
            assert parameter.low <= value <= parameter.high
            assert isinstance(value, int) == parameter.integer
        else:
            assert value in [space.encode(option) for option in parameter.options]

    def stored(path: str, parameter: Any) -> Any:
        value = trial.params[path]
        if isinstance(parameter, Range):
            return value
        return next(option for option in parameter.options if space.encode(option) == value)

    assert space.pin(lifted, stored) == pinned
    again = optuna.trial.FixedTrial(trial.params)
    assert space.suggest(lifted, again) == pinned
    for variant in space.variants(lifted):
        assert not list(space.parameters(variant))
