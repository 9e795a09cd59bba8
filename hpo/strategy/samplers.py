"""Samplers by name. Each trial gets a new sampler.

The sampler's seed comes from (study seed, trial number). So all start-up points differ, whichever worker runs a trial, and the
same history gives the same suggestions. QMC and grid follow one sequence that all workers share, so their seed is the study's.
CMA-ES keeps its state in the storage and draws with the trial's seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import optuna
from annotated_types import Ge, Gt, Le

from hpo.errors import SpecError
from hpo.spec import options, seeds, space
from hpo.spec.study_file import STANDS_FOR, StudySpec
from hpo.storage.optuna_private import NumberedQMC
from hpo.strategy import auto_sampler, pruners
from hpo.strategy.fidelity import ENOUGH, FidelityTPE
from hpo.strategy.pruners import named
from hpo.strategy.tpe import ArrayTPE

Sampler = optuna.samplers.BaseSampler
Count = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
MAX_GRID = 100_000  # points; a larger grid is a mistake, and Optuna keeps all points in memory


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The trial that a sampler is made for: the spec, the trial's number, and the seeds of study and trial."""

    spec: StudySpec
    number: int
    study_seed: int
    trial_seed: int


def tpe(
    draw: Draw,
    *,
    n_startup_trials: Count = 10,
    n_ei_candidates: Annotated[int, Ge(1), Le(1_000_000)] = 24,
    multivariate: bool = True,
    group: bool = False,
    constant_liar: bool = True,
) -> Sampler:
    """Tree-structured Parzen estimator (Bergstra et al., 2011).

    Args:
        n_startup_trials: the number of first trials that are drawn at random.
        n_ei_candidates: the number of candidates for the expected improvement.
        multivariate: sample all parameters together.
        group: sample the parameters of each branch as a group; by default true if the space is conditional.
        constant_liar: count running trials as bad ones, so that parallel workers do not try the same point.
    """
    return ArrayTPE(
        n_startup_trials=n_startup_trials,
        n_ei_candidates=n_ei_candidates,
        multivariate=multivariate,
        group=group,
        constant_liar=constant_liar,
        seed=draw.trial_seed,
    )


def fidelity_tpe(
    draw: Draw,
    *,
    n_startup_trials: Count = 10,
    n_ei_candidates: Annotated[int, Ge(1), Le(1_000_000)] = 24,
    min_trials: Annotated[int, Ge(1)] = ENOUGH,
    explore: Count = 4,
    group: bool = False,
    start: Literal["random", "qmc"] = "random",
) -> Sampler:
    """TPE that ranks trials of unequal length at the highest rung that enough of them have reached, complete or not. The rungs
    are the pruner's; with a pruner without rungs they are the epochs 1, 3, 9, 27 and so on.

    Args:
        n_startup_trials: the number of trials that are ranked before the first one is suggested by them.
        n_ei_candidates: the number of candidates for the expected improvement.
        min_trials: the number of trials that must have reached a rung.
        explore: one trial in so many is drawn at random, since early rungs may mislead; 0 for none, as `auto` has it.
        group: sample the parameters of each branch as a group; by default true if the space is conditional.
        start: how the trials before them are drawn; qmc is a low-discrepancy sequence, for spaces without conditions.
    """
    if explore and (start == "random" or draw.number >= n_startup_trials) and draw.number % explore == explore - 1:
        return random(draw)
    return FidelityTPE(
        ladder=pruners.ladder(draw.spec),
        enough=min_trials,
        first=qmc(draw) if start == "qmc" else None,
        n_startup_trials=n_startup_trials,
        n_ei_candidates=n_ei_candidates,
        multivariate=True,
        group=group,
        seed=draw.trial_seed,
    )


def gp(draw: Draw, *, n_startup_trials: Count = 10, deterministic_objective: bool = False) -> Sampler:
    """Gaussian process with expected improvement. Suitable for a few hundred trials; beyond that a suggestion takes minutes.

    Args:
        n_startup_trials: the number of first trials that are drawn at random.
        deterministic_objective: assume values without noise.
    """
    return optuna.samplers.GPSampler(
        n_startup_trials=n_startup_trials,
        deterministic_objective=deterministic_objective,
        seed=draw.trial_seed,
    )


def cmaes(
    draw: Draw, *, n_startup_trials: Count = 1, sigma0: Annotated[float, Gt(0)] | None = None, with_margin: bool = False
) -> Sampler:
    """CMA-ES (Hansen, 2016) over the numeric parameters. Choices are drawn at random.

    Args:
        n_startup_trials: the number of first trials that are drawn at random.
        sigma0: the initial standard deviation; by default a sixth of the smallest range.
        with_margin: keep a margin for integers, so that they do not get stuck (CMA-ES with margin).
    """
    return optuna.samplers.CmaEsSampler(
        n_startup_trials=n_startup_trials,
        sigma0=sigma0,
        with_margin=with_margin,
        warn_independent_sampling=False,
        independent_sampler=optuna.samplers.RandomSampler(seed=draw.trial_seed),
        seed=draw.trial_seed,
    )


def nsga2(
    draw: Draw,
    *,
    population_size: Annotated[int, Ge(2), Le(1_000_000)] = 50,
    mutation_prob: Share | None = None,
    crossover_prob: Share = 0.9,
    swapping_prob: Share = 0.5,
) -> Sampler:
    """Genetic search (Deb et al., NSGA-II, 2002).

    Args:
        population_size: the number of trials in a generation.
        mutation_prob: the probability of mutation of each parameter; by default 1 / number of parameters.
        crossover_prob: the probability of crossover for each child.
        swapping_prob: the probability of swapping each parameter in a crossover.
    """
    return optuna.samplers.NSGAIISampler(
        population_size=population_size,
        mutation_prob=mutation_prob,
        crossover_prob=crossover_prob,
        swapping_prob=swapping_prob,
        seed=draw.trial_seed,
    )


def nsga3(
    draw: Draw,
    *,
    population_size: Annotated[int, Ge(2), Le(1_000_000)] = 50,
    mutation_prob: Share | None = None,
    crossover_prob: Share = 0.9,
    swapping_prob: Share = 0.5,
    dividing_parameter: Annotated[int, Ge(1), Le(1000)] = 3,
) -> Sampler:
    """Genetic search by reference points, for three or more objectives (Deb and Jain, NSGA-III, 2014).

    Args:
        population_size: the number of trials in a generation.
        mutation_prob: the probability of mutation of each parameter; by default 1 / number of parameters.
        crossover_prob: the probability of crossover for each child.
        swapping_prob: the probability of swapping each parameter in a crossover.
        dividing_parameter: the density of the reference points.
    """
    return optuna.samplers.NSGAIIISampler(
        population_size=population_size,
        mutation_prob=mutation_prob,
        crossover_prob=crossover_prob,
        swapping_prob=swapping_prob,
        dividing_parameter=dividing_parameter,
        seed=draw.trial_seed,
    )


def random(draw: Draw) -> Sampler:
    """Independent uniform draws (Bergstra and Bengio, 2012)."""
    return optuna.samplers.RandomSampler(seed=draw.trial_seed)


def grid(draw: Draw, *, search_space: dict[str, list[Any]] | None = None) -> Sampler:
    """All points of a grid, once each, in an order shuffled by the study's seed. The study ends after the last point.

    Enqueued trials take no point. After one, parallel workers may run one of the last points twice.

    Args:
        search_space: the values of each parameter, only for the user's own objective.
    """
    points = search_space if search_space is not None else space.grid(draw.spec.tree)
    return optuna.samplers.GridSampler(points, seed=draw.study_seed % 2**32)


def qmc(draw: Draw, *, qmc_type: Literal["sobol", "halton"] = "sobol", scramble: bool = True) -> Sampler:
    """Quasi-Monte Carlo: a low-discrepancy sequence (Bergstra and Bengio, 2012) that all workers share.

    Args:
        qmc_type: the sequence.
        scramble: scramble the sequence.
    """
    return NumberedQMC(
        number=draw.number,
        qmc_type=qmc_type,
        scramble=scramble,
        seed=draw.study_seed % 2**32,
        independent_sampler=optuna.samplers.RandomSampler(seed=draw.trial_seed),
        warn_independent_sampling=False,
    )


def auto(draw: Draw) -> Sampler:
    """A sampler by the search space and the budget: the grid if the budget covers all its points, else fidelity_tpe; tpe for
    several objectives and for constraints. The study records it. `hpo check` says which and why."""
    return build(draw.spec, draw.number)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "tpe": tpe,
    "auto": auto,
    "fidelity_tpe": fidelity_tpe,
    "gp": gp,
    "cmaes": cmaes,
    "nsga2": nsga2,
    "nsga3": nsga3,
    "random": random,
    "grid": grid,
    "qmc": qmc,
}


#: Samplers that support several objectives and constraints. random, grid and qmc ignore all values.
LEARNING = ("tpe", "gp", "nsga2", "nsga3")
OF_ONE_OBJECTIVE = ("fidelity_tpe", "cmaes")


def resolve(spec: StudySpec) -> StudySpec:
    """Return the spec with the sampler's options checked and its defaults filled in; SpecError for wrong options."""
    name, given = named(dict(spec.sampler), "sampler", SAMPLERS)
    options.check("sampler", name, SAMPLERS[name], 1, given, {key: f"sampler.{key}" for key in given})
    if given.get("group") and not given.get("multivariate", True):
        raise SpecError("sampler.group = true: needs multivariate = true; change one of the two")
    if name in OF_ONE_OBJECTIVE and (spec.objectives or spec.constraints):
        what = "several objectives" if spec.objectives else "constraints"
        raise SpecError(f"sampler.name = {name!r}: does not support {what}; choose {', '.join(LEARNING)} or random")
    if name in ("tpe", "fidelity_tpe") and "group" not in given:
        given["group"] = given.get("multivariate", True) and space.is_conditional(spec.tree)
    if name == "grid":
        _check_grid(spec, given)
    return spec.model_copy(update={"sampler": {"name": name} | options.defaults(SAMPLERS[name], 1) | given})


def _check_grid(spec: StudySpec, given: dict[str, Any]) -> None:
    if spec.objective and "search_space" not in given:
        raise SpecError("sampler.search_space: grid needs it with an objective of your own: { lr = [0.1, 0.01], ... }")
    if not spec.objective and "search_space" in given:
        raise SpecError(
            "sampler.search_space: is only for an objective of your own; remove it, the grid comes from the ranges and choices"
        )
    for key, values in given.get("search_space", {}).items():
        if not values or any(isinstance(value, list | dict) for value in values):
            raise SpecError(f"sampler.search_space.{key} = {values!r}: give at least one value, no lists or tables")
    if given.get("search_space") == {}:
        raise SpecError("sampler.search_space: is empty; name the parameters: { lr = [0.1, 0.01], ... }")
    points = _points(spec, given)
    if points > MAX_GRID:
        raise SpecError(
            f"sampler.name: the grid has {points:,} points, at most {MAX_GRID:,} are possible; widen the steps"
        )


def _points(spec: StudySpec, given: Mapping[str, Any]) -> int:
    listed = given.get("search_space")
    return space.grid_points(spec.tree) if listed is None else math.prod(map(len, listed.values()))


def settled(spec: StudySpec) -> StudySpec:
    """Return the spec with the sampler that suggests: what `auto` stands for, else its own."""
    if spec.sampler["name"] != "auto":
        return spec
    return resolve(spec.model_copy(update={"sampler": auto_sampler.choose(spec).table}))


def recorded(spec: StudySpec, trials: int) -> StudySpec:
    """Return the spec of a new study with a budget of these many trials. It holds what its sampler `auto` stands for.

    The record has all options, as that of a named sampler has: a later version may have other defaults.
    """
    if spec.sampler["name"] != "auto":
        return spec
    budget = spec.budget.model_copy(update={"trials": trials})
    chosen = settled(spec.model_copy(update={"budget": budget})).sampler
    return spec.model_copy(update={"sampler": {**spec.sampler, STANDS_FOR: chosen}})


def build(spec: StudySpec, trial_number: int) -> Sampler:
    """Return the sampler for one trial of the study."""
    spec = settled(spec)
    name, given = named(dict(spec.sampler), "sampler", SAMPLERS)
    trial_seed = seeds.derive(spec.seed, "sampler", trial_number) % 2**32  # numpy's seeds have 32 bits
    return SAMPLERS[name](Draw(spec=spec, number=trial_number, study_seed=spec.seed, trial_seed=trial_seed), **given)


def grid_size(spec: StudySpec) -> int | None:
    """Return the number of points of a grid study, None for another sampler."""
    found = settled(spec)
    return _points(found, found.sampler) if found.sampler["name"] == "grid" else None
