"""Samplers by name, on real studies in memory: which randomness each has, and what grid refuses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import optuna
import pytest

from hpo.errors import SpecError
from hpo.spec import space
from hpo.spec.study_file import StudySpec, as_meant
from hpo.storage import memory
from hpo.storage.optuna_private import as_in_optimize, stop_was_requested
from hpo.strategy import auto_sampler, samplers

RANGE = {"low": 0.0, "high": 1.0}
FLAT: dict[str, Any] = {
    "data": {"name": "d"},
    "model": {"name": "m", "dropout": RANGE, "widths": {"choices": [[1], [2, 3]]}},
    "optimizer": {"name": "o", "lr": {"low": 1e-4, "high": 1.0, "log": True}},
    "training": {"batch_size": {"low": 8, "high": 64, "step": 8}},
}
STEPPED = FLAT | {
    "model": {"name": "m", "dropout": {"low": 0.0, "high": 0.3, "step": 0.1}},
    "optimizer": {"name": "o", "lr": {"choices": [0.1, 0.01]}},
    "training": {"batch_size": 8},
}
CONDITIONAL = FLAT | {"optimizer": {"name": {"choices": ["a", "b"]}, "a": {"momentum": RANGE}}}


def spec(name: str, tree: dict[str, Any] = FLAT, *, seed: int = 0, **options: Any) -> StudySpec:
    document = {"name": "s", "seed": seed, "sampler": {"name": name, **options}, **tree}
    return samplers.resolve(StudySpec.from_document(document))


def own(**sampler: Any) -> StudySpec:
    document = {"name": "s", "objective": "mine.py:f", "direction": "minimize", "sampler": sampler}
    return samplers.resolve(StudySpec.from_document(document))


def value(trial: optuna.trial.BaseTrial) -> float:
    return float(trial.params["model.dropout"])


def search(found: StudySpec, trials: int, history: optuna.Study | None = None) -> optuna.Study:
    """Run trials as workers do: a fresh sampler each, made for the trial's number."""
    study = history or optuna.create_study(study_name="fixed")
    for _ in range(trials):
        study.sampler = samplers.build(found, len(study.trials))
        trial = study.ask()
        space.suggest(found.tree, trial)
        study.tell(trial, value(trial))
    return study


def next_params(found: StudySpec, history: optuna.Study, number: int) -> dict[str, Any]:
    """Return what the sampler made for this number proposes after this history, which stays as it is."""
    study = copy.deepcopy(history)
    study.sampler = samplers.build(found, number)
    trial = study.ask()
    space.suggest(found.tree, trial)
    return trial.params


@pytest.mark.parametrize("name", [name for name in samplers.SAMPLERS if name != "grid"])
def test_each_sampler_repeats_its_suggestions(name: str) -> None:
    """Each sampler searches a space and the same number and history give the same suggestion."""
    found = spec(name, n_startup_trials=3) if name in ("tpe", "gp", "cmaes") else spec(name)
    study = search(found, 7)
    assert {trial.state for trial in study.trials} == {optuna.trial.TrialState.COMPLETE}
    assert all(set(trial.params) == {path for path, _ in space.parameters(found.tree)} for trial in study.trials)
    again = search(found, 7)
    assert [trial.params for trial in study.trials] == [trial.params for trial in again.trials]
    assert next_params(found, study, 7) == next_params(found, study, 7)


@pytest.mark.parametrize("name", ["random", "tpe", "gp", "nsga2", "cmaes"])
def test_these_draw_by_the_trials_number_and_by_the_studys_seed(name: str) -> None:
    """CMA-ES as well: its state comes from the storage, so its seed decides only the draw from that state."""
    options = {"n_startup_trials": 4} if name in ("tpe", "gp", "cmaes") else {}
    trials = 2 if name == "gp" else 6  # past its start-up a Gaussian process has one best point, whoever asks
    study = search(spec(name, **options), trials)
    here = next_params(spec(name, **options), study, trials)
    assert next_params(spec(name, **options), study, trials + 1) != here
    assert next_params(spec(name, seed=1, **options), study, trials) != here


@pytest.mark.parametrize("name", ["qmc", "grid"])
def test_sequences_are_walked_by_all_workers(name: str) -> None:
    """These walk one sequence whichever worker asks and the study's seed decides which."""
    tree = STEPPED if name == "grid" else FLAT
    study = search(spec(name, tree), 3)
    places = [next_params(spec(name, tree), study, number) for number in (3, 4, 11)]
    assert places == [next_params(spec(name, tree), study, number) for number in (3, 4, 11)]
    if name == "qmc":  # a trial's number is its place, so nobody takes another one's
        assert len({tuple(place.values()) for place in places}) == 3
    sequences = [[trial.params for trial in search(spec(name, tree, seed=seed), 4).trials] for seed in (0, 0, 1)]
    assert sequences[0] == sequences[1] != sequences[2]


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_no_two_trial_numbers_share_a_start_up_point(name: str) -> None:
    """All start from the same empty history, as workers do that start at once."""
    found, empty = spec(name, n_startup_trials=1000) if name == "tpe" else spec(name), optuna.create_study()
    points = [tuple(next_params(found, empty, number).values()) for number in range(200)]
    for column in zip(*points, strict=True):
        if isinstance(column[0], float):
            assert len(set(column)) == 200
    others = [tuple(next_params(spec(name, seed=1), empty, number).values()) for number in range(50)]
    assert not set(points) & set(others)


def test_where_tpe_groups() -> None:
    """TPE groups exactly where the space is conditional or the file says so."""

    def group(tree: dict[str, Any], **options: Any) -> bool:
        sampler = samplers.build(spec("tpe", tree, **options), 0)
        assert isinstance(sampler, optuna.samplers.TPESampler)
        return bool(sampler._group)

    assert (group(FLAT), group(CONDITIONAL)) == (False, True)
    assert (group(FLAT, group=True), group(CONDITIONAL, group=False)) == (True, False)
    assert group(CONDITIONAL, multivariate=False) is False


def test_tpe_searches_a_conditional_space_jointly() -> None:
    """TPE searches a conditional space without falling back to independent draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = search(spec("tpe", CONDITIONAL, n_startup_trials=4), 12)
    assert {trial.params["optimizer.name"] for trial in study.trials} == {"a", "b"}


def test_the_options_reach_the_sampler() -> None:
    nsga2 = samplers.build(spec("nsga2", population_size=7), 0)
    assert isinstance(nsga2, optuna.samplers.NSGAIISampler)
    assert nsga2.population_size == 7
    tpe = samplers.build(spec("tpe", n_startup_trials=3, n_ei_candidates=5, constant_liar=False), 0)
    assert isinstance(tpe, optuna.samplers.TPESampler)
    assert (tpe._n_startup_trials, tpe._n_ei_candidates, tpe._constant_liar) == (3, 5, False)


# --- grid -----------------------------------------------------------------------------------------------------------


def test_grid_visits_every_point_once_and_then_asks_to_stop() -> None:
    found = spec("grid", STEPPED)
    assert samplers.grid_size(found) == 8
    study = optuna.create_study()
    with as_in_optimize(study):
        for number in range(8):
            study.sampler = samplers.build(found, number)
            trial = study.ask()
            space.suggest(found.tree, trial)
            assert not stop_was_requested(study)
            study.tell(trial, 0.0)
    seen = [tuple(sorted(trial.params.items())) for trial in study.trials]
    assert len(set(seen)) == 8
    assert stop_was_requested(study)
    assert {dict(point)["model.dropout"] for point in seen} == {0.0, 0.1, 0.2, 0.3}
    assert samplers.grid_size(spec("tpe")) is None


def test_grid_over_an_objective_of_the_users_own_takes_its_listed_values() -> None:
    found = own(name="grid", search_space={"x": [1, 2], "k": ["a", "b", "c"]})
    assert samplers.grid_size(found) == 6
    study = optuna.create_study()
    with as_in_optimize(study):
        for number in range(6):
            study.sampler = samplers.build(found, number)
            trial = study.ask()
            trial.suggest_int("x", 0, 5)
            trial.suggest_categorical("k", ["a", "b", "c"])
            study.tell(trial, 0.0)
    assert len({tuple(sorted(trial.params.items())) for trial in study.trials}) == 6


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"name": "grid"},
        FLAT,
        "model.dropout: a grid needs a step, got { low = 0.0, high = 1.0 }; add step = ... or use { choices = [...] }",
    ),
    (
        {"name": "grid"},
        CONDITIONAL,
        "sampler.name: grid cannot search a conditional space (a branch such as [optimizer.sgd] holds ranges); "
        "make the branch's values constants or use sampler tpe",
    ),
    (
        {"name": "grid"},
        STEPPED | {"training": {"epochs": {"low": 1, "high": 10**9}}},
        "sampler.name: the grid has 8,000,000,000 points, at most 100,000 are possible; widen the steps",
    ),
    (
        {"name": "grid", "search_space": {"x": [1]}},
        STEPPED,
        "sampler.search_space: is only for an objective of your own; remove it, the grid comes from the ranges and choices",
    ),
    ({"name": "tep"}, FLAT, "sampler.name: there is no sampler 'tep' (did you mean 'tpe'?)"),
    (
        {},
        FLAT,
        'sampler.name: missing; write name = "..." (known: '
        "auto, cmaes, fidelity_tpe, gp, grid, nsga2, nsga3, qmc, random, tpe)",
    ),
    ({"name": "random", "seed": 3}, FLAT, "sampler.seed: sampler random takes no 'seed'"),
    (
        {"name": "tpe", "n_startup_trials": -1},
        FLAT,
        "sampler.n_startup_trials = -1: input should be greater than or equal to 0",
    ),
    (
        {"name": "tpe", "multivariate": False, "group": True},
        FLAT,
        "sampler.group = true: needs multivariate = true; change one of the two",
    ),
    (
        {"name": "nsga2", "population_size": 1},
        FLAT,
        "sampler.population_size = 1: input should be greater than or equal to 2",
    ),
    (
        {"name": "nsga2", "crossover_prob": 2.0},
        FLAT,
        "sampler.crossover_prob = 2.0: input should be less than or equal to 1",
    ),
    (
        {"name": "nsga2", "mutation_prob": -1.0},
        FLAT,
        "sampler.mutation_prob = -1.0: input should be greater than or equal to 0",
    ),
    ({"name": "cmaes", "sigma0": 0.0}, FLAT, "sampler.sigma0 = 0.0: input should be greater than 0"),
    ({"name": "qmc", "qmc_type": "sobel"}, FLAT, "sampler.qmc_type = 'sobel': input should be 'sobol' or 'halton'"),
]


@pytest.mark.parametrize(("sampler", "tree", "message"), REFUSED)
def test_a_sampler_that_cannot_work_is_refused(sampler: dict[str, Any], tree: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        samplers.resolve(StudySpec.from_document({"name": "s", "sampler": sampler, **tree}))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({}, "sampler.search_space: grid needs it with an objective of your own: { lr = [0.1, 0.01], ... }"),
        ({"search_space": {}}, "sampler.search_space: is empty; name the parameters: { lr = [0.1, 0.01], ... }"),
        ({"search_space": {"x": []}}, "sampler.search_space.x = []: give at least one value, no lists or tables"),
        ({"search_space": {"x": [[1]]}}, "sampler.search_space.x = [[1]]: give at least one value, no lists or tables"),
        ({"search_space": {"x": 3}}, "sampler.search_space.x = 3: input should be a list"),
        (
            {"search_space": {"x": list(range(400)), "y": list(range(400))}},
            "sampler.name: the grid has 160,000 points, at most 100,000 are possible; widen the steps",
        ),
    ],
)
def test_grid_over_an_objective_of_the_users_own_needs_listed_values(sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        own(name="grid", **sampler)
    assert str(caught.value) == message


# --- auto -------------------------------------------------------------------------------------------------------------

OBJECTIVES = {"accuracy": "maximize", "params": "minimize"}
BOUND = {"params": "<= 1e6"}
FULL_GRID = STEPPED | {
    "optimizer": {"name": "o", "lr": 0.1},
    "model": {"name": "m", "widths": {"choices": [[1], [2, 3]]}},
}
WIDE = STEPPED | {
    "model": {"name": "m", "dropout": {"low": 0, "high": 100, "step": 1}},
    "training": {"batch_size": {"low": 8, "high": 40, "step": 8}},
    "optimizer": {"name": "o", "lr": 0.1},
}

#: What a new study records of the model for a flat space: all options, as that of a named sampler has.
MODEL = {
    "name": "fidelity_tpe",
    "n_startup_trials": 10,
    "n_ei_candidates": 24,
    "min_trials": 8,
    "explore": 0,
    "group": False,
    "start": "qmc",
}


@pytest.mark.parametrize(
    ("tree", "name", "why"),
    [
        (FLAT, "fidelity_tpe", "the space is no grid"),
        (CONDITIONAL, "fidelity_tpe", "the space is no grid"),
        (STEPPED, "grid", "the budget of 64 trials covers all 8 points of the space; the study ends after them"),
        (FULL_GRID, "grid", "the budget of 64 trials covers all 2 points of the space; the study ends after them"),
        (FULL_GRID | {"model": {"name": "m"}}, "fidelity_tpe", "the space is no grid"),  # 1 point
        (
            STEPPED | {"budget": {"trials": 7}},
            "fidelity_tpe",
            "the budget of 7 trials does not cover the 8 points of the space; a budget of 7 trials is too small to learn "
            "from, so they are drawn by qmc",
        ),
        (WIDE | {"budget": {"trials": 600}}, "fidelity_tpe", "the space has 505 points, more than 256"),
        (
            CONDITIONAL | {"budget": {"trials": 12}, "workers": 12},
            "fidelity_tpe",
            "the space is no grid; a budget of 12 trials is too small to learn from, so they are drawn at random",
        ),
        (CONDITIONAL | {"budget": {"trials": 13}, "workers": 12}, "fidelity_tpe", "the space is no grid"),
        (STEPPED | {"objectives": OBJECTIVES}, "tpe", "there are several objectives"),
        (STEPPED | {"constraints": BOUND}, "tpe", "there are constraints"),
    ],
)
def test_what_auto_stands_for(tree: dict[str, Any], name: str, why: str) -> None:
    """The choice is the one of a study with that sampler."""
    found = spec("auto", tree)
    assert found.sampler == {"name": "auto"}
    choice, options = auto_sampler.choose(found), {}
    if name == "fidelity_tpe":
        options = {"explore": 0} | ({} if space.is_conditional(found.tree) else {"start": "qmc"})
    assert (choice.name, choice.options, choice.why) == (name, options, why)
    named = spec(name, tree, **options)
    assert samplers.settled(found) == named
    assert auto_sampler.name_of(found) == auto_sampler.name_of(named) == name
    assert samplers.grid_size(found) == samplers.grid_size(named)
    assert type(samplers.build(found, 3)) is type(samplers.build(named, 3))


@pytest.mark.parametrize("later", [5, 8, 1000])
def test_a_study_keeps_what_auto_stands_for_when_its_budget_changes(later: int) -> None:
    for first, name in ((8, "grid"), (7, "fidelity_tpe")):
        found = spec("auto", STEPPED)
        recorded = samplers.recorded(found, first)
        assert recorded.sampler == {"name": "auto", "stands_for": {"name": "grid"} if name == "grid" else MODEL}
        assert recorded.fingerprint == found.fingerprint
        stored = StudySpec.from_document(as_meant(recorded.document))
        joined = stored.managed_by(spec("auto", STEPPED | {"budget": {"trials": later}}))
        assert samplers.recorded(joined, later) == joined
        assert samplers.settled(joined).sampler == samplers.settled(recorded).sampler
        assert samplers.settled(joined).sampler["name"] == name


@pytest.mark.parametrize(("tree", "name"), [(STEPPED, "grid"), (FLAT, "fidelity_tpe"), (CONDITIONAL, "fidelity_tpe")])
def test_a_study_from_before_the_record_keeps_the_sampler_of_its_space(tree: dict[str, Any], name: str) -> None:
    """Its budget does not cover the grid, and its first trials are drawn at random."""
    found = spec("auto", tree | {"budget": {"trials": 7}})
    old, new = (StudySpec.from_document(as_meant(one.document)) for one in (found, samplers.recorded(found, 7)))
    assert old.sampler == {"name": "auto", "stands_for": "by its space"}
    assert new.sampler["stands_for"]["name"] == "fidelity_tpe"
    assert old.fingerprint == new.fingerprint
    assert samplers.settled(old).sampler == spec(name, tree).sampler


def test_a_record_of_some_options_leaves_the_others_at_their_defaults() -> None:
    """Studies that were made on November 30, 2026 have such a record."""
    document = spec("auto").document | {
        "sampler": {"name": "auto", "stands_for": {"name": "fidelity_tpe", "explore": 0}}
    }
    stored = StudySpec.from_document(as_meant(document))
    assert samplers.settled(stored).sampler == spec("fidelity_tpe", explore=0).sampler


@pytest.mark.parametrize(("tree", "start"), [(FLAT, {"start": "qmc"}), (CONDITIONAL, {})])
def test_a_study_that_recorded_a_name_alone_draws_every_fourth_trial_at_random(
    tree: dict[str, Any], start: dict[str, str]
) -> None:
    """So did all studies that recorded `fidelity_tpe`."""
    document = spec("auto", tree).document | {"sampler": {"name": "auto", "stands_for": "fidelity_tpe"}}
    stored = StudySpec.from_document(as_meant(document))
    assert samplers.settled(stored).sampler == spec("fidelity_tpe", tree, explore=4, **start).sampler


def test_what_auto_stands_for_is_no_option_of_a_study_file() -> None:
    with pytest.raises(SpecError, match=r"sampler.stands_for"):
        spec("auto", stands_for="qmc")


def test_auto_draws_its_first_trials_by_qmc_and_then_learns() -> None:
    """Ten trials have ended before the model suggests."""
    found, studies = spec("auto"), [optuna.create_study(study_name="s", storage=memory.storage()) for _ in range(3)]
    drawn, by_qmc, learned = (
        [trial.params for trial in search(one, trials, study).trials]
        for one, trials, study in zip((found, spec("qmc"), found), (10, 12, 12), studies, strict=True)
    )
    assert drawn == by_qmc[:10] == learned[:10]
    assert learned[10] != by_qmc[10]
    assert learned[11] not in (by_qmc[11], next_params(spec("random"), optuna.create_study(), 11))


def test_auto_groups_the_space_of_an_objective_that_may_branch() -> None:
    assert samplers.settled(own(name="auto")).sampler["group"] is True
    with pytest.raises(SpecError, match="fidelity_tpe': does not support several objectives"):
        spec("fidelity_tpe", FLAT | {"objectives": OBJECTIVES})


@pytest.mark.parametrize(("options", "drawn"), [({}, [3, 7]), ({"explore": 2}, [1, 3, 5, 7]), ({"explore": 0}, [])])
def test_some_trials_of_fidelity_tpe_are_drawn_at_random(options: dict[str, int], drawn: list[int]) -> None:
    built = [samplers.build(spec("fidelity_tpe", **options), number) for number in range(8)]
    assert [number for number, one in enumerate(built) if isinstance(one, optuna.samplers.RandomSampler)] == drawn
