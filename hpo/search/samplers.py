"""Samplers by name, one fresh sampler a trial.

A sampler's seed comes from (study seed, trial number), so no two trials draw the same start-up point whichever worker
runs them, and the same history gives the same suggestions. QMC and grid walk one sequence that all workers share, so
these are seeded by the study alone. CMA-ES keeps its state in the storage and only draws with the trial's seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import optuna
from annotated_types import Ge, Gt, Le

from hpo.errors import SpecError
from hpo.search.pruners import named
from hpo.search.tpe import ArrayTPE
from hpo.spec import options, seeds, space
from hpo.spec.study_file import StudySpec

Sampler = optuna.samplers.BaseSampler
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
MAX_GRID = 100_000  # points; a larger grid is a mistake, and Optuna holds all of them in memory


@dataclass(frozen=True, kw_only=True)
class Draw:
    """For whom a sampler is made: the spec, and the seeds of the study and of the trial."""

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
    """Tree-structured Parzen estimator (Bergstra et al., 2011); `group` is on when the space is conditional."""
    return ArrayTPE(
        n_startup_trials=n_startup_trials,
        n_ei_candidates=n_ei_candidates,
        multivariate=multivariate,
        group=group,
        constant_liar=constant_liar,
        seed=draw.trial_seed,
    )


def gp(draw: Draw, *, n_startup_trials: Count = 10, deterministic_objective: bool = False) -> Sampler:
    """Gaussian process with expected improvement; good to a few hundred trials, minutes per suggestion beyond."""
    return optuna.samplers.GPSampler(
        n_startup_trials=n_startup_trials,
        deterministic_objective=deterministic_objective,
        seed=draw.trial_seed,
    )


def cmaes(
    draw: Draw, *, n_startup_trials: Count = 1, sigma0: Annotated[float, Gt(0)] | None = None, with_margin: bool = False
) -> Sampler:
    """CMA-ES (Hansen, 2016) over the numeric parameters; choices are drawn at random."""
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
    """Genetic search (Deb et al., NSGA-II, 2002)."""
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
    """Genetic search by reference points, for three objectives or more (Deb and Jain, NSGA-III, 2014)."""
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
    """Every point once, in an order shuffled by the study's seed; the study ends when all are done.

    Trials that were queued take no point, and then parallel workers may run one of the last points twice.

    Args:
        search_space: values by parameter, for an objective of the user's own; a declared space lists them itself.
    """
    points = search_space if search_space is not None else space.grid(draw.spec.tree)
    return optuna.samplers.GridSampler(points, seed=draw.study_seed % 2**32)


def qmc(draw: Draw, *, qmc_type: Literal["sobol", "halton"] = "sobol", scramble: bool = True) -> Sampler:
    """Low-discrepancy sequence (Bergstra and Bengio, 2012), one for all workers."""
    return _NumberedQMC(
        number=draw.number,
        qmc_type=qmc_type,
        scramble=scramble,
        seed=draw.study_seed % 2**32,
        independent_sampler=optuna.samplers.RandomSampler(seed=draw.trial_seed),
        warn_independent_sampling=False,
    )


class _NumberedQMC(optuna.samplers.QMCSampler):
    """QMC that takes the trial's number for its place in the sequence.

    Optuna counts places in a study attribute that it reads and writes without a lock: parallel workers get one place twice.
    """

    def __init__(self, *, number: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.number = number

    def _find_sample_id(self, study: optuna.Study, search_space: Any) -> int:  # noqa: ARG002  (Optuna's own signature)
        return self.number


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "tpe": tpe,
    "gp": gp,
    "cmaes": cmaes,
    "nsga2": nsga2,
    "nsga3": nsga3,
    "random": random,
    "grid": grid,
    "qmc": qmc,
}


#: Those that take note of further objectives and of constraints; random, grid and qmc learn nothing and go with anything.
LEARNING = ("tpe", "gp", "nsga2", "nsga3")
OF_ONE_OBJECTIVE = ("cmaes",)


def resolve(spec: StudySpec) -> StudySpec:
    """Return the spec with the sampler's defaults filled and checked; a grid must be finite and unconditional."""
    name, given = named(dict(spec.sampler), "sampler", SAMPLERS)
    options.check("sampler", name, SAMPLERS[name], 1, given, {key: f"sampler.{key}" for key in given})
    if given.get("group") and not given.get("multivariate", True):
        raise SpecError("sampler.group = true: goes with multivariate = true only; change one of the two")
    if name in OF_ONE_OBJECTIVE and (spec.objectives or spec.constraints):
        what = "several objectives" if spec.objectives else "constraints"
        raise SpecError(f"sampler.name = {name!r}: knows no {what}; choose {', '.join(LEARNING)} or random")
    if name == "tpe" and "group" not in given:
        given["group"] = given.get("multivariate", True) and space.is_conditional(spec.tree)
    if name == "grid":
        _check_grid(spec, given)
    return spec.model_copy(update={"sampler": {"name": name} | options.defaults(SAMPLERS[name], 1) | given})


def _check_grid(spec: StudySpec, given: dict[str, Any]) -> None:
    if spec.objective and "search_space" not in given:
        raise SpecError("sampler.search_space: grid needs it with an objective of your own: { lr = [0.1, 0.01], ... }")
    if not spec.objective and "search_space" in given:
        raise SpecError(
            "sampler.search_space: is for an objective of your own; a declared space lists its values itself"
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


def build(spec: StudySpec, trial_number: int) -> Sampler:
    """Return the sampler for one trial of the study."""
    name, given = named(dict(spec.sampler), "sampler", SAMPLERS)
    trial_seed = seeds.derive(spec.seed, "sampler", trial_number) % 2**32  # numpy's seeds have 32 bits
    return SAMPLERS[name](Draw(spec=spec, number=trial_number, study_seed=spec.seed, trial_seed=trial_seed), **given)


def grid_size(spec: StudySpec) -> int | None:
    """Return how many points a grid study has, None for another sampler."""
    if spec.sampler["name"] != "grid":
        return None
    return _points(spec, spec.sampler)
